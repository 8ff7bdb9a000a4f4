"""The script that real devices run: its grid, its record, and that it runs from end to end on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles import load_gpu, load_model
from shallowflow.profiles.load import RATES
from shallowflow.runtime import build, cells, micro, others, simulated, trial, validate
from shallowflow.runtime.cells import BOUNDARIES, SMALL, Cell, full_grid
from shallowflow.runtime.loss import chunked, summed
from shallowflow.runtime.simulated import register_quantization
from tests.front.tree import ROOT
from tests.runtime import tiny
from tests.runtime.cpu_rules import rules

RECORDS = sorted((ROOT / "tests" / "measured").glob("validation_*.json"))


def test_it_runs_from_end_to_end_on_a_bare_path(tmp_path: Path) -> None:
    """From a checkout on the path it predicts, runs, prints a table and leaves a record whose peaks were foreseen."""
    command = [sys.executable, "-m", "shallowflow.runtime.validate", "--device", "cpu", "--output", str(tmp_path)]

    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("validation_cpu_*.json")
    record = json.loads(path.read_text())
    assert {row["cell"]["model"] for row in record["rows"]} == {"SmolLM2-135M"}
    assert len(record["rows"]) == len(SMALL)
    for row in record["rows"]:
        assert row["measured"]["outcome"] == row["predicted"]["outcome"] == "ran"
        for name in ("resident_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
            assert row["predicted"][name] == pytest.approx(row["measured"][name], rel=1e-3)
    assert all(row.get("seconds", 0) > 0 for row in record["operators"])
    assert {"mm", "attention", "AdamW", "nf4 to numbers"} <= {row["operator"] for row in record["operators"]}
    assert record["rates"].keys() >= {"fp32_flops_per_second", "dram_bytes_per_second", "kernel_gap_seconds"}
    [beside] = record["side by side"]
    assert beside["ours"]["tokens_per_second"] > 0
    assert set(beside) == {"cell", "ours", *others.TRAINERS}
    assert beside["transformers.Trainer"]["tokens_per_second"] > 0, beside
    peaks = [beside[name]["peak_allocated_bytes"] for name in ("ours", "transformers.Trainer")]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    for name, package in (("trl.SFTTrainer", "trl"), ("unsloth", "unsloth")):
        if importlib.util.find_spec(package) is None:
            assert beside[name] == {"outcome": "not installed"}
            assert f"{name} not installed" in done.stdout
    assert f"written to {path}" in done.stdout
    assert done.stdout.count("SmolLM2-135M") == len(SMALL) + 1


def test_timed_operators_become_a_gpus_rates() -> None:
    """Each by the name that a GPU's facts have for it; what failed or was not timed is left out."""
    square = {"operator": "mm", "dtype": "float16", "m": 8, "k": 8, "n": 8, "seconds": 1.0}
    found: list[dict[str, Any]] = [
        {**square, "bits": 16, "flops_per_second": 5e12, "bytes_per_second": 1e9},
        {**square, "bits": 32, "flops_per_second": 1e12, "bytes_per_second": 1e9},
        {**square, "bits": 32, "n": 16, "k": 64, "flops_per_second": 1e11, "bytes_per_second": 8e9},
        {**square, "bits": 32, "n": 64, "k": 16, "flops_per_second": 1e11, "bytes_per_second": 7e9},
        {"operator": "attention, both passes", "dtype": "float16", "seconds": 1.0, "flops_per_second": 3e12},
        {"operator": "copy on the device", "dtype": "float16", "seconds": 1.0, "bytes_per_second": 2e11},
        {"operator": "nf4 to numbers", "dtype": "float16", "elements": 100, "seconds": 2.0, "bytes_per_second": 1.0},
        {"operator": "100 launches", "dtype": "float16", "seconds": 5e-4},
        {"operator": "int8 product", "dtype": "float16", "failed": "no such kernel"},
    ]

    rates = micro.rates(found)

    assert rates == {
        "fp16_flops_per_second": 5e12,
        "fp32_flops_per_second": 1e12,
        "fp32_matmul_bytes_per_second": 7e9,
        "attention_fp16_flops_per_second": 3e12,
        "dram_bytes_per_second": 2e11,
        "dequantized_elements_per_second": 50.0,
        "kernel_gap_seconds": pytest.approx(5e-6),
    }
    assert set(rates) <= set(RATES)


