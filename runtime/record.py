"""What a run was and did, as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from shallowflow.planner.strategies import Configuration

from .meter import MeasuredPeak

RUN_FORMAT_VERSION = 1

Outcome = Literal["completed", "stopped early", "interrupted", "out of budget", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer update.

    Attributes:
        loss: mean over the step's target tokens, before the update.
        gradient_norm: before clipping; infinite where fp16 overflowed.
        skipped: True if the update was not made because of such an overflow.
        num_target_tokens: tokens learned; padding and prompts do not count.
        memory_measured: True for the one step whose memory was measured, which makes it slower.
    """

    index: int
    loss: float
    gradient_norm: float
    loss_scale: float
    skipped: bool
    num_target_tokens: int
    seconds: float
    usd: float | None
    memory_measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation on the held-out text.

    Attributes:
        step: updates made before it.
        loss: mean over all its target tokens; perplexity is exp of it.
        tokens: target tokens.
    """

    step: int
    loss: float
    perplexity: float
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """What the model said to a prompt before and after training; None where the run did not come to it."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackRecord:
    """Memory that was not as predicted, and what the run went on with.

    Attributes:
        step: updates made before it; none of them was lost.
        went_on_at: updates that were kept, and not made again; fewer where memory ran out within an update.
        alternative: its number among the plan's.
        peak_reserved_bytes: the alternative's, predicted.
    """

    step: int
    went_on_at: int
    reason: str
    alternative: int
    configuration: Configuration
    peak_reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizeRecord:
    """Which kernel dequantizes nf4 weights on this GPU, and what each takes for the largest.

    Attributes:
        own_seconds: None where ours does not give what bitsandbytes' gives.
    """

    kernel: Literal["bitsandbytes", "own"]
    num_elements: int
    bitsandbytes_seconds: float
    own_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One quantity, predicted before the run and measured in it."""

    quantity: str
    unit: Literal["bytes", "seconds"]
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A whole run.

    Attributes:
        perplexity_before, perplexity_after: of the base and of the saved adapter on the held-out text; None without
            one.
        padding_share: of all token positions, those that hold nothing to learn.
        notes: where it was resumed, which checkpoints were not believed, what was skipped and why it failed.
        causes: what can be told of figures that are not as predicted.
        evaluations: all of them, in order.
        configuration: what the run ended under; another than the plan's after a fallback.
        evaluation_micro_batch_size, evaluation_peak_bytes: how evaluations were run, and the most that one was traced
            to have allocated.
        peaks: the measured memory of each process, in the order of ranks; comparisons have the highest.
        best_step: the updates behind the saved adapter, where it is the best of the evaluated ones.
        dequantizing: None where there was nothing to choose.
        usd: of all sessions, from their beginning to their end; of one that was killed up to half a minute too much.
        budget_usd: what it might be.
        projected_usd: what the whole run comes to, at the pace of this session; None where nothing tells.
        interruptions: times that the run was ended before its end, this one included; a session that learned nothing
            counts for none.
    """

    format_version: int
    model_name: str
    device: str
    outcome: Outcome
    started: str
    seconds: float
    usd: float | None
    comparisons: tuple[Comparison, ...]
    perplexity_before: float | None
    perplexity_after: float | None
    padding_share: float
    num_skipped: int
    steps: tuple[StepRecord, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    fallbacks: tuple[FallbackRecord, ...] = ()
    dequantizing: DequantizeRecord | None = None
    configuration: Configuration | None = None
    evaluation_micro_batch_size: int | None = None
    evaluation_peak_bytes: int | None = None
    best_step: int | None = None
    peaks: tuple[MeasuredPeak, ...] = ()
    budget_usd: float | None = None
    projected_usd: float | None = None
    interruptions: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Target tokens per second over the steps that time was taken of."""
        timed = timed_steps(self.steps)
        seconds = sum(step.seconds for step in timed)
        return sum(step.num_target_tokens for step in timed) / seconds if seconds else None

    def _repr_html_(self) -> str:
        """What a notebook shows: the outcome, and predicted beside measured."""
        from shallowflow.planner import notebook

        from .outcome import outcome

        return notebook.html(outcome(self))


def timed_steps(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """The steps whose time counts: not the first, which warms up, nor one that measures memory."""
    return [step for step in steps if step.index > 0 and not step.memory_measured]


def median_step_seconds(steps: Sequence[StepRecord]) -> float | None:
    """Median seconds per update, or None before any step counts."""
    timed = timed_steps(steps)
    return statistics.median(step.seconds for step in timed) if timed else None


def to_json(record: RunRecord) -> str:
    """*record* as indented JSON text with a final newline; a number that is not finite becomes null."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
