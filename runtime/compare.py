"""Predicted beside measured, and what can be told of the cause where they differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from shallowflow.planner import words
from shallowflow.planner.plan import Plan, Prediction
from shallowflow.planner.wall_time import NUM_EVALUATIONS
from shallowflow.profiles import load_gpu

from .meter import MeasuredPeak
from .record import Comparison, EvaluationRecord, StepRecord, median_step_seconds, timed_steps

MEMORY_TOLERANCE = 0.01
"""Of a peak that was predicted; steps recorded on a T4 are within 0.3 %, on a CPU within 0.01 %."""
CHANGED_PACE = 1.05
"""The second half of the steps over the first, or the other way round, from where on the pace has changed."""
LEAST_HALF = 2
"""Timed steps in each half: fewer tell nothing of a pace."""
EVALUATION_SHARE = 0.1
"""Of the time on the wall, from where on evaluations are worth a word."""
FIRST_STEPS, MOST_SKIPPED = 20, 5
"""So many skipped updates among the first are more than a loss scale needs to settle."""


def comparisons(
    prediction: Prediction, peak: MeasuredPeak | None, steps: Sequence[StepRecord], *, on_cpu: bool
) -> tuple[Comparison, ...]:
    """Memory of the measured step, and the median of the timed steps, beside *prediction*."""
    found: list[Comparison] = []
    if peak is not None:
        rows = [
            ("resident between steps", prediction.resident_bytes, peak.resident_bytes),
            ("peak allocated", prediction.peak_allocated_bytes, peak.peak_allocated_bytes),
        ]
        if not on_cpu:
            rows.append(("peak reserved", prediction.peak_reserved_bytes, peak.peak_reserved_bytes))
        found += [Comparison(quantity=q, unit="bytes", predicted=p, measured=m) for q, p, m in rows]
    seconds = median_step_seconds(steps)
    if seconds is not None:
        found.append(Comparison(quantity="step", unit="seconds", predicted=prediction.step_seconds, measured=seconds))
    return tuple(found)


def causes(
    plan: Plan,
    prediction: Prediction,
    peak: MeasuredPeak | None,
    steps: Sequence[StepRecord],
    evaluations: Sequence[EvaluationRecord],
    seconds: float,
    padding_share: float,
) -> list[str]:
    """What can be told of each difference beyond its tolerance, one line each."""
    found = [] if peak is None else _memory(prediction, peak)
    found += _pace(prediction, steps, load_gpu(plan.gpu).step_error)
    evaluating = sum(record.seconds for record in evaluations)
    if len(evaluations) > NUM_EVALUATIONS and evaluating > EVALUATION_SHARE * seconds:
        found.append(
            f"{len(evaluations)} evaluations took {words.duration(evaluating)}, {evaluating / seconds:.0%} of the "
            f"time; the plan counted {NUM_EVALUATIONS}"
        )
    timed = timed_steps(steps)
    learned = sum(step.num_target_tokens for step in timed)
    expected = prediction.tokens_per_second * sum(step.seconds for step in timed)
    planned = plan.workload.padding_share(packing=plan.configuration.packing)
    more_padding = padding_share - planned > CHANGED_PACE - 1
    if learned and expected / learned - 1 > load_gpu(plan.gpu).step_error and more_padding:
        found.append(
            f"{learned / expected:.2f} of the predicted tokens are learned in a second: {padding_share:.0%} of the "
            f"positions are padding, the plan counted {planned:.0%}"
        )
    return found


def skipped_notes(steps: Sequence[StepRecord]) -> list[str]:
    """How many updates the loss scale lost, and whether those are more than it needs to settle."""
    skipped = [step.index for step in steps if step.skipped]
    if not skipped:
        return []
    found = [
        f"{words.counted(len(skipped), 'update')} skipped by the loss scale, which ends at {steps[-1].loss_scale:g}"
    ]
    early = sum(index < FIRST_STEPS for index in skipped)
    if early > MOST_SKIPPED:
        found.append(
            f"{early} of the first {FIRST_STEPS} updates overflowed fp16: this model or learning rate wants bf16"
        )
    return found


def _memory(prediction: Prediction, peak: MeasuredPeak) -> list[str]:
    """Whether what stays or what a step adds is not as predicted."""
    found = []
    over = peak.peak_allocated_bytes - prediction.peak_allocated_bytes
    if abs(over) > MEMORY_TOLERANCE * prediction.peak_allocated_bytes:
        resident = peak.resident_bytes - prediction.resident_bytes
        found.append(
            f"peak allocated is {_mib(over)} from the prediction: {_mib(resident)} resident between steps, "
            f"{_mib(over - resident)} in the step"
        )
    held = peak.peak_reserved_bytes - prediction.peak_reserved_bytes
    if held > over and held - over > MEMORY_TOLERANCE * prediction.peak_reserved_bytes:
        found.append(f"the allocator holds {_mib(held - over)} more than predicted beyond live tensors: fragmentation")
    return found


def _pace(prediction: Prediction, steps: Sequence[StepRecord], tolerance: float) -> list[str]:
    """Whether steps took another time than predicted, and whether they did so from the start."""
    timed = [step.seconds for step in timed_steps(steps)]
    half = len(timed) // 2
    if half < LEAST_HALF:
        return []
    share = statistics.median(timed) / prediction.step_seconds
    if max(share, 1 / share) <= 1 + tolerance:
        return []
    line = f"steps took {share:.2f} of the predicted time"
    pace = statistics.median(timed[-half:]) / statistics.median(timed[:half])
    if pace > CHANGED_PACE:
        return [f"{line}; the second half {pace:.2f} of the first half's: throttling, or other work on the machine"]
    if pace < 1 / CHANGED_PACE:
        return [f"{line}; the second half {pace:.2f} of the first half's: other work on the machine at first"]
    return [f"{line}, in both halves alike: this device's rates are others than the plan's; sfplan calibrate fits them"]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:+,.1f} MiB"
