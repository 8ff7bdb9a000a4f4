"""A rehearsal checks what a run checks, says what it would do, and does none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shallowflow.planner.plan import Plan
from shallowflow.runtime.dry_run import rehearse
from shallowflow.runtime.run import RunError, RunRequest, train
from shallowflow.runtime.weights import WeightsError
from tests.runtime import tiny

Requests = Callable[..., RunRequest]


def test_what_is_said_is_what_is_done(plans: dict[str, Plan], request_for: Requests, held_out: Path) -> None:
    """Steps, sequences and tokens are those of the run after it; nothing is written and no weights are read."""
    request = request_for(num_steps=None, eval_data=held_out, eval_every=5, patience=2, samples=("the cat",))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
        told = "\n".join(rehearse(plans["fp16"], request))

    assert not request.output.exists()
    assert "the step, traced: as planned, to the byte" in told
    record = train(plans["fp16"], request_for(num_steps=None))
    assert f"training: {len(record.steps)} steps of 4 sequences" in told
    assert f"{sum(step.num_target_tokens for step in record.steps):,} tokens to learn" in told
    assert "every 5 steps and before and after training, 4 at a time" in told
    assert "stopping after 2 without improvement" in told
    assert "samples: 1 prompt" in told


def test_what_a_run_refuses_is_refused(plans: dict[str, Plan], request_for: Requests, tmp_path: Path) -> None:
    """Another model's weights, a wrong prediction and a used folder are told in the run's own words."""
    plan = plans["fp16"]
    other = tiny.save(tmp_path / "other", hidden_size=32)
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    wrong = replace(plan, prediction=replace(plan.prediction, resident_bytes=plan.prediction.resident_bytes - 1))

    for changed, request, error, said in (
        (plan, request_for(weights=other), WeightsError, "have hidden_size 32, the plan's model 64"),
        (plan, request_for(weights=tmp_path / "none"), WeightsError, "no weights at"),
        (plan, request_for(output=used), RunError, "is not empty"),
        (wrong, request_for(), RunError, "not the predicted one"),
    ):
        with pytest.raises(error, match=said):
            rehearse(changed, request)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_elsewhere_is_said(tiny_folder: Path, request_for: Requests) -> None:
    """A plan for a T4 is rehearsed on a machine without one, which is said last."""
    import shallowflow

    plan = shallowflow.plan(str(tiny_folder), "t4", sequence_length=32, global_batch_size=4, rank=8)

    told = rehearse(plan, request_for())

    assert told[-1].startswith("not here: the plan is for a t4 and this machine has no CUDA device")
