"""``sfplan train`` runs a plan file, and refuses what is none."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shallowflow.runtime.guard import Guard
from shallowflow.runtime.record import Outcome
from shallowflow.runtime.spot import Wish
from shallowflow.runtime.step import MicroBatch, Trainee
from tests.front.shell import AS_PROGRAM, Done, sfplan

STEPS = ("--steps", 3)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def train(tiny_plan: str, tiny_folder: Path, data: Path, tmp_path: Path) -> Callable[..., Done]:
    """Run the tiny plan, changed or not, with some more words; the output is the folder ``run``."""

    def run(*words: object, change: Change | None = None) -> Done:
        path = tmp_path / "plan.json"
        content = json.loads(tiny_plan)
        if change is not None:
            change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return sfplan(
            "train", path, "--data", data, "--output", tmp_path / "run", "--weights", tiny_folder, *STEPS, *words
        )

    return run


def test_a_run_is_summed_up(train: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    """Printed are steps, perplexities, predicted beside measured, the price, and where the results lie."""
    done = train("--eval-data", data, "--usd-per-hour", 1)

    assert done.code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert done.output.startswith("tiny: completed, 3 steps\n")
    before, after = (f"{record[f'perplexity_{when}']:.2f}" for when in ("before", "after"))
    assert f"{before} -> {after}" in done.output
    assert f"${record['usd']:.4f}" in done.output
    assert [c["quantity"] in done.output for c in record["comparisons"]] == [True] * 3
    assert f"results in {tmp_path / 'run'}" in " ".join(done.output.split())
    assert "Error" not in done.errors


def test_a_run_in_json_is_its_record(train: Callable[..., Done], tmp_path: Path) -> None:
    """Standard output is exactly ``run.json``, and nothing else."""
    done = train("--json", "--seed", 5, "--learning-rate", 1e-3)

    assert done.code == 0
    assert done.output == (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert len(json.loads(done.output)["steps"]) == 3


def test_an_interrupt_saves_the_run(tiny_plan: str, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """A real Ctrl-C during training ends with exit code 130, the adapter saved and the run told as interrupted."""
    (tmp_path / "plan.json").write_text(tiny_plan, encoding="utf-8")
    words = ["train", "plan.json", "--data", data, "--output", "run", "--weights", tiny_folder, "--steps", 10**6]
    code = (
        "import os, signal, sys; import shallowflow.terminal as t; from shallowflow.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "told = t.Watcher.step\n"
        "def step(self, record, peak):\n"
        "    told(self, record, peak)\n"
        "    if record.index == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "t.Watcher.step = step\n"
        "main(sys.argv[1:])\n"
    )

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("tiny: interrupted, ")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["outcome"] == "interrupted"
    assert len(record["steps"]) >= 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


# Plans that are none


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist; make one with: sfplan MODEL --output"),
        (b"", "is not JSON"),
        (b'{"format_version": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not"),
        (b"[1, 2]", "is not a plan"),
        (b"{}", "is not a plan"),
        (b"[" * 100_000, "is not"),
    ],
    ids=["missing", "empty", "half", "bytes", "list", "object", "deep"],
)
def test_a_file_that_is_no_plan_is_told(tmp_path: Path, data: Path, content: bytes | None, told: str) -> None:
    """Exit code 2 and one line that names the file."""
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)

    done = sfplan("train", path, "--data", data, "--output", tmp_path / "run")

    assert done.code == 2
    assert str(path) in done.error() and told in done.error()
    assert not (tmp_path / "run").exists()


def first_layers(plan: dict[str, Any]) -> dict[str, Any]:
    """The first run of layers in a plan."""
    run: dict[str, Any] = plan["configuration"]["layers"][0]
    return run


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: plan.update(format_version=1), "format_version is 1"),
        (lambda plan: plan.pop("prediction"), "prediction"),
        (lambda plan: plan["prediction"].update(step_seconds=-1), "prediction.step_seconds"),
        (lambda plan: plan["configuration"].update(rank=0), "configuration.rank"),
        (lambda plan: plan["configuration"].update(micro_batch_size=3), "workload.global_batch_size"),
        (lambda plan: plan["configuration"].update(sequence_length=31), "sequence_length is 31"),
        (lambda plan: plan["memory"].pop(), "memory sums to"),
        (lambda plan: first_layers(plan).update(first=1), "layer 0 comes next"),
        (lambda plan: first_layers(plan).update(last=1), "layers"),
        (lambda plan: first_layers(plan).update(last=5), "layers"),
        (lambda plan: first_layers(plan)["strategy"].update(weight_format="fp4"), "fp4"),
        (lambda plan: plan["configuration"].update(layers=[]), "layers is empty"),
        (lambda plan: plan.update(compute_dtype="float64"), "compute_dtype"),
        (lambda plan: plan.update(gpu="abacus"), "abacus"),
        (lambda plan: plan.update(num_parameters=5), "5"),
        (lambda plan: plan["model_config"].pop("model_type"), "model_type"),
        (lambda plan: plan["model_config"].update(model_type="made_up"), "made_up"),
        (lambda plan: plan["model_config"].update(hidden_size=65), "65"),
        (lambda plan: plan["model_config"].update(hidden_size="wide"), "hidden_size"),
    ],
)
def test_an_edited_plan_is_told(train: Callable[..., Done], tmp_path: Path, change: Change, told: str) -> None:
    """A plan that contradicts itself or the model ends in exit code 2 and one line that names the contradiction."""
    done = train(change=change)

    assert done.code == 2
    assert told in done.error()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_plan_for_another_machine_is_told(train: Callable[..., Done]) -> None:
    """A CPU's plan that calls itself a T4's contradicts itself."""
    done = train(change=lambda plan: plan.update(gpu="t4"))

    assert done.code == 2
    assert "compute_dtype is float32, a t4 computes in float16" in done.error()


# Everything else that is missing


def test_what_is_missing_is_told(train: Callable[..., Done], tmp_path: Path) -> None:
    """Data, held-out text and weights that are not there end in exit code 2 and one line with their path."""
    for option in ("--data", "--eval-data", "--weights"):
        done = train(option, tmp_path / "missing")

        assert done.code == 2
        assert str(tmp_path / "missing") in done.error()


def test_a_used_folder_is_told(train: Callable[..., Done], tmp_path: Path) -> None:
    """A second run into the same folder is refused."""
    assert train().code == 0

    done = train()

    assert done.code == 2
    assert re.search(r"run holds a run; go on with it by --resume, or give a new folder with --output", done.error())


def test_a_failed_run_can_be_tried_again(train: Callable[..., Done], tmp_path: Path) -> None:
    """A run that was refused leaves nothing behind that would refuse the next."""
    assert train("--weights", tmp_path / "missing").code == 2
    assert train().code == 0


@pytest.mark.parametrize("option", ["--steps", "--learning-rate", "--usd-per-hour", "--seed"])
def test_a_bad_number_is_told(train: Callable[..., Done], option: str) -> None:
    """A number that is none, or not positive, is refused with the option's name."""
    for value in ("many", "-1") if option != "--seed" else ("many",):
        done = train(option, value)

        assert done.code == 2
        assert option in done.errors.splitlines()[-1]


