"""Where to cut one cell's layers into stages, and each layer's strategy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from . import schedule
from .arrangement import arranged
from .branch import BranchAndBound
from .chain import Chain, Limits, Taken
from .cuts import FAR, Cut
from .neighbours import Chosen
from .problem import SECOND
from .staged import Staging
from .staged_bound import Bounds
from .staged_cell import EXCHANGES
from .strategies import Strategy

MOST_ROUNDS = 24
"""Cuts of one cell that are looked into."""
FEW_NODES, MANY_NODES = 60, 240
"""Parts that a stage's search goes through, and that of the slowest."""
NODES_AT_ONCE = 30
NEGLIGIBLE = 5e-3
"""Of a score: nothing that promises to be better by less is looked for, and the gap that is told has it in."""

Stretch = tuple[int, int, int, int]
"""A stage, its first layer, the one after its last, and its memory."""


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage: its layers' strategies in order, and what a micro-batch of it takes."""

    strategies: tuple[Strategy, ...]
    taken: Taken

    @property
    def penalty_picoseconds(self) -> int:
        """What its coarser weights are held to be worth."""
        return self.taken.score_picoseconds - self.taken.step_picoseconds


@dataclass(frozen=True, slots=True)
class StagedChoice:
    """A cell with every stage chosen; *starts* are the places where they begin."""

    staging: Staging
    starts: tuple[int, ...]
    stages: tuple[StageChoice, ...]

    @property
    def busy_picoseconds(self) -> list[int]:
        """Of each stage in one micro-batch, with its messages."""
        return [stage.taken.step_picoseconds for stage in self.stages]

    @property
    def step_picoseconds(self) -> int:
        """One step under 1F1B, with the longest update."""
        staging = self.staging
        passes = schedule.step_picoseconds(self.busy_picoseconds, staging.num_micro_batches, staging.num_parts)
        return passes + self.update_picoseconds

    @property
    def update_picoseconds(self) -> int:
        """Of the stage with the most layers."""
        return self.staging.update_picoseconds * max(len(stage.strategies) for stage in self.stages)

    @property
    def waiting_picoseconds(self) -> int:
        """What of a step the slowest stage does not compute in."""
        computing = max(self.busy_picoseconds) - EXCHANGES * self.staging.num_parts * self.staging.message_picoseconds
        return self.step_picoseconds - self.staging.num_micro_batches * computing - self.update_picoseconds

    @property
    def score_picoseconds(self) -> int:
        """The step, and what its coarser weights are held to be worth."""
        return self.step_picoseconds + sum(stage.penalty_picoseconds for stage in self.stages)

    @property
    def harm(self) -> int:
        """What all layers lose."""
        return sum(stage.taken.harm for stage in self.stages)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Of all layers."""
        placed = (strategy for stage in self.stages for strategy in stage.strategies)
        return tuple(strategy for _, strategy in sorted(zip(self.staging.order(), placed, strict=True), key=_layer))


def bounds_of(staging: Staging, host_bytes: int | None) -> Bounds:
    """What stretches of layers take at least as stages of *staging*."""
    return Bounds(staging.told(0), staging.layers(), host_bytes)


def worthwhile(score: int) -> int:
    """What is less than this is better than a *score* by enough to look for it."""
    return score if score >= FAR else int(score * (1 - NEGLIGIBLE))


@dataclass(slots=True)
class Cutting:
    """The search in one cell.

    A cut is taken where it promises most, by what was found of stretches that were searched, and by what others take at
    least; its stages are searched, and so on until one promises most whose stages all were.

    Attributes:
        limits: of the host's memory for each stage, of the step, and of what all layers lose; of the last two every
            stage keeps its share.
        memory_bytes: of each stage; may be made less between two searches.
    """

    staging: Staging
    bounds: Bounds
    limits: Limits
    memory_bytes: list[int]
    found: dict[Stretch, StageChoice | None] = field(default_factory=dict)
    _refined: set[Stretch] = field(default_factory=set)

    def best(self, better_than: int = FAR) -> StagedChoice | None:
        """The best found that scores less than *better_than*."""
        best: StagedChoice | None = None
        for _ in range(MOST_ROUNDS):
            cut = self._most_promising()
            least = better_than if best is None else min(better_than, best.score_picoseconds)
            if cut is None or cut.total >= worthwhile(least):
                break
            stretches = self._stretches(cut.starts)
            new = [stretch for stretch in stretches if stretch not in self.found]
            for stretch in new:
                self.found[stretch] = self._searched(stretch, FEW_NODES)
            if any(self.found[stretch] is None for stretch in new):
                continue
            made = tuple(one for stretch in stretches if (one := self.found[stretch]) is not None)
            chosen = StagedChoice(self.staging, cut.starts, made)
            if chosen.score_picoseconds < least:
                best = chosen
            if not new and not self._refine(stretches):
                break
        return None if best is None else self._finer(best)

    def _stretches(self, starts: Sequence[int]) -> list[Stretch]:
        spans = itertools.pairwise((*starts, self.staging.num_layers))
        return [(stage, a, b, self.memory_bytes[stage]) for stage, (a, b) in enumerate(spans)]

    def _most_promising(self) -> Cut | None:
        """The cut that takes least by what is known, and what."""
        stages, weight = range(self.staging.num_stages), self.staging.num_micro_batches
        once = np.array([self.bounds.once(stage, self.memory_bytes[stage]) for stage in stages])
        often = np.array([self.bounds.least(stage, self.memory_bytes[stage], weight) for stage in stages])
        for (stage, first, after, memory), made in self.found.items():
            if memory == self.memory_bytes[stage]:
                penalty = 0 if made is None else made.penalty_picoseconds
                busy = FAR if made is None else made.taken.step_picoseconds
                once[stage, first, after] = min(FAR, busy // self.staging.num_parts + penalty)
                often[stage, first, after] = min(FAR, weight * busy + penalty)
        return self.bounds.least_cut(once, often)

    def _refine(self, stretches: Sequence[Stretch]) -> bool:
        """Search the slowest of the *stretches* more thoroughly; whether that found something better."""
        slowest = max(stretches, key=self._busy)
        if slowest in self._refined:
            return False
        self._refined.add(slowest)
        made, before = self._searched(slowest, MANY_NODES), self._busy(slowest)
        if made is None or made.taken.step_picoseconds >= before:
            return False
        self.found[slowest] = made
        return True

    def _busy(self, stretch: Stretch) -> int:
        made = self.found[stretch]
        return FAR if made is None else made.taken.step_picoseconds

    def _searched(self, stretch: Stretch, most_nodes: int) -> StageChoice | None:
        """The best found of a stretch as if it were the slowest stage."""
        stage, first, after, _ = stretch
        weight, most = self.staging.num_micro_batches, self._most_busy()
        limits = self._share(stretch, None if most is None else most * weight)
        return searched(self.staging, stage, range(first, after), weight, limits, most_nodes)

    def _share(self, stretch: Stretch, step_picoseconds: int | None) -> Limits:
        """What a stretch may take, with so long for its own steps."""
        _, first, after, memory = stretch
        harm = None if self.limits.harm is None else self.limits.harm * (after - first) // self.staging.num_layers
        return replace(self.limits, memory_bytes=memory, harm=harm, step_picoseconds=step_picoseconds)

    def _most_busy(self) -> int | None:
        """How long a micro-batch of a stage may take, if all take as long; None where nothing limits it."""
        if self.limits.step_picoseconds is None:
            return None
        staging = self.staging
        update = staging.update_picoseconds * -(-staging.num_layers // staging.num_stages)
        passes, parts = max(0, self.limits.step_picoseconds - update), staging.num_parts
        return passes * parts // (staging.num_micro_batches * parts + staging.num_stages - 1)

    def _finer(self, chosen: StagedChoice) -> StagedChoice:
        """*chosen* with what takes less once in its stages that are not the slowest, and no longer than that one.

        Where weights were coarser for the sake of time, that may be.
        """
        found = list(chosen.stages)
        slowest = max(range(len(found)), key=lambda stage: found[stage].taken.step_picoseconds)
        most = found[slowest].taken.step_picoseconds
        for stretch in self._stretches(chosen.starts):
            stage, first, after, _ = stretch
            if stage != slowest and found[stage].penalty_picoseconds:
                limits = self._share(stretch, most)
                made = searched(self.staging, stage, range(first, after), 1, limits, FEW_NODES)
                if made is not None and self._once(made) < self._once(found[stage]):
                    found[stage] = made
        return replace(chosen, stages=tuple(found))

    def _once(self, made: StageChoice) -> int:
        """What a stage that is not the slowest adds to the score."""
        return made.taken.step_picoseconds // self.staging.num_parts + made.penalty_picoseconds


def _layer(placed: tuple[int, Strategy]) -> int:
    return placed[0]


def searched(
    staging: Staging, stage: int, places: range, weight: int, limits: Limits, most_nodes: int
) -> StageChoice | None:
    """The best found of one stage whose micro-batch counts *weight* times, with what it takes once.

    First with nothing sent to the host, which is found at once; then for what is better with it, whose limit has a
    search go through many parts before it meets anything within.
    """
    found: StageChoice | None = None
    least = float("inf")
    for choices in (_staying(staging), staging):
        if choices is None:
            continue
        best = _near_best(choices.chain(stage, places, weight), limits, least, most_nodes)
        if best is not None:
            least = seconds(best.taken.score_picoseconds)
            made = arranged(choices.chain(stage, places, 1), best.counts, limits)
            found = StageChoice(made.strategies, made.taken)
    return found


def _near_best(chain: Chain, limits: Limits, least: float, most_nodes: int) -> Chosen | None:
    """The best found that scores less than *least* by enough to look for it."""
    search = BranchAndBound(chain, limits)
    best: Chosen | None = None
    for nodes in range(NODES_AT_ONCE, most_nodes + 1, NODES_AT_ONCE):
        if search.bound_seconds >= least * (1 - NEGLIGIBLE):
            break
        found = search.search(least, nodes).best
        if found is not None:
            best, least = found, seconds(found.taken.score_picoseconds)
    return best


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
