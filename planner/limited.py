"""The best way in stages that keeps a deadline, or loses no more by coarse weights than it may.

The search of a cut knows of neither limit. Where its best does not keep one, the price of harm is changed until it
does: lowered for faster layers, raised for finer ones, and brought as near to the usual as a few searches allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import quality
from .cuts import FAR
from .pipelined import StagedSearch, Traced
from .staged import harm_price

MOST_PRICES = 3
"""Between one at which a limit is kept and one at which it is not."""
LOWEST = 1000
"""The lowest price that is tried beside none is so many times less than the usual."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeps all limits.

    Attributes:
        searches: at every price of harm that was tried, the usual first.
        at: the number of the one that *found* it.
        score_picoseconds: by the usual price.
    """

    searches: tuple[StagedSearch, ...]
    at: int
    found: Traced
    score_picoseconds: int


def best(search: StagedSearch, better_than: int = FAR) -> Kept | None:
    """The best found that keeps the limits of *search*'s problem and scores less than *better_than*."""
    found = search.best(better_than=better_than)
    if found is None:
        return None
    if keeps(search, found):
        return Kept((search,), 0, found, found.chosen.score_picoseconds)
    usual, searches = harm_price(search.made), [search]
    kept: list[tuple[int, int, Traced]] = []
    for price in _prices(search, found, kept):
        searches.append(searches[-1].at_price(price))
        other = searches[-1].best()
        if other is not None and keeps(search, other):
            chosen = other.chosen
            kept.append((chosen.step_picoseconds + usual * chosen.harm, len(searches) - 1, other))
    if not kept:
        return None
    score, at, found = min(kept, key=lambda one: one[0])
    return Kept(tuple(searches), at, found, score) if score < better_than else None


def keeps(search: StagedSearch, found: Traced) -> bool:
    """Whether what was *found* keeps all limits, by measured weight errors, too."""
    limits, work = search.problem.limits, search.problem.workload
    error = quality.mean_error(found.chosen.strategies, search.problem.weighed)
    return (
        (limits.step_picoseconds is None or found.chosen.step_picoseconds <= limits.step_picoseconds)
        and (limits.harm is None or found.chosen.harm <= limits.harm)
        and quality.is_within(error, work.max_weight_error)
    )


def _prices(search: StagedSearch, found: Traced, kept: list[tuple[int, int, Traced]]) -> Iterator[int]:
    """Those to try after the usual, at which *found* does not keep the limits, by what was *kept* at the last."""
    step, usual = search.problem.limits.step_picoseconds, harm_price(search.made)
    too_long = step is not None and found.chosen.step_picoseconds > step
    worth = quality.WORTH[search.problem.workload.objective]
    end = 0 if too_long else int(usual * quality.WORTH["quality"] / worth)
    if end == usual:
        return
    yield end
    if not kept:
        return
    fails, does = usual, end
    for _ in range(MOST_PRICES):
        middle = math.isqrt(fails * max(does, fails // LOWEST))
        if middle in (fails, does):
            return
        before = len(kept)
        yield middle
        fails, does = (fails, middle) if len(kept) > before else (middle, does)