def test_it_needs_nothing_but_the_libraries_of_training(tmp_path: Path) -> None:
    """Where msgspec, rich, click and the like are missing, all of its modules can still be imported."""
    missing = ("msgspec", "rich", "click", "platformdirs", "plotly", "jinja2", "scipy", "huggingface_hub.cli")
    code = (
        f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
        "import shallowflow.runtime.validate, shallowflow.runtime.simulated\n"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_grid_covers_every_option() -> None:
    """Formats, recomputation, attention, loss, optimizers, and models from 135M to 14B; no cell twice."""
    grid = full_grid()

    assert len(set(grid)) == len(grid) >= 30
    assert {c.weight_format for c in grid} == {"fp16", "int8", "nf4"}
    assert {c.recompute for c in grid} == {"none", "some", "all"}
    assert {c.attention for c in grid} == {"sdpa", "eager"}
    assert {c.optimizer for c in grid} == {"adamw", "adamw8bit"}
    assert {bool(c.chunk_tokens) for c in grid} == {False, True}
    assert {"SmolLM2-135M", "Llama-3.1-8B", "Qwen3-14B"} <= {c.model for c in grid}
    assert len({(c.micro_batch_size, c.sequence_length) for c in grid}) >= 3


def test_without_bitsandbytes_the_rest_is_left() -> None:
    """What cannot be run is left out beforehand."""
    left = validate.possible(full_grid(), quantizes=False)

    assert left and {c.weight_format for c in left} == {"fp16"} and {c.optimizer for c in left} == {"adamw"}
    assert validate.possible(full_grid(), quantizes=True) == full_grid()


@pytest.mark.parametrize(
    "cell", [full_grid()[0], *(replace(c, num_layers=4) for c in full_grid()[9:15])], ids=validate._title
)
def test_cells_are_predicted_for_a_gpu(cell: Cell) -> None:
    """Options of the full grid can be simulated as on a capped GPU of another generation."""
    register_quantization()
    newer = rules(
        gpu=replace(load_gpu("t4"), compute_capability=(9, 0)), compute_dtype="float16", capacity_bytes=14 * 2**30
    )

    found = trial.predicted(cell, newer)

    assert found["outcome"] == "ran"
    assert found["resident_bytes"] < found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]


def test_the_boundary_is_where_memory_ends() -> None:
    """The predicted micro-batch fits and one sequence more does not; where none fits it is 0."""
    cell = replace(BOUNDARIES[0], num_layers=2, sequence_length=64)
    tight = rules(gpu=load_gpu("t4"), compute_dtype="float16", capacity_bytes=400 * 2**20)

    largest = trial.predicted_boundary(cell, tight)

    assert largest > 1
    assert trial.predicted(replace(cell, micro_batch_size=largest), tight)["outcome"] == "ran"
    assert trial.predicted(replace(cell, micro_batch_size=largest + 1), tight)["outcome"] == "out of memory"
    assert trial.predicted_boundary(cell, replace(tight, capacity_bytes=2**20)) == 0


