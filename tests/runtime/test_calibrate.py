"""A device is measured into a profile of its own, and plans use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shallowflow.planner.fitting import TimedOperators
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.user_step import steady_operators
from shallowflow.profiles import BadFacts, load_gpu
from shallowflow.runtime import calibrate, cells
from shallowflow.runtime.calibrate import Calibration, CalibrationError
from shallowflow.runtime.cells import Cell
from tests.front.schemas import held
from tests.front.shell import sfplan

FEW = (
    Cell(model="SmolLM2-135M", weight_format="fp32", num_layers=1, sequence_length=8),
    Cell(model="SmolLM2-135M", weight_format="nf4", num_layers=1, sequence_length=16, recompute="all"),
    Cell(model="SmolLM2-360M", weight_format="int8", num_layers=1, sequence_length=8),
)


@pytest.fixture(scope="module")
def found() -> Calibration:
    """This CPU, from three short steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "CPU_STEPS", FEW)
        patch.setattr(calibrate, "ENOUGH_SECONDS", 0.0)
        return calibrate.calibrate("cpu")


def test_rates_are_fitted_and_sourced(found: Calibration) -> None:
    """Every step is predicted without its own model; each changed number says where it comes from."""
    assert [step.cell for step in found.steps] == list(FEW)
    assert all(step.measured_seconds > 0 and step.predicted_seconds > 0 for step in found.steps)
    assert set(found.rates()) >= set(calibrate.FITTED["cpu"]) - {"dequantized_elements_per_second"}
    for name in found.rates():
        assert found.date in found.gpu.sources[name].text
        assert found.gpu.sources[name].trust in ("derived", "measured")
    assert found.gpu.step_error >= calibrate.LEAST_ERROR


def test_a_kept_profile_is_the_one_that_plans_use(
    found: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and read again it is the same, but for the memory, which is the host's."""
    monkeypatch.setenv("SHALLOWFLOW_CONFIG", str(tmp_path))
    shipped = load_gpu("cpu")

    path = found.save()

    assert path == tmp_path / "gpus" / "cpu.toml"
    assert load_gpu("CPU") == found.gpu != shipped
    path.unlink()
    assert load_gpu("cpu") == shipped


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("name = ", "not readable as TOML"),
        ('name = "cpu"', "incomplete"),
        ("fp32_flops_per_second", "fp32_flops_per_second = 0.0"),
        ("kernel_gap_seconds", "kernel_gap_seconds = nan"),
    ],
)
def test_a_broken_profile_is_one_line(
    broken: str, why: str, found: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which file and what is wrong, and never plans with it."""
    monkeypatch.setenv("SHALLOWFLOW_CONFIG", str(tmp_path))
    path = found.save()
    lines = path.read_text(encoding="utf-8")
    if broken in ("fp32_flops_per_second", "kernel_gap_seconds"):
        head, _, rest = lines.partition(f"[{broken}]\nvalue = ")
        value = "0.0" if "per_second" in broken else "nan"
        path.write_text(f"{head}[{broken}]\nvalue = {value}\n{rest.partition(chr(10))[2]}", encoding="utf-8")
    else:
        path.write_text(broken, encoding="utf-8")

    with pytest.raises(BadFacts, match=r"cpu\.toml") as refusal:
        load_gpu("cpu")

    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_calibrated_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such device, none here, or steps that fail."""
    with pytest.raises(CalibrationError, match="'tpu'; give one of cpu, cuda"):
        calibrate.calibrate("tpu")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CalibrationError, match="no CUDA device; try --device cpu"):
        calibrate.calibrate("cuda")

    def fail(*_: Any) -> Any:
        raise RuntimeError("not enough memory\nand more")

    monkeypatch.setattr(calibrate, "CPU_STEPS", FEW)
    monkeypatch.setattr(calibrate, "_seconds", fail)
    with pytest.raises(CalibrationError, match=r"too few steps run on this device.*not enough memory$"):
        calibrate.calibrate("cpu")


def test_the_grid_leaves_a_model_out_and_names_shipped_ones() -> None:
    """Two models at least, so that each is predicted by the other's; every cell can be built."""
    for grid in (calibrate.CPU_STEPS, calibrate.CUDA_STEPS):
        assert len({cell.model for cell in grid}) >= 2
        assert len(set(grid)) == len(grid)
        for cell in grid:
            cells.step_of(cell, "float16" if grid is calibrate.CUDA_STEPS else "float32")("meta")


def test_the_record_is_json(found: Calibration) -> None:
    """Everything measured, with a version."""
    record = json.loads(json.dumps(found.as_dict()))

    assert (record["kind"], record["format_version"]) == ("calibration", calibrate.RECORD_VERSION)
    assert {row["operator"] for row in record["operators"]} > {"mm", "attention"}
    assert len(record["steps"]) == len(found.step_rows()) == len(FEW)


def test_it_is_printed_as_its_schema_says(found: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record, and the profile that was written."""
    monkeypatch.setenv("SHALLOWFLOW_CONFIG", str(tmp_path))
    monkeypatch.setattr(calibrate, "calibrate", lambda _device, _progress: found)

    told = held("calibrate", sfplan("calibrate", "--json").output)

    profile = tmp_path / "gpus" / "cpu.toml"
    assert told == {**json.loads(json.dumps(found.as_dict())), "profile": str(profile)}
    assert profile.is_file()


def test_an_unknown_gpu_starts_from_a_t4_with_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says of it is taken; the rest is said to be a T4's."""

    class Properties:
        name = "NVIDIA GeForce RTX 9999"
        total_memory = 24 * 2**30
        major, minor = 12, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Properties)

    known = calibrate._known(torch.device("cuda", 0))

    assert (known.name, known.compute_capability, known.memory_bytes) == ("geforce-rtx-9999", (12, 0), 24 * 2**30)
    assert known.compute_dtype == "bfloat16"
    assert known.sources["fp16_flops_per_second"].text.startswith("as a T4's, until measured")
    Properties.name = "Tesla T4"
    assert calibrate._known(torch.device("cuda", 0)).name == "t4"


def test_timed_operators_are_those_of_the_steady_step() -> None:
    """As many floating-point operations as the products of one step have, whatever the optimizer's first one did."""
    made = cells.step_of(FEW[0], "float32")

    kinds, flops, num_bytes = steady_operators(made, Target.of(load_gpu("cpu")))

    assert len(kinds) == len(flops) == len(num_bytes) > 100
    assert TimedOperators(kinds, flops, num_bytes, 1.0, "a").predicted(load_gpu("cpu")) > 0
    assert flops.sum() > 2 * 2 * 8 * 576 * 49_152
