"""What layers add to each limited thing, in whole numbers, as a certificate's check sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from .bounds import Meta
from .chain import Chain, Choice, Group, Limits

Row = Literal["head", "update", "forward", "backward", "harm", "host", "device time", "host time"]
Whole = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a unit of one limit is worth.

    Attributes:
        row: the limit: memory at a moment (the loss, the update, a group's forward or backward pass), or a sum.
        group, choice: of ``forward`` and ``backward``: where; None is whichever layer of the group comes first.
        divisor, references: the limit is first made stronger, as counts are whole: each group's needs are counted
            from those of one of its choices, divided and rounded.
    """

    row: Row
    amount: Whole
    group: Whole | None = None
    choice: Whole | None = None
    divisor: Annotated[int, Meta(ge=1)] | None = None
    references: tuple[Whole, ...] = ()


class Unproven(ValueError):
    """A certificate that does not hold: why."""


Box = dict[tuple[int, int], tuple[int, int]]
"""How often a group's choice is made, least and most, where that is bounded."""


Needs = list[list[int]]


def rounded_row(chain: Chain, needs: Needs, limit: int, divisor: int, references: Sequence[int]) -> tuple[Needs, int]:
    """What follows from needs within a limit because counts are whole (mixed-integer rounding: Nemhauser and Wolsey).

    What each group's reference needs is first taken off all its layers, whose number is known. Of ``sum a n <= b``
    follows ``sum (floor(a / d) (d - r) + max(0, a mod d - r)) n <= floor(b / d) (d - r)`` where ``r = b mod d``.

    Raises:
        Unproven: a reference is no choice.
    """
    if len(references) != len(needs) or any(r >= len(need) for r, need in zip(references, needs, strict=True)):
        raise Unproven("a limit is rounded by references that are not there")
    base = [need[reference] for need, reference in zip(needs, references, strict=True)]
    left = limit - sum(group.num_layers * low for group, low in zip(chain.groups, base, strict=True))
    times, rest = divmod(left, divisor)
    strong = [
        [(n - low) // divisor * (divisor - rest) + max(0, (n - low) % divisor - rest) for n in need]
        for need, low in zip(needs, base, strict=True)
    ]
    return strong, times * (divisor - rest)


def row_of(chain: Chain, limits: Limits, price: Price, box: Box, kept: Sequence[Sequence[int]]) -> tuple[Needs, int]:
    """What each layer under each choice adds to what has a *price*, and what is left for the layers."""
    sums: Mapping[str, tuple[str, int | None]] = {
        "harm": ("harm", None if limits.harm is None else limits.harm - chain.harm_beyond),
        "host": ("host_bytes", limits.host_bytes),
        "device time": ("device_picoseconds", _layer_picoseconds(chain, limits, chain.device_picoseconds)),
        "host time": ("host_picoseconds", _layer_picoseconds(chain, limits, chain.host_picoseconds)),
    }
    if price.row in sums:
        name, limit = sums[price.row]
        if limit is None:
            raise Unproven(f"{price.row} has a price, and no limit")
        return [[getattr(choice, name) for choice in group.choices] for group in chain.groups], limit
    room = limits.memory_bytes - chain.fixed_bytes
    if price.row in ("forward", "backward"):
        return _moment(chain, price, room, box, kept)
    needs = [[_after_forward(choice) for choice in group.choices] for group in chain.groups]
    if price.row == "head":
        return needs, room - chain.head_high_bytes
    for need, group in zip(needs, chain.groups, strict=True):
        for index, choice in enumerate(group.choices):
            need[index] += choice.backward_change_bytes
    return needs, room - chain.head_change_bytes - chain.update_high_bytes


def _layer_picoseconds(chain: Chain, limits: Limits, outside: int) -> int | None:
    """What all layers of one micro-batch may take."""
    if limits.step_picoseconds is None:
        return None
    return (limits.step_picoseconds - chain.update_picoseconds) // chain.gradient_accumulation_steps - outside


def _after_forward(choice: Choice) -> int:
    return choice.resident_bytes + choice.forward_change_bytes + choice.release_bytes


def _moment(chain: Chain, price: Price, room: int, box: Box, kept: Sequence[Sequence[int]]) -> tuple[Needs, int]:
    """The worst moment of one layer's pass: of the first that a group's pass comes to, or of one that is certain.

    Whichever layer of several comes first, it raises the level by what the least of those that may be there does.
    """
    group = _priced_group(chain, price, box, kept)
    number, forward = price.group, price.row == "forward"
    assert number is not None
    needs: Needs = []
    for index, other in enumerate(chain.groups):
        done = index < number if forward else index > number
        starts = [choice.resident_bytes if forward else _after_forward(choice) for choice in other.choices]
        needs.append([s + done * _pass(c, forward)[1] for s, c in zip(starts, other.choices, strict=True)])
    room -= 0 if forward else chain.head_change_bytes
    if price.choice is None and group.num_layers == 1:
        needs[number] = [n + _pass(c, forward)[0] for n, c in zip(needs[number], group.choices, strict=True)]
        return needs, room
    if price.choice is None:
        may_be = [i for i in kept[number] if box.get((number, i), (0, group.num_layers))[1] >= 1]
        return needs, room - min((_pass(group.choices[i], forward)[0] for i in may_be), default=0)
    for index in kept[number]:
        first, second = (price.choice, index) if forward else (index, price.choice)
        if comes_before(group.choices, first, second):
            needs[number][index] += _pass(group.choices[index], forward)[1]
    high, change = _pass(group.choices[price.choice], forward)
    needs[number][price.choice] += max(0, change)  # the worst moment is that of the last of them
    return needs, room - high + max(0, change)


def _pass(choice: Choice, forward: bool) -> tuple[int, int]:
    """The height and the change of a layer's forward or backward pass."""
    if forward:
        return choice.forward_high_bytes, choice.forward_change_bytes
    return choice.backward_high_bytes, choice.backward_change_bytes


def _priced_group(chain: Chain, price: Price, box: Box, kept: Sequence[Sequence[int]]) -> Group:
    """The group whose pass has a *price*; Unproven where there is no such moment."""
    if price.group is None or not price.group < len(chain.groups):
        raise Unproven(f"a {price.row} pass has a price, and no group")
    if price.choice is not None and price.choice not in kept[price.group]:
        raise Unproven(f"choice {price.choice} of group {price.group} is dominated or not there")
    if price.choice is not None and box.get((price.group, price.choice), (0, 0))[0] < 1:
        raise Unproven(f"choice {price.choice} of group {price.group} need not be made")
    return chain.groups[price.group]


def comes_before(choices: Sequence[Choice], one: int, other: int) -> bool:
    """Whether a group's backward pass, in its best order, comes to *one* before it comes to *other*.

    The lowest peak of jobs that raise and lower one level has those that lower it first, by ascending height, and
    then the others, by descending height over what they leave (Abdel-Wahab and Kameda, 1978). The forward pass comes
    to them the other way round.
    """
    a, b = choices[one], choices[other]
    if (a.backward_change_bytes <= 0) != (b.backward_change_bytes <= 0):
        return a.backward_change_bytes <= 0
    if a.backward_change_bytes <= 0:
        return (a.backward_high_bytes, one) < (b.backward_high_bytes, other)
    left = b.backward_high_bytes - b.backward_change_bytes, a.backward_high_bytes - a.backward_change_bytes
    return left[0] < left[1] or (left[0] == left[1] and one < other)
