"""A run that was killed, interrupted or damaged goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.runtime import checkpoint, folder, interrupts
from shallowflow.runtime.run import CHECKPOINTS, RunError, RunRequest, Silent, train
from tests.front.tree import ROOT
from tests.runtime import killed, tiny

Requests = Callable[..., RunRequest]


def losses(record: Any) -> list[float]:
    """Every step's."""
    return [step.loss for step in record.steps]


@pytest.fixture
def whole(plans: dict[str, Plan], request_for: Requests, tmp_path: Path) -> tuple[list[float], Path]:
    """The losses of six steps in one go, and their adapter."""
    record = train(plans["fp16"], request_for(num_steps=6, output=tmp_path / "whole"))
    return losses(record), tmp_path / "whole" / "adapter" / "adapter_model.safetensors"


@pytest.mark.parametrize("weight_format", tiny.PLANNED_FORMATS)
def test_resumed_is_as_in_one_go(weight_format: str, plans: dict[str, Plan], request_for: Requests) -> None:
    """Three steps and three more give the losses of six and the same adapter, to the last bit."""
    check_resumed(plans[weight_format], request_for)


def test_dora_resumed_is_as_in_one_go(tiny_folder: Path, request_for: Requests) -> None:
    """Learned lengths are kept, and those of the base's rows are found again."""
    fixed: dict[str, Any] = {"quantization": "nf4", "double_quantization": True, "activations": "save", "rank": 8}
    fixed |= {"sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 4, "loss_chunks": 1}

    check_resumed(shallowflow.plan(str(tiny_folder), "cpu", adapter="dora", **fixed), request_for)


def check_resumed(plan: Plan, request_for: Requests) -> None:
    """Two sessions of *plan* come to what one does."""
    in_one = train(plan, request_for(num_steps=6, output=request_for().output.with_name("whole")))
    train(plan, request_for(num_steps=3))

    record = train(plan, request_for(num_steps=6, resume=True))

    assert losses(record) == losses(in_one)
    assert [step.index for step in record.steps] == list(range(6))
    assert "resumed after step 3" in record.notes
    adapters = [
        load_file(request_for().output.with_name(name) / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "run")
    ]
    assert all(tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items())


def test_resuming_nothing_begins(plans: dict[str, Plan], request_for: Requests) -> None:
    """The same command serves the first start and every later one."""
    record = train(plans["fp16"], request_for(resume=True))

    assert (len(record.steps), record.notes) == (3, ())


def test_killed_at_random(tmp_path: Path) -> None:
    """Killed at any moment, in a save too: no loss, evaluation or adapter differs, nor the early stop.

    At most one interval between checkpoints is done again.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.runtime.killed", "6"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["outcome"], told["num_steps"] < killed.NUM_STEPS) == ("stopped early", True)
    found = told["kills"]
    assert sum(one["in_a_save"] for one in found) == 2
    for one in found:
        assert one["same"], one
        assert one["resumed"] >= one["done"] - killed.SAVE_EVERY


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["learned.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(
    name: str,
    damage: Callable[[Path], object],
    plans: dict[str, Plan],
    request_for: Requests,
    whole: tuple[list[float], Path],
) -> None:
    """The one before is used, and said."""
    request = request_for(num_steps=4, save_every=2)
    train(plans["fp16"], request)
    damage(request.output / CHECKPOINTS / "step-00000004" / name)

    record = train(plans["fp16"], replace(request, num_steps=6, resume=True))

    assert losses(record) == whole[0]
    assert record.notes[0].startswith("checkpoint step-00000004 is passed over: ")
    assert record.notes[1] == "resumed after step 2"


def test_two_are_kept(plans: dict[str, Plan], request_for: Requests) -> None:
    """Older checkpoints and what a killed save left are removed."""
    request = request_for(num_steps=5, save_every=1)
    left = request.output / CHECKPOINTS / ".step-00000009.partial"

    train(plans["fp16"], request)
    left.mkdir()
    train(plans["fp16"], replace(request, num_steps=6, resume=True))

    assert {path.name for path in (request.output / CHECKPOINTS).iterdir()} == {"step-00000005", "step-00000006"}


class Signalling(Silent):
    """Sends this process signals after a step, as Ctrl-C or a spot instance's end does."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        """Keep a note."""
        self.notes.append(message)

    def step(self, record: Any, peak: Any) -> None:
        """Hear of a step."""
        if record.index == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_an_interrupted_run_goes_on(
    number: signal.Signals, plans: dict[str, Plan], request_for: Requests, whole: tuple[list[float], Path]
) -> None:
    """Ctrl-C and SIGTERM save the last whole step; resumed, the losses are those of a run in one go."""
    request = request_for(num_steps=6)
    before = [signal.getsignal(each) for each in interrupts.SIGNALS]

    watcher = Signalling(number)
    record = train(plans["fp16"], request, watcher)
    again = train(plans["fp16"], replace(request, resume=True))

    assert (record.outcome, len(record.steps)) == ("interrupted", 3)
    assert "stopping before the next micro-batch, and saving; Ctrl-C again ends at once" in watcher.notes
    assert again.outcome == "completed"
    assert losses(again) == whole[0]
    assert [signal.getsignal(each) for each in interrupts.SIGNALS] == before


def test_a_second_signal_does_not_wait() -> None:
    """Who asks twice is obeyed at once."""
    with interrupts.deferred() as check:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "whose seed differs"),
        ({"learning_rate": 1e-3}, "whose learning rate differs"),
        ({"data": "held.txt"}, "whose data differs"),
        ({"resume": False}, "go on with it by --resume"),
    ],
)
def test_another_run_is_not_resumed(
    changes: dict[str, Any], told: str, plans: dict[str, Plan], request_for: Requests, held_out: Path
) -> None:
    """What would give a mixture of two runs is refused, and the run that is there stays as it is."""
    request = request_for()
    train(plans["fp16"], request)
    held = {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()}
    changed: dict[str, Any] = {"resume": True, **changes}
    if "data" in changed:
        changed["data"] = held_out

    with pytest.raises(RunError, match=told):
        train(plans["fp16"], replace(request, **changed))

    assert {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()} == held


