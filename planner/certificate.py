"""A proof that no better choice exists, and its check, which shares nothing with the search.

The proof is a tree. Its branches split the ways to choose by how often one choice is made; each leaf has a price per
unit of every limited thing. Whatever is chosen within the leaf, its score is at least the sum, layer by layer, of the
cheapest choice's score and priced needs, less the priced limits (Lagrange's bound). All of it is whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from .bounds import Meta
from .chain import Chain, Choice, Group, Limits

SCALE = 2**20
"""Prices are in picoseconds per SCALE units, shares in parts of SCALE."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A part of the ways to choose.

    Attributes:
        split: (group, choice, most): the first child holds the ways with at most so many, the second the others.
        children: numbers of the two.
        device_share: of a micro-batch's time taken as the device's, the rest as the host's.
        infeasible: the prices alone show that nothing here is within the limits.
    """

    split: tuple[int, int, int] | None = None
    children: tuple[int, int] | None = None
    device_share: Whole = SCALE
    prices: tuple[Price, ...] = ()
    infeasible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The proof for one chain; the first node is the root.

    Attributes:
        dominated: for every group and choice, another choice that is no worse, or None.
    """

    nodes: tuple[Node, ...]
    dominated: tuple[tuple[int | None, ...], ...]


class Unproven(ValueError):
    """A certificate that does not hold: why."""


Box = dict[tuple[int, int], tuple[int, int]]
"""How often a group's choice is made, least and most, where that is bounded."""


def lower_bound(chain: Chain, limits: Limits, tree: Tree) -> int | None:
    """What every choice within *limits* scores at least, in picoseconds; None if the tree shows that there is none.

    Takes time in proportion to nodes x prices x choices.

    Raises:
        Unproven: the tree is none, names what the chain has not, or a leaf shows less than it says.
    """
    kept = _kept(chain, tree)
    bounds: list[int] = []
    for node, box in _leaves(chain, tree):
        least = _least(chain, limits, node, box, kept)
        if least is None:  # the box itself is empty
            continue
        if not node.infeasible:
            bounds.append(least)
        elif least <= 0:
            raise Unproven("a leaf that is said to be infeasible is not shown to be")
    return min(bounds, default=None)


def _kept(chain: Chain, tree: Tree) -> list[list[int]]:
    """For each group the choices that are not dominated, after a look at those that are."""
    if len(tree.dominated) != len(chain.groups):
        raise Unproven(f"{len(chain.groups)} groups have {len(tree.dominated)} lists of dominated choices")
    found: list[list[int]] = []
    for group, by in zip(chain.groups, tree.dominated, strict=True):
        if len(by) != len(group.choices):
            raise Unproven(f"{len(group.choices)} choices have {len(by)} entries on which dominates them")
        for index, better in enumerate(by):
            if better is None:
                continue
            if not 0 <= better < len(by) or by[better] is not None:
                raise Unproven(f"choice {index} is dominated by {better}, which is dominated itself or not there")
            if not _stands_in(group.choices[better], group.choices[index]):
                raise Unproven(f"choice {better} does not dominate choice {index}")
        found.append([index for index, better in enumerate(by) if better is None])
    return found


def _stands_in(better: Choice, worse: Choice) -> bool:
    """Whether replacing *worse* raises no moment of the step and no sum."""
    gains = [0]  # by how much the level falls, moment by moment
    gains.append(worse.resident_bytes - better.resident_bytes)
    gains.append(gains[1] + worse.forward_high_bytes - better.forward_high_bytes)
    gains.append(gains[1] + worse.forward_change_bytes - better.forward_change_bytes)
    gains.append(gains[3] + worse.release_bytes - better.release_bytes)
    gains.append(gains[4] + worse.backward_high_bytes - better.backward_high_bytes)
    gains.append(gains[4] + worse.backward_change_bytes - better.backward_change_bytes)
    sums = ("device_picoseconds", "host_picoseconds", "penalty_picoseconds", "harm", "host_bytes")
    return min(gains) >= 0 and all(getattr(better, name) <= getattr(worse, name) for name in sums)


