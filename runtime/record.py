"""What a run was and did, as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import msgspec

RUN_FORMAT_VERSION = 1


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
        perplexity_before, perplexity_after: on the held-out text; None without one.
        padding_share: of all token positions, those that hold nothing to learn.
        notes: where it was resumed, and which checkpoints were not believed.
    """

    format_version: int
    model_name: str
    device: str
    outcome: Literal["completed", "interrupted"]
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

    @property
    def tokens_per_second(self) -> float | None:
        """Target tokens per second over the steps that time was taken of."""
        timed = timed_steps(self.steps)
        seconds = sum(step.seconds for step in timed)
        return sum(step.num_target_tokens for step in timed) / seconds if seconds else None


def timed_steps(steps: tuple[StepRecord, ...] | list[StepRecord]) -> list[StepRecord]:
    """The steps whose time counts: not the first, which warms up, nor one that measures memory."""
    return [step for step in steps if step.index > 0 and not step.memory_measured]


def median_step_seconds(steps: tuple[StepRecord, ...] | list[StepRecord]) -> float | None:
    """Median seconds per update, or None before any step counts."""
    timed = timed_steps(steps)
    return statistics.median(step.seconds for step in timed) if timed else None


def to_json(record: RunRecord) -> str:
    """*record* as indented JSON text with a final newline; a number that is not finite becomes null."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
