"""Measure this device into a profile of its own: single operators, then whole steps, and rates fitted to both."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from shallowflow.planner.fitting import TimedOperators, fit_gpu, left_out
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.user_step import steady_operators
from shallowflow.profiles import GpuSpec, Source, UnknownName, calibrated, load_gpu

from . import build, cells, micro
from .cells import Cell
from .files import write_text
from .heap import keeping_freed_memory
from .meter import Stopwatch
from .simulated import register_quantization
from .trial import forget

Progress = Callable[[str], None]

RECORD_VERSION = 1
LEAST_ERROR = 0.1
"""What one machine's steps differ by from hour to hour: no prediction is worth more."""
SHARE_WITHIN = 0.9
LEAST_TIMES, MOST_TIMES, ENOUGH_SECONDS = 3, 7, 1.0

_WIDE, _WIDER = "SmolLM2-360M", "TinyLlama-1.1B-Chat-v1.0"
CPU_STEPS = (
    Cell(model=_WIDE, weight_format="fp32", num_layers=4, sequence_length=8),
    Cell(model=_WIDE, weight_format="fp32", num_layers=4, sequence_length=128),
    Cell(model=_WIDE, weight_format="nf4", num_layers=4, sequence_length=128, recompute="all"),
    Cell(model=_WIDE, weight_format="int8", num_layers=4, sequence_length=128),
    Cell(model=_WIDE, weight_format="nf4", num_layers=4, sequence_length=128, micro_batch_size=4),
    Cell(model=_WIDE, weight_format="fp32", num_layers=4, sequence_length=512, recompute="all"),
    Cell(model=_WIDE, weight_format="int8", num_layers=4, sequence_length=512),
    Cell(model=_WIDER, weight_format="fp32", num_layers=2, sequence_length=64),
    Cell(model=_WIDER, weight_format="nf4", num_layers=2, sequence_length=128),
    Cell(model=_WIDER, weight_format="int8", num_layers=2, sequence_length=128, recompute="all"),
    Cell(model=_WIDER, weight_format="fp32", num_layers=2, sequence_length=512),
    Cell(model=_WIDER, weight_format="nf4", num_layers=2, sequence_length=768),
)
"""Two widths, short steps and long ones, each format and policy: half a minute on two cores."""

CUDA_STEPS = (
    Cell(model=_WIDE, weight_format="fp16", sequence_length=64),
    Cell(model=_WIDE, weight_format="nf4", sequence_length=64),
    Cell(model=_WIDE, weight_format="fp16", num_layers=8, micro_batch_size=4, sequence_length=512),
    Cell(model=_WIDE, weight_format="nf4", num_layers=8, micro_batch_size=8, sequence_length=512, recompute="all"),
    Cell(model=_WIDE, weight_format="fp16", num_layers=8, micro_batch_size=2, sequence_length=2048),
    Cell(model="Llama-3.2-1B", weight_format="fp16", num_layers=4, sequence_length=512),
    Cell(model="Llama-3.2-1B", weight_format="nf4", num_layers=4, micro_batch_size=2, sequence_length=512),
    Cell(model="Llama-3.2-1B", weight_format="int8", num_layers=4, micro_batch_size=2, sequence_length=512),
    Cell(model="Llama-3.2-1B", weight_format="nf4", num_layers=4, sequence_length=2048, recompute="all"),
    Cell(model="Llama-3.1-8B", weight_format="nf4", num_layers=2, sequence_length=512, recompute="all"),
    Cell(model="Llama-3.1-8B", weight_format="nf4", num_layers=2, sequence_length=1024),
)
"""Bound by the host and by the device, short and long, fp16 (or bf16), nf4 and int8; under 5 GiB each."""