def _leaves(chain: Chain, tree: Tree) -> Iterator[tuple[Node, Box]]:
    """Every leaf with its box; the boxes together hold every choice."""
    if not tree.nodes:
        raise Unproven("the tree has no nodes")
    open_nodes: list[tuple[int, Box]] = [(0, {})]
    while open_nodes:
        number, box = open_nodes.pop()
        node = tree.nodes[number]
        if node.split is None or node.children is None:
            yield node, box
            continue
        group, choice, most = node.split
        if not (0 <= group < len(chain.groups) and 0 <= choice < len(chain.groups[group].choices)):
            raise Unproven(f"node {number} splits by a choice that is not there")
        if not all(number < child < len(tree.nodes) for child in node.children):
            raise Unproven(f"node {number} has no such children")
        least, greatest = box.get((group, choice), (0, chain.groups[group].num_layers))
        open_nodes.append((node.children[0], {**box, (group, choice): (least, min(greatest, most))}))
        open_nodes.append((node.children[1], {**box, (group, choice): (max(least, most + 1), greatest)}))


def _least(chain: Chain, limits: Limits, node: Node, box: Box, kept: Sequence[Sequence[int]]) -> int | None:
    """The leaf's bound in picoseconds, rounded down; of an infeasible one the excess of needs over limits.

    None if the box is empty.
    """
    share = node.device_share
    if share > SCALE:
        raise Unproven(f"the device's share is {share} of {SCALE}")
    steps = 0 if node.infeasible else chain.gradient_accumulation_steps
    on_device, on_host = steps * share, steps * (SCALE - share)
    total = on_device * chain.device_picoseconds + on_host * chain.host_picoseconds
    total += 0 if node.infeasible else SCALE * (chain.update_picoseconds + chain.penalty_beyond_picoseconds)
    weights = [
        [
            (0 if node.infeasible else SCALE * choice.penalty_picoseconds)
            + on_device * choice.device_picoseconds
            + on_host * choice.host_picoseconds
            for choice in group.choices
        ]
        for group in chain.groups
    ]
    for price in node.prices:
        needs, limit = _row(chain, limits, price, box, kept)
        if price.divisor is not None:
            needs, limit = rounded_row(chain, needs, limit, price.divisor, price.references)
        total -= price.amount * limit
        for weight, need in zip(weights, needs, strict=True):
            for index, amount in enumerate(need):
                weight[index] += price.amount * amount
    for number, group in enumerate(chain.groups):
        cheapest = _cheapest(weights[number], group.num_layers, number, box, kept[number])
        if cheapest is None:
            return None
        total += cheapest
    return total // SCALE if not node.infeasible else total


def _cheapest(weights: Sequence[int], num_layers: int, group: int, box: Box, kept: Sequence[int]) -> int | None:
    """The least sum of *num_layers* weights, each choice as often as *box* allows; None if it allows no such number."""
    bounds = {index: box.get((group, index), (0, num_layers)) for index in kept}
    if any(least > most for least, most in bounds.values()):
        return None
    left = num_layers - sum(least for least, _ in bounds.values())
    if left < 0:
        return None
    total = sum(bounds[index][0] * weights[index] for index in kept)
    for index in sorted(kept, key=lambda i: weights[i]):
        more = min(left, bounds[index][1] - bounds[index][0])
        total += more * weights[index]
        left -= more
    return None if left else total


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


def _row(chain: Chain, limits: Limits, price: Price, box: Box, kept: Sequence[Sequence[int]]) -> tuple[Needs, int]:
    """What each layer under each choice adds to a limited thing, and what is left for the layers."""
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
        if _comes_before(group.choices, first, second):
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


def _comes_before(choices: Sequence[Choice], one: int, other: int) -> bool:
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
