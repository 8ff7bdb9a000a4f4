"""The best way found to run a model cut into stages: where to cut it, and each layer's strategy.

Cells are gone through in the order of what they take at least. The stages of the best cut are traced whole; where one
does not fit, its memory is cut by what was missed, and the cell cut again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from . import allowed
from .chain import Choice, Limits, taken_in_order
from .cuts import FAR, Cut
from .cutting import Cutting, StageChoice, StagedChoice, bounds_of, worthwhile
from .memory_record import TracedPeak
from .problem import Problem
from .staged import Staging, repriced
from .staged_bound import Bounds, after_forward, at_a_glance
from .strategies import Configuration

MOST_CELLS = 3
"""That are searched, those of the least bounds first; the gap that is told is to the least of all."""
MOST_TRACED = 24
"""Times that one cell is cut again because a stage did not fit when it was traced whole."""
LEAST_CUT_BYTES = 4 * 2**20
"""By how much a stage's memory is cut at least."""

Shares = Literal["none", "harm", "all"]
Trace = Callable[[Configuration, int], TracedPeak]
"""A configuration's stage, traced whole."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A choice whose stages fit when they are traced whole, and what each takes."""

    chosen: StagedChoice
    configuration: Configuration
    peaks: tuple[TracedPeak, ...]

    def fits(self, budget: int) -> bool:
        """Whether no stage reserves more than *budget*."""
        return all(peak.peak_reserved_bytes <= budget for peak in self.peaks)


@dataclass(slots=True)
class Fragments:
    """What was seen of stages of one cell beyond what was composed of their layers.

    Attributes:
        beyond: bytes, the most of each stage that was traced; as much is taken of others as of the worst of these.
        num_short: how often a stage did not fit.
    """

    beyond: dict[int, int] = field(default_factory=dict)
    num_short: dict[int, int] = field(default_factory=dict)

    def note(self, stage: int, beyond: int, *, is_short: bool) -> None:
        """A *stage* was traced."""
        self.beyond[stage] = max(beyond, self.beyond.get(stage, 0))
        if is_short:
            self.num_short[stage] = self.num_short.get(stage, 0) + 1

    def room(self, stage: int, budget: int) -> int:
        """What may be composed to for a *stage*: as much as it was fragmented by, it will be again."""
        worst = max(self.beyond.values(), default=0)
        return budget - self.beyond.get(stage, worst) - self.num_short.get(stage, 0) * LEAST_CUT_BYTES


@dataclass(frozen=True, slots=True)
class Memory:
    """Where what searches found is kept, by the text of all that it follows from."""

    recall: Callable[[str], tuple[int, ...] | None]
    keep: Callable[[str, tuple[int, ...]], None]


