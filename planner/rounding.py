"""Limits made stronger because counts are whole: mixed-integer rounding (Nemhauser and Wolsey, 1990)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from .chain import Chain, Choice, Limits
from .needs import Needs, Price, Row, rounded_row

TIMES: set[tuple[Row, int | None]] = {("device time", None), ("host time", None)}


@dataclass(frozen=True, slots=True)
class Rounded:
    """A limit after rounding.

    Attributes:
        price: what names it in a proof, its amount still to be told.
        needs, limit: by group and choice, in whole numbers.
        unit: the largest of the needs.
    """

    price: Price
    needs: Needs
    limit: int
    unit: float


def rounded_limits(
    chain: Chain,
    limits: Limits,
    prices: Collection[Price],
    references: tuple[int, ...],
    divided: Sequence[tuple[int, int]],
) -> Iterator[Rounded]:
    """What rounding makes of the limits that have *prices*, by every divisor that a *divided* count suggests.

    Args:
        references: of each group, the choice that needs are counted from.
        divided: groups and choices whose counts are not whole.
    """
    plain = {(p.row, p.group) for p in prices if p.divisor is None and p.choice is None}
    for row, group in sorted(plain - TIMES, key=str):
        if group is not None and chain.groups[group].num_layers > 1:
            continue  # its limit is another in every box
        needs, limit = _exact(chain, limits, row, group)
        for divisor in sorted({abs(needs[g][c] - needs[g][references[g]]) for g, c in divided} - {0}):
            price = Price(row=row, group=group, amount=0, divisor=divisor, references=references)
            strong, bound = rounded_row(chain, needs, limit, divisor, references)
            unit = float(max(1, *(abs(n) for need in strong for n in need)))
            yield Rounded(price, strong, bound, unit)


def _exact(chain: Chain, limits: Limits, row: Row, group: int | None) -> tuple[Needs, int]:
    """A limit's needs by group and choice, and the limit, in whole numbers."""
    room = limits.memory_bytes - chain.fixed_bytes
    if group is not None:
        return _exact_moment(chain, row, group), room - (chain.head_change_bytes if row == "backward" else 0)
    if row == "head":
        return _each(chain, _through), room - chain.head_high_bytes
    if row == "update":
        needs = _each(chain, lambda choice: _through(choice) + choice.backward_change_bytes)
        return needs, room - chain.head_change_bytes - chain.update_high_bytes
    if row == "harm":
        assert limits.harm is not None
        return _each(chain, lambda choice: choice.harm), limits.harm - chain.harm_beyond
    assert limits.host_bytes is not None
    return _each(chain, lambda choice: choice.host_bytes), limits.host_bytes


def _exact_moment(chain: Chain, row: Row, group: int) -> Needs:
    """The worst moment of a group's only layer, in bytes."""
    forward = row == "forward"
    needs = _each(chain, (lambda choice: choice.resident_bytes) if forward else _through)
    for number, (need, other) in enumerate(zip(needs, chain.groups, strict=True)):
        done = number < group if forward else number > group
        for index, choice in enumerate(other.choices):
            change = choice.forward_change_bytes if forward else choice.backward_change_bytes
            high = choice.forward_high_bytes if forward else choice.backward_high_bytes
            need[index] += change * done + high * (number == group)
    return needs


def _each(chain: Chain, need: Callable[[Choice], int]) -> Needs:
    return [[need(choice) for choice in group.choices] for group in chain.groups]


def _through(choice: Choice) -> int:
    return choice.resident_bytes + choice.forward_change_bytes + choice.release_bytes