def test_the_program_alone_says_the_same(tmp_path: Path) -> None:
    """In a process of its own, a missing plan is one line on standard error and exit code 2."""
    done = subprocess.run(
        [*AS_PROGRAM, "train", "plan.json", "--data", "x", "--output", "y"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: plan file plan.json does not exist; make one with: sfplan MODEL --output plan.json\n"


# What a run may be asked for besides


def test_a_run_tells_what_it_was_asked(train: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    """Evaluations, the best adapter and samples are in what is printed, and in the record."""
    words = ("--eval-data", data, "--eval-every", 1, "--patience", 2, "--sample", "the cat", "--track", "tensorboard")

    done = train(*words)

    assert done.code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert [e["step"] for e in record["evaluations"]] == [0, 1, 2, 3]
    assert f"the adapter is the best of 4 evaluated, after step {record['best_step']}" in done.output
    assert "sample  the cat" in done.output
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    told = done.errors.splitlines()
    for e in record["evaluations"]:
        assert f"after step {e['step']}: loss {e['loss']:.4f}, perplexity {e['perplexity']:.2f}" in told
    assert sum(line.startswith("step 0, loss ") for line in told) == 1


def test_a_rehearsal_writes_nothing(train: Callable[..., Done], tmp_path: Path) -> None:
    """A dry run prints what would be done and leaves no folder; the run itself is then possible."""
    done = train("--dry-run")

    assert done.code == 0
    assert "training: 3 steps of 4 sequences" in done.output
    assert not (tmp_path / "run").exists()
    assert train().code == 0


def test_memory_that_runs_out_is_told(
    train: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no alternative left the command ends with 1 and one line, after having said what it fell back to."""
    real = Trainee.loss

    def loss(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
        if not batch.input_ids.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(trainee, batch)

    monkeypatch.setattr(Trainee, "loss", loss)

    done = train()

    assert (done.code, done.output) == (1, "")
    *before, last = done.errors.splitlines()
    assert last.startswith("Error: out of memory after step 0 (CUDA out of memory.)")
    assert before and all(line.startswith("memory fell short after step 0") for line in before)


def test_a_prediction_that_is_not_kept_is_told(train: Callable[..., Done], tmp_path: Path) -> None:
    """An altered prediction is one line and exit code 2."""
    done = train(change=lambda plan: plan["prediction"].update(resident_bytes=plan["prediction"]["resident_bytes"] - 1))

    assert done.code == 2
    assert "the step built from the plan is not the predicted one" in done.error()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("outcome", "code", "told"),
    [
        ("interrupted", 130, "go on with the same command and --resume"),
        ("out of budget", 1, "go on with the same command, --resume and a higher --budget-usd"),
    ],
)
def test_a_run_that_is_ended_tells_how_to_go_on(
    outcome: Outcome,
    code: int,
    told: str,
    train: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A notice ends with the code of Ctrl-C, a budget with that of what had to end; the record is there."""

    def wish(guard: Guard) -> Wish:
        guard.outcome = outcome
        return Wish.STOP if guard._num_steps else Wish.GO_ON

    monkeypatch.setattr(Guard, "wish", wish)

    done = train("--usd-per-hour", 1, "--budget-usd", 100)

    assert done.code == code
    assert done.output.splitlines()[-1] == told
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (record["outcome"], len(record["steps"]), record["budget_usd"]) == (outcome, 1, 100)
    assert "$100.0000 at most" in done.errors
