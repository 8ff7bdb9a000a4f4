"""The best way in stages that keeps a deadline, or loses no more by coarse weights than it may.

The usual search knows of neither limit. Where its best does not keep one, each stage gets its share of it: as long for
a micro-batch as all stages may take alike, and what its layers may lose of all layers' harm. Where no cut does with
such shares, the fastest is looked for, or formats that every layer may have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from . import quality
from .chain import Choice
from .cuts import FAR
from .pipelined import StagedSearch, Traced
from .staged import Staging, harm_price, repriced
from .staged_price import usual_price

NUM_PRICES = 4
"""Of harm, at which the bound is looked at, from the usual one to the lowest or the highest."""
LOWEST = 1
"""Of a unit of harm, in picoseconds: nothing but time counts, and between equally fast ways still the finer one."""

Verdict = Literal["kept", "too long", "too coarse", "both", "nothing"]


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeps all limits.

    Attributes:
        by: the search that *found* it.
        score_picoseconds: by the usual price of harm.
        tables: all cells at that price, and, where a limit binds, at others, of which a bound may show more.
        num_traced, num_rejected: in all searches.
    """

    by: StagedSearch
    found: Traced
    score_picoseconds: int
    tables: tuple[list[Staging], ...]
    num_traced: int
    num_rejected: int


def best(search: StagedSearch, better_than: int = FAR) -> Kept | None:
    """The best found that keeps the limits of *search*'s problem and scores less than *better_than*."""
    found = search.best(better_than=better_than)
    if found is None:
        return None
    tries = _Tries(search)
    verdict = tries.note(search, found)
    if verdict != "kept" and tries.look(search.in_shares()) != "kept":
        tries.ends()
    score, by, found = min(tries.kept, key=lambda one: one[0], default=(FAR, search, found))
    if score >= better_than:
        return None
    num_traced, num_rejected = (sum(column) for column in zip(*tries.counts(), strict=True))
    tables = (search.made, *(repriced(search.made, price) for price in _prices(search, verdict)))
    return Kept(by, found, score, tables, num_traced, num_rejected)


def keeps(search: StagedSearch, found: Traced) -> bool:
    """Whether what was *found* keeps all limits."""
    return _verdict(search, found) == "kept"


def _verdict(search: StagedSearch, found: Traced) -> Verdict:
    """Which limits what was *found* does not keep; measured weight errors stand for those of the formats."""
    limits, weighed = search.problem.limits, search.problem.weighed
    is_long = limits.step_picoseconds is not None and found.chosen.step_picoseconds > limits.step_picoseconds
    if weighed:
        error = quality.mean_error(found.chosen.strategies, weighed)
        is_coarse = not quality.is_within(error, search.problem.workload.max_weight_error)
    else:
        is_coarse = limits.harm is not None and found.chosen.harm > limits.harm
    if is_long and is_coarse:
        return "both"
    return "too long" if is_long else "too coarse" if is_coarse else "kept"


def _prices(search: StagedSearch, verdict: Verdict) -> list[int]:
    """Of harm, beside the usual: lower where that one's best takes too long, higher where it is too coarse."""
    usual, end = harm_price(search.made), LOWEST
    if verdict == "kept" or not usual:
        return []
    if verdict != "too long":
        end = usual_price("quality", [(one.told(0), one.layers()) for one in search.made])
    steps = range(1, NUM_PRICES + 1)
    return [round(math.exp(math.log(usual) + math.log(end / usual) * step / NUM_PRICES)) for step in steps]


@dataclass(slots=True)
class _Tries:
    """What was tried after the *usual* search, and what of all was kept: score, search, and what that found."""

    usual: StagedSearch
    others: list[StagedSearch] = field(default_factory=list)
    kept: list[tuple[int, StagedSearch, Traced]] = field(default_factory=list)

    def note(self, search: StagedSearch, found: Traced | None) -> Verdict:
        """What is said of what a *search* found."""
        if found is None:
            return "nothing"
        verdict = _verdict(search, found)
        if verdict == "kept":
            price = harm_price(self.usual.made)
            self.kept.append((found.chosen.step_picoseconds + price * found.chosen.harm, search, found))
        return verdict

    def look(self, search: StagedSearch) -> Verdict:
        """What is said of the best of a *search*."""
        self.others.append(search)
        return self.note(search, search.best())

    def ends(self) -> None:
        """Look for the fastest, if need be among formats none of which is too coarse for any layer."""
        fastest = self.usual.at_price(LOWEST)
        if self.usual.problem.workload.max_weight_error is None:
            self.look(fastest)
        elif self.look(fastest.in_shares(of_step=False)) != "kept":
            self.fine()

    def fine(self) -> None:
        """Look among formats none of which is too coarse for any layer, and for the fastest if that is too slow."""
        weighed, most = self.usual.problem.weighed, self.usual.problem.workload.max_weight_error

        def is_fine(choice: Choice) -> bool:
            errors = (quality.weight_error(choice.strategy, own) for own in weighed or (None,))
            return all(quality.is_within(error, most) for error in errors)

        fine = self.usual.of_choices(is_fine)
        if fine is not None and self.look(fine) == "too long":
            self.look(fine.at_price(LOWEST))

    def counts(self) -> list[tuple[int, int]]:
        """How many each search traced, and how many of them did not fit."""
        return [(search.num_traced, search.num_rejected) for search in (self.usual, *self.others)]