FITTED = {
    "cpu": (
        "fp32_flops_per_second",
        "attention_fp32_flops_per_second",
        "fp32_matmul_bytes_per_second",
        "dequantized_elements_per_second",
        "dram_bytes_per_second",
        "kernel_gap_seconds",
    ),
    "cuda": (
        "fp16_flops_per_second",
        "bf16_flops_per_second",
        "fp32_flops_per_second",
        "int8_flops_per_second",
        "attention_fp16_flops_per_second",
        "attention_bf16_flops_per_second",
        "fp32_matmul_bytes_per_second",
        "dequantized_elements_per_second",
        "dram_bytes_per_second",
        "kernel_launch_seconds",
        "quantized_launch_seconds",
    ),
}
"""The rates that steps on a device tell; what no step has stays as single operators, or other devices, have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStep:
    """A step of the calibration: measured, and predicted by rates that were fitted to the other models' steps."""

    cell: Cell
    measured_seconds: float
    predicted_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a device was found to do.

    Attributes:
        gpu: its profile, with the rates fitted to *steps*.
        before: what was known of it.
        operators: single operators as timed, for ``micro.rates``.
    """

    device: str
    date: str
    torch_version: str
    gpu: GpuSpec
    before: GpuSpec
    operators: tuple[dict[str, Any], ...]
    steps: tuple[CalibrationStep, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with its version."""
        return {"format_version": RECORD_VERSION, "kind": "calibration", **asdict(self)}

    def rates(self) -> dict[str, tuple[float, float]]:
        """By name, what each rate was taken for and what it is now, where that differs."""
        pairs = {name: (getattr(self.before, name), getattr(self.gpu, name)) for name in self.gpu.sources}
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}

    def step_rows(self) -> list[tuple[str, float, float]]:
        """Of each step its title, the predicted seconds and the measured ones."""
        return [(_title(step.cell), step.predicted_seconds, step.measured_seconds) for step in self.steps]

    def save(self) -> Path:
        """Keep the profile where later plans find it.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        path = calibrated.folder() / f"{self.gpu.name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, calibrated.to_toml(self.gpu))
        return path


def calibrate(device: Literal["cpu", "cuda"], progress: Progress = lambda _message: None) -> Calibration:
    """Time this machine's *device* for about a minute and fit its rates; nothing is written.

    Raises:
        CalibrationError: there is no such device, or too few steps run on it.
    """
    if device not in FITTED:
        raise CalibrationError(f"the device is {device!r}; give one of {', '.join(FITTED)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("this machine has no CUDA device; try --device cpu")
    register_quantization()
    where = torch.device("cpu") if device == "cpu" else torch.device("cuda", 0)
    title, before = _device_name(where), _known(where)
    dtype = build.DTYPES[before.compute_dtype]
    with keeping_freed_memory():
        progress("timing single operators")
        operators = micro.operators(where, dtype, quantizes=True)
        timed = _timed_steps(CPU_STEPS if device == "cpu" else CUDA_STEPS, before, where, progress)
    progress("fitting rates")
    start = replace(before, **_positive(micro.rates(operators), device))
    steps = [operators_of for _, operators_of in timed]
    fitted = fit_gpu(start, FITTED[device], steps)
    blind = left_out(start, FITTED[device], steps)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    error = _error(blind, [step.seconds for step in steps])
    return Calibration(
        device=title,
        date=date,
        torch_version=torch.__version__,
        gpu=_sourced(replace(fitted, step_error=error), before, f"{title}, torch {torch.__version__}, {date}"),
        before=before,
        operators=tuple(operators),
        steps=tuple(
            CalibrationStep(cell=cell, measured_seconds=step.seconds, predicted_seconds=seconds)
            for (cell, step), seconds in zip(timed, blind, strict=True)
        ),
    )


class CalibrationError(ValueError):
    """This device cannot be calibrated: one line that says why."""


def _timed_steps(
    grid: tuple[Cell, ...], gpu: GpuSpec, device: torch.device, progress: Progress
) -> list[tuple[Cell, TimedOperators]]:
    """The steps of *grid* that run on *device*, traced and timed."""
    found: list[tuple[Cell, TimedOperators]] = []
    failures: list[str] = []
    for number, cell in enumerate(grid, start=1):
        progress(f"step {number} of {len(grid)}: {_title(cell)}")
        make_step = cells.step_of(cell, gpu.compute_dtype)
        kinds, flops, num_bytes = steady_operators(make_step, Target.of(gpu))
        try:
            seconds = _seconds(make_step(device.type), device)
        except Exception as error:  # noqa: BLE001 - such as too little memory for one of them
            failures.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            continue
        finally:
            forget(device)
        found.append((cell, TimedOperators(kinds, flops, num_bytes, seconds, group=cell.model)))
    if len({cell.model for cell, _ in found}) < 2:
        raise CalibrationError(f"too few steps run on this device to calibrate it; {failures[0]}")
    return found


def _title(cell: Cell) -> str:
    policy = {"none": "", "some": ", half recomputed", "all": ", recomputed"}[cell.recompute]
    return f"{cell.model}, {cell.weight_format}{policy}, {cell.micro_batch_size} x {cell.sequence_length}"


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, after one that makes the optimizer's state."""
    step()
    times: list[float] = []
    while len(times) < LEAST_TIMES or (len(times) < MOST_TIMES and sum(times) < ENOUGH_SECONDS):
        watch = Stopwatch(device)
        step()
        times.append(watch.seconds())
    return statistics.median(times)


def _positive(rates: dict[str, float], device: str) -> dict[str, Any]:
    """Rates to start from; a CPU's gap between operators is its own code's, which a row of equal ones does not show."""
    return {name: rate for name, rate in rates.items() if rate > 0 and (device, name) != ("cpu", "kernel_gap_seconds")}


def _error(predicted: list[float], measured: list[float]) -> float:
    """What nine of ten steps stay within."""
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return max(LEAST_ERROR, float(np.quantile(errors, SHARE_WITHIN)))


def _sourced(gpu: GpuSpec, before: GpuSpec, where: str) -> GpuSpec:
    """*gpu* with a source for every number that differs from *before*; a fit is derived, its error is measured."""
    changed = {
        name: Source(text=f"fitted to operators and steps timed on {where}", trust="derived")
        for name in gpu.sources
        if getattr(gpu, name) != getattr(before, name)
    }
    text = f"calibrated on {where}: nine of ten steps were nearer, by rates fitted to another model's"
    return replace(gpu, sources={**gpu.sources, **changed, "step_error": Source(text=text, trust="measured")})


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else f"{psutil.cpu_count()} processors"


def _known(device: torch.device) -> GpuSpec:
    """What is known of *device*; of a GPU that is not shipped, a T4's facts with this one's own size and kernels."""
    if device.type == "cpu":
        return load_gpu("cpu")
    properties = torch.cuda.get_device_properties(device)
    name = properties.name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    for known in (properties.name, name):
        try:
            return replace(load_gpu(known), memory_bytes=properties.total_memory)
        except UnknownName:
            continue
    capability = (properties.major, properties.minor)
    t4 = load_gpu("t4")
    measured = Source(text=f"torch.cuda.get_device_properties, {properties.name}", trust="measured")
    guessed = {
        key: replace(source, trust="derived", text=f"as a T4's, until measured: {source.text}")
        for key, source in t4.sources.items()
    }
    return replace(
        t4,
        name=name.lower().replace(" ", "-"),
        title=properties.name,
        aliases=(properties.name.lower(),),
        compute_capability=capability,
        memory_bytes=properties.total_memory,
        cublas_workspace_bytes=t4.cublas_workspace_bytes if capability < (9, 0) else 32 * 2**20,
        sources={**guessed, "memory_bytes": measured},
    )
