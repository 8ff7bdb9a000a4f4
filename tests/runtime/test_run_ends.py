"""A run that ends early is kept, and one that cannot be made is refused before it costs anything."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shallowflow.planner.plan import Plan
from shallowflow.runtime.documents import DataError
from shallowflow.runtime.meter import MeasuredPeak
from shallowflow.runtime.record import StepRecord
from shallowflow.runtime.run import RunError, RunRequest, Silent, train
from shallowflow.runtime.weights import WeightsError
from tests.runtime import tiny


class Stopping(Silent):
    """A watcher who presses Ctrl-C after so many steps, or in the first evaluation."""

    def __init__(self, after: int | None) -> None:
        self.left = after
        self.stages: list[str] = []

    def stage(self, message: str, total: int | None = None) -> None:
        self.stages.append(message)

    def advance(self) -> None:
        if self.left is None:
            raise KeyboardInterrupt

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        if self.left is not None and record.index + 1 == self.left:
            raise KeyboardInterrupt


# Ending early


@pytest.mark.parametrize("num_steps", [1, 2])
def test_an_interrupted_run_is_kept(
    num_steps: int, plans: dict[str, Plan], request_for: Callable[..., RunRequest], held_out: Path
) -> None:
    """Ctrl-C after some steps saves what was learned and says so, without measuring any further."""
    request = request_for(num_steps=10, eval_data=held_out)

    record = train(plans["fp16"], request, Stopping(num_steps))

    assert record.outcome == "interrupted"
    assert len(record.steps) == num_steps
    assert record.perplexity_before is not None and record.perplexity_after is None
    assert json.loads((request.output / "run.json").read_text(encoding="utf-8"))["outcome"] == "interrupted"
    assert "Interrupted on" in (request.output / "report.html").read_text(encoding="utf-8")
    adapter = load_file(request.output / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.any()) for t in adapter.values())


def test_an_evaluation_can_be_interrupted(
    plans: dict[str, Plan], request_for: Callable[..., RunRequest], held_out: Path
) -> None:
    """Ctrl-C before the first step leaves a record of no steps."""
    request = request_for(eval_data=held_out)
    watcher = Stopping(None)

    record = train(plans["fp16"], request, watcher)

    assert (record.outcome, record.steps, record.perplexity_before) == ("interrupted", (), None)
    assert watcher.stages == [
        "reading data and tokenizer",
        "tracing the step",
        "loading weights",
        "perplexity before training",
        "saving",
    ]
    assert (request.output / "run.json").is_file()


# What is refused


def test_a_folder_with_results_is_left_alone(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """A second run into the same folder, or onto a file, is refused before anything is loaded."""
    request = request_for()
    train(plans["fp16"], request)
    before = {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()}

    for output, told in ((request.output, "holds a run"), (request.data, "is a file"), (request.data / "run", "")):
        watcher = Stopping(1)
        with pytest.raises(RunError) as caught:
            train(plans["fp16"], replace(request, output=output), watcher)
        assert told in str(caught.value) and "--output" in str(caught.value)
        assert watcher.stages == []
    assert {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_plan_for_a_device_that_is_not_there(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """A plan for a GPU is refused on a machine without one, and nothing is written."""
    request = request_for()

    with pytest.raises(RunError, match="the plan is for a t4 and this machine has no CUDA device; plan with --gpu cpu"):
        train(replace(plans["fp16"], gpu="t4"), request)
    assert not request.output.exists()


def test_a_plan_for_several_devices(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """Training on more than one GPU is refused, not done on one in silence."""
    configuration = replace(plans["fp16"].configuration, num_gpus=2)

    with pytest.raises(RunError, match=r"for 2 GPUs.*--gpus 1"):
        train(replace(plans["fp16"], configuration=configuration), request_for())


def test_nothing_to_learn_or_to_load(
    plans: dict[str, Plan], request_for: Callable[..., RunRequest], tmp_path: Path
) -> None:
    """Missing data, missing held-out text and missing weights each end the run at once."""
    missing = tmp_path / "missing"

    for request, error in (
        (request_for(data=missing), DataError),
        (request_for(eval_data=missing), DataError),
        (request_for(weights=missing), WeightsError),
    ):
        with pytest.raises(error, match=f"{missing}"):
            train(plans["fp16"], request)
        assert not list(itertools.islice(request.output.glob("*"), 1))


def test_a_prompt_without_an_answer_is_no_data(
    plans: dict[str, Plan], request_for: Callable[..., RunRequest], tiny_folder: Path, tmp_path: Path
) -> None:
    """A document of a single token, from a tokenizer that ends no text, leaves nothing to predict."""
    folder = tiny.save(tmp_path / "endless")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "short.txt").write_text("x", encoding="utf-8")

    with pytest.raises(RunError, match=r"short\.txt holds no token to learn"):
        train(plans["fp16"], request_for(data=tmp_path / "short.txt", weights=folder))