@dataclass(slots=True)
class StagedSearch:
    """All cells of a problem with the model cut into *num_stages*.

    Attributes:
        memory: what was found before.
        shares: of which limits each stage must keep its own: of harm, or of the step's time, too.
        num_traced, num_rejected: configurations whose stages were traced, and those of them that did not fit.
    """

    problem: Problem
    trace: Trace
    made: list[Staging]
    memory: Memory
    shares: Shares = "none"
    num_traced: int = 0
    num_rejected: int = 0
    _bounds: dict[int, Bounds] = field(default_factory=dict)
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def best(self, memory_bytes: int | None = None, better_than: int = FAR) -> Traced | None:
        """The best found that scores less than *better_than*; with *memory_bytes* one that composes to no more."""
        budget = self.problem.budget_bytes if memory_bytes is None else memory_bytes
        shared = self._shared()
        asked = repr((self.made, budget, self.problem.budget_bytes, self.problem.host_bytes, better_than, shared))
        known = self.memory.recall(asked)
        if known is not None:
            return self._again(known)
        found = self._searched(budget, better_than)
        if found is None and memory_bytes is None and better_than == FAR and self.made:
            lean = smallest(self)
            found = lean if lean.fits(budget) else None
        self.memory.keep(asked, self._told(found))
        return found

    def at_price(self, price: int) -> StagedSearch:
        """The same with *price* for a unit of harm, from the start."""
        return self._with(repriced(self.made, price))

    def of_choices(self, may: Callable[[Choice], bool]) -> StagedSearch | None:
        """The same with those choices alone that it *may* make; None where a layer is left without any."""
        made = [
            replace(one, groups=tuple(replace(g, choices=tuple(filter(may, g.choices))) for g in one.groups))
            for one in self.made
        ]
        able = all(group.choices for one in made for group in one.groups)
        return self._with(made) if able else None

    def in_shares(self, *, of_step: bool = True) -> StagedSearch:
        """The same with every stage within its share of what layers may lose, and *of_step*, from the start."""
        shares: Shares = "all" if of_step else "harm"
        return StagedSearch(self.problem, self.trace, self.made, self.memory, shares=shares)

    def _with(self, made: list[Staging]) -> StagedSearch:
        return StagedSearch(self.problem, self.trace, made, self.memory)

    def _shared(self) -> Limits:
        """The problem's limits, of which stages have shares."""
        limits = self.problem.limits
        if self.shares != "all":
            limits = replace(limits, step_picoseconds=None)
        return replace(limits, harm=None) if self.shares == "none" else limits

    def _searched(self, budget: int, better_than: int) -> Traced | None:
        found: Traced | None = None
        num_searched = 0
        for number, bound in self._in_order(budget):
            least = better_than if found is None else min(better_than, found.chosen.score_picoseconds)
            if bound >= worthwhile(least) or num_searched == MOST_CELLS:
                break
            if number is not None:
                found = self._in_cell(number, budget, least) or found
                num_searched += 1
        return found

    def _told(self, found: Traced | None) -> tuple[int, ...]:
        """What was found in numbers: how many were traced and did not fit, and the cell, starts and layers' choices."""
        counts = (self.num_traced, self.num_rejected)
        if found is None:
            return counts
        chosen = found.chosen
        number = next(n for n, one in enumerate(self.made) if one.cell == chosen.staging.cell)
        rows, strategies = self.made[number].layers(), chosen.strategies
        placed = ((rows[layer], strategies[layer]) for layer in chosen.staging.order())
        places = (next(n for n, choice in enumerate(row) if choice.strategy == own) for row, own in placed)
        return (*counts, number, *chosen.starts, *places)

    def _again(self, told: tuple[int, ...]) -> Traced | None:
        """What was found before, reckoned and traced anew."""
        found: Traced | None = None
        if len(told) > 2:
            staging = self.made[told[2]]
            starts, places = told[3 : 3 + staging.num_stages], told[3 + staging.num_stages :]
            spans = itertools.pairwise((*starts, staging.num_layers))
            stages = tuple(_placed(staging, stage, range(a, b), places[a:b]) for stage, (a, b) in enumerate(spans))
            found = self.traced(StagedChoice(staging, starts, stages))
        self.num_traced, self.num_rejected = told[:2]
        return found

    @property
    def may_fit(self) -> bool:
        """Whether a bound allows any cut of any cell."""
        return any(number is not None and bound < FAR for number, bound in self._in_order(self.problem.budget_bytes))

    @property
    def glance(self) -> int:
        """What any cut of any cell scores at least, whatever memory there is; FAR where there is none."""
        return next((bound for _, bound in self._in_order(self.problem.budget_bytes)), FAR)

    def _in_order(self, budget: int) -> Iterator[tuple[int | None, int]]:
        """Cells with their bounds, the least first; without a number what all that are left take at least."""
        left = [(at_a_glance(one.told(0), one.layers()), False, number) for number, one in enumerate(self.made)]
        heapq.heapify(left)
        while left:
            bound, is_exact, number = heapq.heappop(left)
            if is_exact:
                yield number, bound
                continue
            yield None, bound
            heapq.heappush(left, (self.bound(number, budget), True, number))

    def bound(self, number: int, budget: int) -> int:
        """What any cut of a cell scores at least; FAR where none fits."""
        if (number, budget) not in self._known:
            found = self._bounds_of(number).cut([budget] * self.made[number].num_stages)
            self._known[number, budget] = FAR if found is None else found.total
        return self._known[number, budget]

    def _bounds_of(self, number: int) -> Bounds:
        if number not in self._bounds:
            self._bounds[number] = bounds_of(self.made[number], self.problem.host_bytes)
        return self._bounds[number]

    def _in_cell(self, number: int, budget: int, better_than: int) -> Traced | None:
        """The best found in one cell whose stages fit when traced."""
        staging = self.made[number]
        cutting = Cutting(staging, self._bounds_of(number), self._shared(), [budget] * staging.num_stages)
        fragments = Fragments()
        for _ in range(MOST_TRACED):
            chosen = cutting.best(better_than)
            if chosen is None:
                return None
            traced = self._if_it_fits(chosen, fragments)
            if traced is not None:
                return traced
            for stage in range(staging.num_stages):
                cutting.memory_bytes[stage] = min(budget, fragments.room(stage, self.problem.budget_bytes))
        return None

    def _if_it_fits(self, chosen: StagedChoice, fragments: Fragments) -> Traced | None:
        """*chosen* traced, the tightest stage first, and none after one that does not fit."""
        configuration, budget = configured(self.problem, chosen), self.problem.budget_bytes
        composed = [stage.taken.peak_bytes for stage in chosen.stages]
        self.num_traced += 1
        peaks: dict[int, TracedPeak] = {}
        for stage in sorted(range(len(composed)), key=lambda n: -composed[n]):
            peaks[stage] = self.trace(configuration, stage)
            reserved = peaks[stage].peak_reserved_bytes
            fragments.note(stage, reserved - composed[stage], is_short=reserved > budget)
            if reserved > budget:
                self.num_rejected += 1
                return None
        return Traced(chosen, configuration, tuple(peak for _, peak in sorted(peaks.items())))

    def traced(self, chosen: StagedChoice) -> Traced:
        """*chosen* with each of its stages traced whole."""
        configuration = configured(self.problem, chosen)
        peaks = tuple(self.trace(configuration, stage) for stage in range(configuration.num_stages))
        found = Traced(chosen, configuration, peaks)
        self.num_traced += 1
        self.num_rejected += not found.fits(self.problem.budget_bytes)
        return found


