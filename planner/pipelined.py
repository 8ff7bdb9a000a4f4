"""The best way found to run a model cut into stages: where to cut it, and each layer's strategy.

Cells are gone through in the order of what they take at least. Each is cut where its bounds are least; then every stage
is searched exactly: the slowest for its time, which counts once for each micro-batch, the others for what costs no
time. Stages are traced whole; where one does not fit, its memory is cut by what was missed, and the cell cut again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from . import allowed, stage_bounds
from .arrangement import arranged
from .branch import BranchAndBound
from .cell_search import FEW_NODES
from .chain import Limits, Taken, taken_in_order
from .communication import Link
from .cuts import FAR, Cut, best_cut
from .memory_record import TracedPeak
from .problem import SECOND, Problem
from .staged import EXCHANGES, Staging, stagings
from .strategies import Cell, Configuration, Strategy

MOST_ROUNDS = 40
"""Times that one cell is cut again because a stage did not fit after all."""
LEAST_CUT_BYTES = 4 * 2**20
"""By how much a stage's memory is cut at least."""

Trace = Callable[[Configuration, int], TracedPeak]
"""A configuration's stage, traced whole."""


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage: its layers' strategies in order, and what a micro-batch of it takes."""

    strategies: tuple[Strategy, ...]
    taken: Taken


