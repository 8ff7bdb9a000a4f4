"""The ways to choose that a leaf's prices leave open below a score, gone through one by one in whole numbers.

A way that scores less and keeps every limit spends no more than that score is above the leaf's bound: on choices that
the prices make dear, and on leaving room that has a price. Choice by choice, only counts are followed that this and
the limits allow, whatever comes later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .needs import Needs, Unproven

MOST_PARTS = 3_000_000
"""Parts of ways that are followed for one plan, before its proof is held for none; a whole way counts as its layers."""

Limited = tuple[Needs, int]
"""What a layer needs under each choice of each group, and how much there is for all layers."""
Way = dict[tuple[int, int], int]
"""How often which group makes which choice."""


@dataclass(frozen=True, slots=True)
class Place:
    """A group: layers that are to be given a choice, and how often each choice may be made."""

    num_layers: int
    most: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A choice whose count comes next.

    Attributes:
        most: how often it may be made.
        starts: layers of its group, where it is the first of it; *ends*: whether it is the last.
        needs: what one layer takes of each limit.
        rest: what each layer takes at least that the group has left for later choices.
        later: what all later groups take at least.
    """

    group: int
    choice: int
    most: int
    starts: int | None
    ends: bool
    needs: tuple[int, ...]
    rest: tuple[int, ...]
    later: tuple[int, ...]

    def counts(self, left: int, room: Sequence[int]) -> range:
        """How often it may be made, with so many layers and so much room left, if what comes later takes the least."""
        least, most = left if self.ends else 0, min(left, self.most)
        for has, need, rest, later in zip(room, self.needs, self.rest, self.later, strict=True):
            spare, more = has - later - left * rest, need - rest
            if more > 0:
                most = min(most, spare // more)
            elif more < 0:
                least = max(least, -(spare // -more))
            elif spare < 0:
                return range(0)
        return range(least, most + 1)


class OpenWays:
    """Goes through open ways, and counts the parts of ways that it follows."""

    def __init__(self) -> None:
        self.followed = 0

    def within(
        self, dear: Limited, limited: Sequence[Limited], places: Sequence[Place], num_layers: int
    ) -> Iterator[Way]:
        """Every way to fill *places* that keeps all limits, of a model with *num_layers* in all.

        *dear* follows from the other limits; the less it leaves, the fewer parts of ways are followed.

        Raises:
            Unproven: they are too many.
        """
        found = _excess(dear, places)
        if found is None:
            return
        excess, slack = found
        stages = _stages([excess, *(needs for needs, _ in limited)], places, slack)
        parts: list[tuple[tuple[int, ...], int, list[int]]] = [((), 0, [slack, *(limit for _, limit in limited)])]
        while parts:
            counts, left, room = parts.pop()
            if len(counts) == len(stages):
                self._count(num_layers)
                yield {(stage.group, stage.choice): n for stage, n in zip(stages, counts, strict=True)}
                continue
            stage = stages[len(counts)]
            left = left if stage.starts is None else stage.starts
            able = stage.counts(left, room)
            self._count(len(able))
            for count in able:
                rest = [has - count * need for has, need in zip(room, stage.needs, strict=True)]
                parts.append(((*counts, count), left - count, rest))

    def _count(self, parts: int) -> None:
        self.followed += parts
        if self.followed > MOST_PARTS:
            raise Unproven(f"leaves leave more open than {MOST_PARTS} parts of ways")


def _excess(dear: Limited, places: Sequence[Place]) -> tuple[Needs, int] | None:
    """What each choice costs beyond its group's cheapest layers, and what is left for that; None if nothing is.

    Where the cheapest choices may not be made often enough, the dearest of those needed is what others are held to,
    and those that are cheaper are held to be made as often as they may.
    """
    costs, slack = dear
    found: Needs = []
    for place, weights in zip(places, costs, strict=True):
        marginal, unfilled = 0, place.num_layers
        for choice in sorted(place.most, key=lambda choice: weights[choice]):
            if unfilled > 0:
                marginal = weights[choice]
            unfilled -= place.most[choice]
        if place.num_layers < 0 or unfilled > 0:
            return None
        slack -= place.num_layers * marginal
        slack += sum(max(0, marginal - weights[choice]) * most for choice, most in place.most.items())
        found.append([max(0, weight - marginal) for weight in weights])
    return (found, slack) if slack >= 0 else None


def _stages(rows: Sequence[Needs], places: Sequence[Place], slack: int) -> list[_Stage]:
    """The choices that can be afforded, each group's dearest first, small groups first."""
    found: list[_Stage] = []
    later = (0,) * len(rows)
    for number in sorted(range(len(places)), key=lambda number: -places[number].num_layers):
        place, excess = places[number], rows[0][number]
        if not place.num_layers:
            continue
        able = sorted((c for c in place.most if excess[c] <= slack), key=lambda choice: excess[choice])
        rest: tuple[int, ...] | None = None
        for at, choice in enumerate(able):
            needs = tuple(row[number][choice] for row in rows)
            starts = place.num_layers if at == len(able) - 1 else None
            least = rest or needs
            found.append(_Stage(number, choice, place.most[choice], starts, at == 0, needs, least, later))
            rest = tuple(map(min, least, needs))
        assert rest is not None  # the marginal choice has no excess
        later = tuple(before + place.num_layers * least for before, least in zip(later, rest, strict=True))
    return found[::-1]
