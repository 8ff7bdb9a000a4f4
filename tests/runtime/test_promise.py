"""A run is exactly its plan: the step built from it is the predicted one to the byte, or the run is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.simulate import traced_peak
from shallowflow.runtime import evaluate, promise
from shallowflow.runtime.fallback import candidate
from shallowflow.runtime.run import RunError, RunRequest, train
from shallowflow.runtime.simulated import MetaStep
from tests.runtime import tiny

Requests = Callable[..., RunRequest]


def moved(plan: Plan, name: str, by: int) -> Plan:
    """*plan* with a predicted number of bytes that is off."""
    prediction = replace(plan.prediction, **{name: getattr(plan.prediction, name) + by})
    return replace(plan, prediction=prediction)


def elsewhere(plan: Plan) -> Plan:
    """*plan* as if made with another transformers."""
    return replace(plan, versions={**plan.versions, "transformers": "4.0"})


@pytest.mark.parametrize("weight_format", tiny.PLANNED_FORMATS)
def test_every_candidate_is_what_the_plan_says(weight_format: str, plans: dict[str, Plan]) -> None:
    """The plan's own step and its alternatives' trace to the predicted bytes, evaluation within the budget."""
    plan = plans[weight_format]
    for alternative in (None, *range(len(plan.alternatives))):
        chosen = candidate(plan, alternative)

        kept = promise.kept(plan, chosen)

        assert kept.notes == ()
        assert kept.evaluation_micro_batch_size == chosen.configuration.micro_batch_size
        assert 0 < kept.evaluation_peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", ["resident_bytes", "peak_allocated_bytes", "peak_reserved_bytes"])
def test_one_byte_more_is_refused(name: str, plans: dict[str, Plan], request_for: Requests) -> None:
    """With the plan's own versions a prediction that is off by a byte stops the run before anything is written."""
    request = request_for()

    with pytest.raises(RunError, match=r"not the predicted one.*-1 from the plan's.*plan again"):
        train(moved(plans["fp16"], name, 1), request)

    assert not request.output.exists()


def test_other_versions_may_move_the_prediction(plans: dict[str, Plan], request_for: Requests) -> None:
    """Made with other versions, the run goes on and its record says which, and by how much the prediction moved."""
    plan = elsewhere(moved(plans["fp16"], "resident_bytes", -512))

    record = train(plan, request_for(num_steps=1))

    (note,) = record.notes
    assert "(planned with 4.0) the prediction has moved: resident between steps" in note
    assert "+512 from the plan's" in note


def test_a_step_that_no_longer_fits_is_refused(plans: dict[str, Plan], request_for: Requests) -> None:
    """Whatever the versions, more than the budget is not begun."""
    plan = elsewhere(plans["fp16"])
    small = replace(plan, budget_bytes=plan.prediction.peak_reserved_bytes - 1)

    with pytest.raises(RunError, match=r"reserves [\d,]+ bytes of [\d,]+; plan again"):
        train(small, request_for())


def test_evaluations_shrink_until_they_fit(plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation beyond the budget runs fewer sequences at a time, as many as fit."""
    real = evaluate.loss
    each_bytes = 10 * 2**20

    def wasteful(trainee: Any, batch: Any) -> torch.Tensor:
        wasted = torch.empty(len(batch.input_ids) * each_bytes, dtype=torch.uint8, device="meta")
        return real(trainee, batch) + 0 * wasted.numel()

    monkeypatch.setattr(evaluate, "loss", wasteful)
    plan = elsewhere(plans["fp16"])
    assert plan.configuration.micro_batch_size == 4
    for room, expected in ((5, 4), (3, 2), (2, 1)):
        tight = replace(plan, budget_bytes=room * each_bytes)

        kept = promise.kept(tight, candidate(tight, None))

        assert kept.evaluation_micro_batch_size == expected
        assert kept.evaluation_peak_bytes <= tight.budget_bytes


def test_tracing_holds_no_memory(plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the traced step is on ``meta``."""
    seen: list[MetaStep] = []

    def traced(step: MetaStep, target: Target, context_bytes: int) -> TracedPeak:
        seen.append(step)
        return traced_peak(step, target, context_bytes)

    monkeypatch.setattr("shallowflow.runtime.promise.traced_peak", traced)

    promise.kept(plans["nf4"], candidate(plans["nf4"], None))

    (step,) = seen
    assert {item.tensor.device.type for item in step.resident_tensors()} == {"meta"}