@dataclass(frozen=True, slots=True)
class StagedChoice:
    """A cell with every stage chosen."""

    staging: Staging
    starts: tuple[int, ...]
    stages: tuple[StageChoice, ...]

    @property
    def busy_picoseconds(self) -> list[int]:
        """Of each stage in one micro-batch, with its messages."""
        return [stage.taken.step_picoseconds for stage in self.stages]

    @property
    def step_picoseconds(self) -> int:
        """One step under 1F1B: the slowest stage once for each micro-batch, the others once, and the longest update."""
        busy = self.busy_picoseconds
        return sum(busy) + (self.staging.num_micro_batches - 1) * max(busy) + self.update_picoseconds

    @property
    def update_picoseconds(self) -> int:
        """Of the stage with the most layers."""
        return self.staging.update_picoseconds * max(len(stage.strategies) for stage in self.stages)

    @property
    def waiting_picoseconds(self) -> int:
        """What of a step the slowest stage does not compute in."""
        computing = max(self.busy_picoseconds) - EXCHANGES * self.staging.message_picoseconds
        return self.step_picoseconds - self.staging.num_micro_batches * computing - self.update_picoseconds

    @property
    def score_picoseconds(self) -> int:
        """The step, and what its coarser weights are held to be worth."""
        penalties = (stage.taken.score_picoseconds - stage.taken.step_picoseconds for stage in self.stages)
        return self.step_picoseconds + sum(penalties)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Of all layers."""
        return tuple(strategy for stage in self.stages for strategy in stage.strategies)


@dataclass(frozen=True, slots=True)
class Traced:
    """A choice whose stages fit when they are traced whole, and what each takes."""

    chosen: StagedChoice
    configuration: Configuration
    peaks: tuple[TracedPeak, ...]

    def short_of(self, budget: int) -> set[int]:
        """The stages that reserve more than *budget*."""
        return {stage for stage, peak in enumerate(self.peaks) if peak.peak_reserved_bytes > budget}

    def beyond(self) -> dict[int, int]:
        """What each stage reserves beyond what was composed of its layers."""
        pairs = zip(self.peaks, self.chosen.stages, strict=True)
        return {n: peak.peak_reserved_bytes - stage.taken.peak_bytes for n, (peak, stage) in enumerate(pairs)}


@dataclass(slots=True)
class StagedSearch:
    """All cells of a problem with the model cut into *num_stages*.

    Attributes:
        num_traced, num_rejected: configurations whose stages were traced, and those of them that did not fit.
    """

    problem: Problem
    trace: Trace
    made: list[Staging]
    num_traced: int = 0
    num_rejected: int = 0
    _bounds: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, problem: Problem, cells: Sequence[Cell], num_stages: int, width: int, link: Link, trace: Trace
    ) -> StagedSearch:
        """The search in *cells*, cut into stages between which vectors of *width* go over *link*."""
        return cls(problem, trace, stagings(problem, cells, num_stages, width, link))

    def best(self, memory_bytes: int | None = None, better_than: int = FAR) -> Traced | None:
        """The best found that scores less than *better_than*; with *memory_bytes* one that composes to no more."""
        budget = self.problem.budget_bytes if memory_bytes is None else memory_bytes
        found: Traced | None = None
        bounds = [self.bound(number, budget) for number in range(len(self.made))]
        for number in sorted(range(len(self.made)), key=bounds.__getitem__):
            least = better_than if found is None else min(better_than, found.chosen.score_picoseconds)
            if bounds[number] >= least:
                break
            found = self._in_cell(self.made[number], budget, least) or found
        if found is None and memory_bytes is None and better_than == FAR and self.made:
            lean = smallest(self)
            found = None if lean.short_of(budget) else lean
        return found

    def bound(self, number: int, budget: int) -> int:
        """What any cut of a cell scores at least; FAR where none fits."""
        if (number, budget) not in self._bounds:
            staging = self.made[number]
            found = cut_by_bounds(staging, [budget] * staging.num_stages, self.problem.host_bytes)
            self._bounds[number, budget] = FAR if found is None else found.total + least_update(staging)
        return self._bounds[number, budget]

    def _in_cell(self, staging: Staging, budget: int, better_than: int) -> Traced | None:
        """The best found in one cell whose stages fit when traced."""
        believed = [budget] * staging.num_stages  # by the bounds, which see one moment alone
        memory = list(believed)
        cuts = 0
        for _ in range(MOST_ROUNDS):
            cut = cut_by_bounds(staging, believed, self.problem.host_bytes)
            if cut is None or cut.total + least_update(staging) >= better_than:
                return None
            chosen = choose(staging, cut.starts, memory, self.problem.host_bytes)
            if isinstance(chosen, int):  # the stage in which nothing fits at every moment
                believed[chosen] = min(believed[chosen], memory[chosen]) - staging.leanest_layer_bytes(chosen) // 4
                continue
            if chosen.score_picoseconds >= better_than:
                return None
            traced = self.traced(chosen)
            short = traced.short_of(self.problem.budget_bytes)
            if not short:
                return traced
            for stage, beyond in traced.beyond().items():  # as much as a stage is fragmented by, it will be again
                less = LEAST_CUT_BYTES * (1 + cuts) if stage in short else 0
                memory[stage] = min(memory[stage], self.problem.budget_bytes - max(0, beyond) - less)
                believed[stage] = min(believed[stage], memory[stage])
            cuts += 1
        return None

    def traced(self, chosen: StagedChoice) -> Traced:
        """*chosen* with each of its stages traced whole."""
        configuration = configured(self.problem, chosen)
        found = Traced(
            chosen, configuration, tuple(self.trace(configuration, n) for n in range(configuration.num_stages))
        )
        self.num_traced += 1
        self.num_rejected += bool(found.short_of(self.problem.budget_bytes))
        return found


def configured(problem: Problem, chosen: StagedChoice) -> Configuration:
    """*chosen* as a run is given it."""
    return allowed.configured(problem.workload, chosen.staging.cell, chosen.strategies, chosen.starts)


def least_update(staging: Staging) -> int:
    """What an update takes at least: some stage has as many layers as the mean."""
    return staging.update_picoseconds * -(-staging.num_layers // staging.num_stages)


def cut_by_bounds(staging: Staging, memory_bytes: Sequence[int], host_bytes: int | None = None) -> Cut | None:
    """Where the bounds on what stages take are least together, and that sum.

    Whichever stage is the slowest counts once for each micro-batch, and every other at least once: the bound of a cut
    is the largest over which stage that might be.
    """
    once = stage_bounds.least(staging, memory_bytes, 1, host_bytes)
    often = stage_bounds.least(staging, memory_bytes, staging.num_micro_batches, host_bytes)
    rising = np.where(once < FAR, np.maximum(often - once, 0), FAR)
    return best_cut(rising[:, None], once[:, None])


def choose(
    staging: Staging, starts: Sequence[int], memory_bytes: Sequence[int], host_bytes: int | None
) -> StagedChoice | int:
    """The strategies of the layers of each stage that begins in *starts*; the number of a stage in which none fit.

    First each stage as if it were the slowest; then those that are not, for the least time and penalties once, so long
    as they stay no slower than it.
    """
    spans = [range(a, b) for a, b in itertools.pairwise((*starts, staging.num_layers))]
    found: list[StageChoice] = []
    for stage, layers in enumerate(spans):
        limits = Limits(memory_bytes=memory_bytes[stage], host_bytes=host_bytes)
        made = _searched(staging, stage, layers, staging.num_micro_batches, limits)
        if made is None:
            return stage
        found.append(made)
    slowest = max(range(len(found)), key=lambda stage: found[stage].taken.step_picoseconds)
    most = found[slowest].taken.step_picoseconds
    for stage, layers in enumerate(spans):
        limits = Limits(memory_bytes=memory_bytes[stage], host_bytes=host_bytes, step_picoseconds=most)
        if stage != slowest:
            found[stage] = _searched(staging, stage, layers, 1, limits) or found[stage]
    return StagedChoice(staging, tuple(starts), tuple(found))


def _searched(staging: Staging, stage: int, layers: range, weight: int, limits: Limits) -> StageChoice | None:
    """The best found of one stage whose micro-batch counts *weight* times, with what it takes once.

    First with nothing sent to the host, which is found at once; then for what is better with it, whose limit has a
    search go through many parts before it meets anything within.
    """
    found: StageChoice | None = None
    least = float("inf")
    for choices, most_nodes in ((_staying(staging), FEW_NODES), (staging, FEWER_NODES)):
        if choices is None:
            continue
        chain = choices.chain(stage, layers, weight)
        best = BranchAndBound(chain, limits).search(least, most_nodes).best
        if best is not None:
            least = seconds(best.taken.score_picoseconds)
            made = arranged(choices.chain(stage, layers, 1), best.counts, limits)
            found = StageChoice(made.strategies, made.taken)
    return found


FEWER_NODES = 12
"""Parts that a search with a limit on the host's memory goes through to find something better."""