def test_another_plan_is_not_resumed(plans: dict[str, Plan], request_for: Requests) -> None:
    """A checkpoint belongs to the plan that it was made under."""
    train(plans["fp16"], request_for())

    with pytest.raises(RunError, match="whose plan differs"):
        train(plans["nf4"], request_for(resume=True))


def test_a_move_keeps_the_modules_that_are_adapted(plans: dict[str, Plan], request_for: Requests) -> None:
    """Another number of GPUs is leave for another split of the batch, and none for another adapter."""
    plan, request = plans["fp16"], request_for(num_steps=1)
    train(plan, request)
    halves = replace(plan.configuration, num_gpus=2, micro_batch_size=1, gradient_accumulation_steps=2)
    moved = replace(plan, configuration=halves)
    narrowed = replace(moved, configuration=replace(halves, target_modules=("q_proj",)))

    assert folder.check_same(moved, request)
    with pytest.raises(RunError, match="whose plan differs"):
        folder.check_same(narrowed, request)


def test_another_adapter_is_refused_before_the_best_one_is_touched(
    plans: dict[str, Plan], request_for: Requests, held_out: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that does not fit the plan ends the run in one line, and all that was kept stays as it is."""
    request = request_for(num_steps=2, eval_data=held_out, eval_every=1, patience=2)
    train(plans["fp16"], request)
    held = {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()}
    fixed: dict[str, Any] = {"quantization": "fp16", "sequence_length": 32, "global_batch_size": 4, "rank": 8}
    narrow = shallowflow.plan(str(tiny_folder), "cpu", target_modules="attention", **fixed)
    monkeypatch.setattr(folder, "check_same", lambda *_: True)

    with pytest.raises(RunError, match=r"holds other weights than the plan's; .*--output"):
        train(narrow, replace(request, num_steps=3, resume=True))

    assert {path: path.read_bytes() for path in request.output.rglob("*") if path.is_file()} == held


def test_only_whole_folders_have_a_name(tmp_path: Path) -> None:
    """Nothing there, or nothing that is named as a checkpoint, is no checkpoint."""
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".step-00000001.partial").mkdir()

    assert checkpoint.latest(tmp_path) == (None, [])
    assert checkpoint.latest(tmp_path / "none") == (None, [])


def test_infinite_norms_survive(plans: dict[str, Plan], request_for: Requests) -> None:
    """An update that fp16 skipped has an infinite norm, and a checkpoint that holds one is read again."""
    train(plans["fp16"], request_for(num_steps=2))
    path, _ = checkpoint.latest(request_for().output / CHECKPOINTS)
    assert path is not None
    state = checkpoint.read(path)
    skipped = replace(state, steps=(replace(state.steps[0], gradient_norm=math.inf, skipped=True), *state.steps[1:]))

    again = checkpoint.save(request_for().output / "other", tiny.trainee(), skipped)

    assert checkpoint.latest(again.parent) == (again, [])
    assert checkpoint.read(again) == skipped


def test_what_was_left_above_does_not_crowd_out_what_is_new(tmp_path: Path) -> None:
    """A run that went back below checkpoints that are not believed keeps what it writes from then on."""
    trainee = tiny.trainee()
    for number in (9, 10):
        broken = tmp_path / f"step-{number:08d}"
        broken.mkdir()
        (broken / "manifest.json").write_text("{}")
    state = checkpoint.State(steps=(), started="", seconds=0.0, loss_scale=1.0, num_skipped=0, num_calm=0)

    saved = checkpoint.save(tmp_path, trainee, state)

    assert checkpoint.latest(tmp_path) == (saved, [])
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_a_checkpoint_is_replaced_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between taking the old one's name away and giving it to the new one, the new one is found."""
    trainee = tiny.trainee()
    state = checkpoint.State(steps=(), started="", seconds=0.0, loss_scale=1.0, num_skipped=0, num_calm=0)
    saved = checkpoint.save(tmp_path, trainee, state)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and not path.name.endswith(".replaced.partial"):
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, trainee, replace(state, seconds=2.0))

    assert checkpoint.latest(tmp_path) == (None, [])  # by no reader, whose writer may be at it
    checkpoint.finish(tmp_path)
    path, _ = checkpoint.latest(tmp_path)
    assert path == saved and checkpoint.read(saved).seconds == 2.0


class Hearing(Silent):
    """Keeps what is told, and when."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        """Hear a note."""
        self.told.append(message)

    def step(self, record: Any, peak: Any) -> None:
        """Hear of a step."""
        self.told.append(f"step {record.index}")


def test_lost_checkpoints_are_told_before_the_first_step(plans: dict[str, Plan], request_for: Requests) -> None:
    """Who resumes hears at once that what was there is not believed, and where the run begins."""
    request = request_for(num_steps=2)
    train(plans["fp16"], request)
    for state in (request.output / CHECKPOINTS).glob("*/state.json"):
        state.write_text("{}", encoding="utf-8")
    watcher = Hearing()

    train(plans["fp16"], replace(request, resume=True), watcher)

    passed, begins, first, *_ = watcher.told
    assert "is passed over: state.json is not what was written" in passed
    assert begins.endswith("the run starts again from step 0") and first == "step 0"