@pytest.mark.parametrize(("truth", "guess"), [(5, 5), (5, 3), (5, 8), (0, 2), (1, 0)])
def test_the_real_boundary_is_found_from_any_guess(truth: int, guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up or down from what was predicted."""
    monkeypatch.setattr(
        trial,
        "measured",
        lambda cell, _rules: {"outcome": "ran" if cell.micro_batch_size <= truth else "out of memory"},
    )

    assert trial.measured_boundary(BOUNDARIES[0], guess, rules()) == truth


def test_when_time_is_up_nothing_more_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are kept, and what was not run says so."""
    monkeypatch.setattr(micro, "operators", lambda *_args, **_kwargs: [])
    late = rules(deadline=0.0)

    record = validate.validate(late, SMALL[:1], (), lambda _message: None)

    assert record["rows"][0]["measured"] == {"outcome": "out of time"}
    assert record["rows"][0]["predicted"]["outcome"] == "ran"
    assert "out of time; predicted: ran" in "\n".join(validate.lines(record))


def test_one_failing_cell_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded with its reason."""

    def broken(*_args: object) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cells, "step_of", lambda *_: broken)

    assert trial.measured(SMALL[0], rules()) == {"outcome": "failed", "reason": "RuntimeError: no such kernel"}


def test_a_failure_without_a_word_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception may have no message; a prediction that fails costs no other either."""

    def broken(*_args: object) -> object:
        raise NotImplementedError

    monkeypatch.setattr(cells, "step_of", lambda *_: broken)

    assert trial.measured(SMALL[0], rules()) == {"outcome": "failed", "reason": "NotImplementedError: "}
    assert trial.predicted(SMALL[0], rules()) == {"outcome": "failed", "reason": "NotImplementedError: "}
    assert trial.predicted_boundary(SMALL[0], rules()) == 0


def test_operators_that_cannot_be_prepared_cost_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group's tensors do not fit, or its library does not load, the rest is timed."""

    def broken(*_args: object) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(micro, "_copies", broken)

    found = micro.operators(torch.device("cpu"), torch.float32, quantizes=False)

    assert {"operator": "copies", "failed": "RuntimeError: no room"} in found
    assert {"mm", "attention", "AdamW"} <= {row["operator"] for row in found if "seconds" in row}


def test_bitsandbytes_that_does_not_load_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then cells without it are left, and the record says why."""

    def broken() -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(simulated, "register_quantization", broken)
    held = rules()

    assert not validate._can_quantize(held)
    assert held.notes == ["bitsandbytes cannot be used: OSError: libcudart.so.13: cannot open shared object file"]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured: exit code 2."""
    (tmp_path / "file").touch()

    assert validate.main(["--device", "cpu", "--output", str(tmp_path / "file" / "records")]) == 2
    assert "give another folder with --output" in capsys.readouterr().err


def test_no_device_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 where CUDA is asked for and is not there."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")

    assert validate.main(["--device", "cuda"]) == 2
    assert "no CUDA device; try --device cpu" in capsys.readouterr().err


def test_layers_one_by_one_are_the_whole_model() -> None:
    """A model built layer by layer has every tensor, of the same shape, that building it at once gives."""
    cell = Cell(model="SmolLM2-135M", weight_format="fp32", num_layers=3)
    facts = dict(load_model(cell.model).config)

    built = cells.random_model(cell, "float32", "meta")

    whole = build.empty_model(build.transformers_config(facts, 3), "float32", "meta")
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (built, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_a_chunked_loss_is_the_whole_one(chunk_tokens: int) -> None:
    """Loss and gradients agree, whatever the chunks; tokens without a label count in neither."""
    trainee = tiny.trainee()
    batch = tiny.random_batch([5, 9])

    found = []
    for loss in (
        summed(trainee.model(input_ids=batch.input_ids).logits, batch.labels),
        chunked(trainee.model, batch.input_ids, batch.labels, chunk_tokens),
    ):
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainee.parameters if p.grad is not None)])
        trainee.optimizer.zero_grad()

    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_logits_changed_after_the_head_are_refused() -> None:
    """Chunks would miss Gemma 2's cap."""
    capped = tiny.base()
    capped.config.final_logit_softcapping = 30.0

    with pytest.raises(ValueError, match="changes its logits after the head"):
        chunked(capped, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), 8)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_predictions_of_today_are_what_devices_did(path: Path) -> None:
    """Every row of every record, within the errors that are stated; what ran is said to fit."""
    register_quantization()
    record = json.loads(path.read_text(encoding="utf-8"))
    capability = record["compute_capability"]
    gpu = replace(load_gpu("t4" if capability else "cpu"), compute_capability=tuple(capability) if capability else None)
    for row in record["rows"]:
        if row["measured"]["outcome"] != "ran":
            continue
        cell = Cell(**row["cell"])
        today = simulate(cells.step_of(cell, record["rules"]["compute_dtype"]), gpu, record["rules"]["capacity_bytes"])
        measured = row["measured"]
        assert today.peak_allocated_bytes == pytest.approx(
            measured["peak_allocated_bytes"], rel=validate.ALLOCATED_TOLERANCE
        ), validate._title(cell)
        assert today.peak_reserved_bytes == pytest.approx(
            measured["peak_reserved_bytes"], rel=validate.RESERVED_TOLERANCE
        ), validate._title(cell)