def _staying(staging: Staging) -> Staging | None:
    """*staging* without choices that send anything to the host; None where none does, or nothing else is left."""
    groups = [replace(group, choices=tuple(c for c in group.choices if not c.host_bytes)) for group in staging.groups]
    kept = [len(group.choices) for group in groups]
    if not all(kept) or kept == [len(group.choices) for group in staging.groups]:
        return None
    return replace(staging, groups=tuple(groups))


def seconds(picoseconds: int) -> float:
    """As people count."""
    return picoseconds / SECOND


def smallest(search: StagedSearch) -> Traced:
    """What the stages take whose largest takes the least, each layer and cell as lean as may be."""
    best: tuple[int, Staging, Cut] | None = None
    for staging in (_within_host(staging, search.problem.host_bytes) for staging in search.made):
        low, high = 0, max(_all_in(staging, stage) for stage in range(staging.num_stages))
        while high - low > LEAST_CUT_BYTES:
            middle = (low + high) // 2
            low, high = (low, middle) if cut_by_bounds(staging, [middle] * staging.num_stages) else (middle, high)
        cut = cut_by_bounds(staging, [high] * staging.num_stages)
        if cut is not None and (best is None or high < best[0]):
            best = high, staging, cut
    assert best is not None
    _, staging, cut = best
    spans = [range(a, b) for a, b in itertools.pairwise((*cut.starts, staging.num_layers))]
    stages = tuple(_leanest(staging, stage, layers) for stage, layers in enumerate(spans))
    return search.traced(StagedChoice(staging, cut.starts, stages))


def _leanest(staging: Staging, stage: int, layers: range) -> StageChoice:
    """A *stage* each of whose layers holds as little as may be once all are through their forward pass."""
    chain = staging.chain(stage, layers, 1)
    chosen = [
        (min(group.choices, key=stage_bounds.after_forward), 1)
        for group in chain.groups
        for _ in range(group.num_layers)
    ]
    return StageChoice(tuple(choice.strategy for choice, _ in chosen), taken_in_order(chain, chosen))


def _all_in(staging: Staging, stage: int) -> int:
    """Enough for all layers in one *stage*."""
    return _leanest(staging, stage, range(staging.num_layers)).taken.peak_bytes


def _within_host(staging: Staging, host_bytes: int | None) -> Staging:
    """*staging* without choices that take more of the host than there is, should all layers of a stage make them."""
    if host_bytes is None:
        return staging
    most = host_bytes // (staging.in_flight(0) * -(-staging.num_layers // staging.num_stages))
    groups = [
        replace(group, choices=tuple(c for c in group.choices if c.host_bytes <= most)) for group in staging.groups
    ]
    return replace(staging, groups=tuple(groups)) if all(group.choices for group in groups) else staging
