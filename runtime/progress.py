"""What a run has come to so far, and which of its evaluations is the best."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import checkpoint
from .meter import MeasuredPeak
from .record import DequantizeRecord, EvaluationRecord, FallbackRecord, Outcome, StepRecord
from .step import Trainee

LEAST_IMPROVEMENT = 1e-3
"""Of the best loss, by which another must be lower to count as better."""


@dataclass(slots=True)
class Progress:
    """What a run has come to, all sessions together.

    Attributes:
        before: answers to the prompts before training.
        best: what was learned by the best evaluation, on the CPU; None where none is kept.
        alternative: the plan's alternative that is run; None for the plan's own configuration.
        plan: the digest of the plan that is run, in whose alternatives *alternative* is a number.
        moved_at: updates made under a plan for another number of GPUs.
        saved, saved_at, saving_seconds: how many updates, evaluations and fallbacks the newest checkpoint holds,
            when it was written, and how long that took.
        peak, peaks: measured, the highest and each process's.
        clock: when this session began.
        failure: why the run cannot go on.
        lost: whether that is another process's end.
        interruptions: times that the run was ended before its end and gone on with.
        total: updates to make.
    """

    started: str
    plan: str = ""
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    fallbacks: list[FallbackRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    best_step: int | None = None
    best: dict[str, torch.Tensor] | None = None
    alternative: int | None = None
    moved_at: int = 0
    peak: MeasuredPeak | None = None
    peaks: list[MeasuredPeak] = field(default_factory=list)
    dequantizing: DequantizeRecord | None = None
    outcome: Outcome = "completed"
    failure: str | None = None
    lost: bool = False
    interruptions: int = 0
    total: int = 0
    clock: float = field(default_factory=time.perf_counter)
    earlier_seconds: float = 0.0
    saved: tuple[int, int, int] = (0, 0, 0)
    saved_at: float = 0.0
    saving_seconds: float = 0.0

    def seconds(self) -> float:
        """On the wall so far, all sessions together."""
        return self.earlier_seconds + time.perf_counter() - self.clock

    @property
    def began_at(self) -> int:
        """Updates made before the present configuration."""
        return max(self.moved_at, self.fallbacks[-1].went_on_at if self.fallbacks else 0)

    @property
    def mark(self) -> tuple[int, int, int]:
        """What a checkpoint would hold."""
        return len(self.steps), len(self.evaluations), len(self.fallbacks)

    def state(self, trainee: Trainee) -> checkpoint.State:
        """All of it that a checkpoint keeps."""
        scale = trainee.loss_scale
        return checkpoint.State(
            steps=tuple(self.steps),
            started=self.started,
            seconds=self.seconds(),
            loss_scale=scale.value,
            num_skipped=scale.num_skipped,
            num_calm=scale.num_calm,
            evaluations=tuple(self.evaluations),
            before=tuple(self.before),
            fallbacks=tuple(self.fallbacks),
            alternative=self.alternative,
            best_step=self.best_step,
            moved_at=self.moved_at,
            plan=self.plan,
            interruptions=self.interruptions,
            total=self.total,
        )

    def go_back_to(self, state: checkpoint.State) -> None:
        """Take over what a checkpoint holds; fallbacks since then stay."""
        self.steps, self.evaluations = list(state.steps), list(state.evaluations)
        self.before, self.best_step, self.best = list(state.before), state.best_step, None
        self.fallbacks = [*state.fallbacks, *self.fallbacks[len(state.fallbacks) :]]
        self.saved = len(state.steps), len(state.evaluations), len(state.fallbacks)

    def start_again(self) -> None:
        """Forget every update."""
        self.steps, self.evaluations, self.before = [], [], []
        self.best_step, self.best, self.saved = None, None, (0, 0, 0)


def improves(evaluations: Sequence[EvaluationRecord], best_step: int | None) -> bool:
    """Whether the last of *evaluations* is better than the one after *best_step* updates, or there was none to beat."""
    if best_step is None:
        return True
    best = next(record.loss for record in evaluations if record.step == best_step)
    return math.isnan(best) or evaluations[-1].loss < best * (1 - LEAST_IMPROVEMENT)


def exhausted(evaluations: Sequence[EvaluationRecord], best_step: int | None, patience: int | None) -> bool:
    """Whether *patience* evaluations have come after the best one."""
    if patience is None or best_step is None:
        return False
    return sum(record.step > best_step for record in evaluations) >= patience
