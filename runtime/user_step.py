"""A user's own training step: load it from a file, and measure it on a real device."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shallowflow.planner.memory_record import RECORD_VERSION, MemoryRecord
from shallowflow.planner.profiler.allocator import OutOfMemory
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles.specs import GpuSpec

from .meter import Stopwatch, allocator_levels
from .simulated import register_quantization

MakeStep = Callable[[str], Callable[[], Any]]
NUM_WARMUP_STEPS = 2
NUM_TIMED_STEPS = 3


class StepError(ValueError):
    """A user's step that cannot be used: which file and name, and what is wrong."""


def load_step(reference: str) -> MakeStep:
    """The function that ``FILE.py:FUNCTION`` names; running it is the user's explicit wish.

    Raises:
        StepError: there is no such file or function, or the file fails when imported.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path_text or not name.isidentifier():
        raise StepError(f"{reference!r} is not FILE.py:FUNCTION, such as step.py:make_step")
    if not path.is_file():
        raise StepError(f"{path} does not exist; give FILE.py:FUNCTION, such as step.py:make_step")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise StepError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise StepError(f"{path} fails when imported: {_reason(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise StepError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    function: MakeStep = found
    return function


def simulated(
    reference: str, gpu: GpuSpec, capacity_bytes: int | None = None, *, expandable_segments: bool = False
) -> MemoryRecord:
    """What the step that ``FILE.py:FUNCTION`` makes takes on *gpu*; see ``simulate``.

    Raises:
        StepError: it cannot be loaded, or does something that ``meta`` tensors cannot follow.
        OutOfMemory: it does not fit in *capacity_bytes*.
    """
    make_step = load_step(reference)
    register_quantization()
    try:
        return simulate(make_step, gpu, capacity_bytes, expandable_segments=expandable_segments)
    except OutOfMemory:
        raise
    except (Exception, SystemExit) as error:
        raise StepError(f"{reference} cannot be simulated{_place(error, reference)}: {_reason(error)}") from error


def measured(reference: str, device_name: str) -> MemoryRecord:
    """What the step that ``FILE.py:FUNCTION`` makes really takes; see ``measure``.

    Raises:
        StepError: it cannot be loaded, it fails, or the device is not there.
    """
    make_step = load_step(reference)
    try:
        return measure(make_step, device_name)
    except StepError:
        raise
    except (Exception, SystemExit) as error:
        raise StepError(f"{reference} fails on {device_name}{_place(error, reference)}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _place(error: BaseException, reference: str) -> str:
    """The last line of the user's own file on the way to *error*."""
    path = Path(reference.rpartition(":")[0]).resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path]
    return f" (line {lines[-1]})" if lines else ""


def measure(make_step: MakeStep, device_name: str) -> MemoryRecord:
    """What the step that ``make_step(device)`` returns really takes on *device_name*, ``cpu`` or ``cuda``.

    Raises:
        StepError: the device is not there.
    """
    if device_name == "cuda" and not torch.cuda.is_available():
        raise StepError("this machine has no CUDA device; measure with --device cpu")
    device = torch.device(device_name)
    return _measure_cuda(make_step, device) if device.type == "cuda" else _measure_cpu(make_step, device)


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    for _ in range(NUM_TIMED_STEPS):
        watch = Stopwatch(device)
        step()
        times.append(watch.seconds())
    return statistics.median(times)


def _measure_cuda(make_step: MakeStep, device: torch.device) -> MemoryRecord:
    step = make_step(str(device))
    for _ in range(NUM_WARMUP_STEPS):
        step()
    torch.cuda.synchronize(device)
    resident, reserved_before = torch.cuda.memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(step, device)
    free, total = torch.cuda.mem_get_info(device)
    reserved = max(reserved_before, torch.cuda.max_memory_reserved(device))
    context = total - free - torch.cuda.memory_reserved(device)
    return _record(
        torch.cuda.get_device_name(device),
        resident,
        torch.cuda.max_memory_allocated(device),
        reserved,
        reserved + context,
        seconds,
    )


def _measure_cpu(make_step: MakeStep, device: torch.device) -> MemoryRecord:
    """From the reports of the CPU's allocator, which start before the step is made."""
    made: list[Callable[[], Any]] = []

    def build() -> None:
        made.append(make_step(str(device)))

    def step() -> None:
        made[0]()

    levels = allocator_levels([build, *[step] * (NUM_WARMUP_STEPS + 1)])
    resident = levels[-2][-1]
    peak = max(levels[-1], default=resident)
    highest = max(max(part, default=0) for part in levels)
    return _record(str(device), resident, max(peak, resident), highest, highest, _seconds(made[0], device))


def _record(device: str, resident: int, allocated: int, reserved: int, process: int, seconds: float) -> MemoryRecord:
    return MemoryRecord(
        format_version=RECORD_VERSION,
        kind="measured",
        device=device,
        resident_bytes=resident,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        peak_process_bytes=process,
        peak_phase="",
        peak_module="",
        step_seconds=seconds,
        phases=(),
        categories=(),
    )
