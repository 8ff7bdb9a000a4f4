"""What is said of a run that did not go as predicted is what its numbers show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shallowflow.planner.plan import Plan
from shallowflow.profiles import load_gpu
from shallowflow.runtime.compare import FIRST_STEPS, MOST_SKIPPED, causes, skipped_notes
from shallowflow.runtime.meter import MeasuredPeak
from shallowflow.runtime.record import EvaluationRecord, StepRecord

MIB = 2**20


def step(index: int, seconds: float, *, skipped: bool = False, tokens: int = 30) -> StepRecord:
    """A step that took so long."""
    return StepRecord(
        index=index,
        loss=1.0,
        gradient_norm=1.0,
        loss_scale=64.0,
        skipped=skipped,
        num_target_tokens=tokens,
        seconds=seconds,
        usd=None,
        memory_measured=index == 1,
    )


@pytest.fixture
def plan(plans: dict[str, Plan]) -> Plan:
    """A plan of round numbers."""
    made = plans["fp16"]
    prediction = replace(
        made.prediction,
        resident_bytes=100 * MIB,
        peak_allocated_bytes=200 * MIB,
        peak_reserved_bytes=220 * MIB,
        step_seconds=1.0,
        tokens_per_second=30.0,
    )
    return replace(made, prediction=prediction)


def padding_planned(plan: Plan) -> float:
    """Of all positions."""
    return plan.workload.padding_share(packing=plan.configuration.packing)


def told(plan: Plan, *, mib: tuple[int, int, int] = (100, 200, 220), seconds: list[float] | None = None) -> list[str]:
    """What is said of a run with such a peak and such steps."""
    resident, allocated, reserved = (size * MIB for size in mib)
    peak = MeasuredPeak(resident_bytes=resident, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
    steps = [step(index, one) for index, one in enumerate(seconds or [])]
    return causes(plan, plan.prediction, peak, steps, [], 100.0, padding_planned(plan))


def test_as_predicted_nothing_is_said(plan: Plan) -> None:
    """Within the tolerances there is no cause to look for."""
    within = 1 + 0.9 * load_gpu("cpu").step_error

    assert told(plan, mib=(100, 201, 221), seconds=[9.0, 9.0, within, within, within]) == []


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        ((130, 230, 250), "+30.0 MiB from the prediction: +30.0 MiB resident between steps, +0.0 MiB in the step"),
        ((100, 170, 220), "-30.0 MiB from the prediction: +0.0 MiB resident between steps, -30.0 MiB in the step"),
        ((100, 200, 260), "holds +40.0 MiB more than predicted beyond live tensors: fragmentation"),
    ],
)
def test_memory_is_told_by_where_it_is(plan: Plan, mib: tuple[int, int, int], expected: str) -> None:
    """Resident, in the step, or held by the allocator: the one that differs is named, with its size."""
    found = told(plan, mib=mib)

    assert any(expected in line for line in found)


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        ([3.0, 3.0, 6.0, 6.0], "4.50 of the predicted time; the second half 2.00 of the first half's: throttling"),
        ([6.0, 6.0, 3.0, 3.0], "the second half 0.50 of the first half's: other work on the machine at first"),
        ([4.0, 4.0, 4.0, 4.0], "4.00 of the predicted time, in both halves alike"),
    ],
)
def test_time_is_told_by_when_it_went(plan: Plan, pace: list[float], expected: str) -> None:
    """Slower from the start, or only later, are different causes."""
    (line,) = told(plan, seconds=[1.0, 1.0, *pace])

    assert expected in line
    assert told(plan, seconds=[1.0, 1.0, *pace[:3]]) == []


def test_evaluations_and_padding_are_told(plan: Plan) -> None:
    """A tenth of the time spent on evaluations is said, and padding where fewer tokens than predicted are learned."""
    evaluations = [EvaluationRecord(step=n, loss=1.0, perplexity=2.7, seconds=5.0, tokens=1) for n in range(4)]
    steps = [step(index, 1.0, tokens=10) for index in range(4)]
    padding = padding_planned(plan) + 0.5

    found = causes(plan, plan.prediction, None, steps, evaluations, 100.0, padding)

    assert found[0] == "4 evaluations took 20.0 s, 20% of the time; the plan counted 2"
    assert "0.33 of the predicted tokens are learned in a second" in found[1] and "padding" in found[1]
    assert causes(plan, plan.prediction, None, steps, evaluations[:2], 50.0, padding_planned(plan)) == []


@pytest.mark.parametrize("num_skipped", [0, 1, MOST_SKIPPED, MOST_SKIPPED + 1])
def test_skipped_updates_are_counted(num_skipped: int) -> None:
    """How many and at what scale is said of any, and that fp16 does not suit of more than a few at the start."""
    steps = [step(index, 1.0, skipped=index < num_skipped) for index in range(FIRST_STEPS + 10)]
    late = [step(index, 1.0, skipped=index >= FIRST_STEPS) for index in range(FIRST_STEPS + 10)]

    found = skipped_notes(steps)

    assert len(found) == (num_skipped > 0) + (num_skipped > MOST_SKIPPED)
    assert not found or (f"{num_skipped} update" in found[0] and found[0].endswith("which ends at 64"))
    assert len(skipped_notes(late)) == 1