def configured(problem: Problem, chosen: StagedChoice) -> Configuration:
    """*chosen* as a run is given it."""
    staging, order = chosen.staging, chosen.staging.order()
    stages = tuple(order[place] for place in chosen.starts)
    return allowed.configured(problem.workload, staging.cell, chosen.strategies, stages, staging.num_parts)


def smallest(search: StagedSearch) -> Traced:
    """What the stages take whose largest takes the least, each layer and cell as lean as may be."""
    best: tuple[int, Staging, Cut] | None = None
    for staging in (_within_host(staging, search.problem.host_bytes) for staging in search.made):
        low, high = 0, max(_all_in(staging, stage) for stage in range(staging.num_stages))
        bounds = bounds_of(staging, None)
        while high - low > LEAST_CUT_BYTES:
            middle = (low + high) // 2
            low, high = (low, middle) if bounds.cut([middle] * staging.num_stages) else (middle, high)
        cut = bounds.cut([high] * staging.num_stages)
        if cut is not None and (best is None or high < best[0]):
            best = high, staging, cut
    assert best is not None
    _, staging, cut = best
    spans = [range(a, b) for a, b in itertools.pairwise((*cut.starts, staging.num_layers))]
    stages = tuple(_leanest(staging, stage, layers) for stage, layers in enumerate(spans))
    return search.traced(StagedChoice(staging, cut.starts, stages))


def _placed(staging: Staging, stage: int, places: range, numbers: Sequence[int]) -> StageChoice:
    """A *stage* each of whose layers has its choice by its number."""
    chain = staging.chain(stage, places, 1)
    rows = (group.choices for group in chain.groups for _ in range(group.num_layers))
    chosen = [(row[number], 1) for row, number in zip(rows, numbers, strict=True)]
    return StageChoice(tuple(choice.strategy for choice, _ in chosen), taken_in_order(chain, chosen))


def _leanest(staging: Staging, stage: int, places: range) -> StageChoice:
    """A *stage* each of whose layers holds as little as may be once all are through their forward pass."""
    chain = staging.chain(stage, places, 1)
    chosen = [(min(group.choices, key=after_forward), 1) for group in chain.groups for _ in range(group.num_layers)]
    return StageChoice(tuple(choice.strategy for choice, _ in chosen), taken_in_order(chain, chosen))


def _all_in(staging: Staging, stage: int) -> int:
    """Enough for all layers in one *stage*."""
    return _leanest(staging, stage, range(staging.num_layers)).taken.peak_bytes


def _within_host(staging: Staging, host_bytes: int | None) -> Staging:
    """*staging* without choices that take more of the host than there is, should all layers of a stage make them."""
    if host_bytes is None:
        return staging
    most = host_bytes // (max(staging.told(0).most_in_flight(0)) * -(-staging.num_layers // staging.num_stages))
    groups = [
        replace(group, choices=tuple(c for c in group.choices if c.host_bytes <= most)) for group in staging.groups
    ]
    return replace(staging, groups=tuple(groups)) if all(group.choices for group in groups) else staging
