"""One cell on one device: what is predicted of it, and what it really takes under a T4's rules."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shallowflow.planner.profiler.allocator import OutOfMemory
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles.load import load_gpu
from shallowflow.profiles.specs import GpuSpec

from . import cells
from .cells import Cell
from .heap import keeping_freed_memory
from .meter import allocator_levels

NUM_WARMUP_STEPS = 2
NUM_TIMED_STEPS = 5
MOST_SEQUENCES = 256
"""Beyond any micro-batch that fits under a T4's cap at the lengths tried."""


@dataclass(slots=True)
class Rules:
    """What the device is held to.

    Attributes:
        gpu: whose memory and kernels are predicted: a T4 with this device's compute capability, or the CPU.
        capacity_bytes: what the allocator may reserve; None on a CPU.
    """

    device: torch.device
    gpu: GpuSpec
    compute_dtype: str
    capacity_bytes: int | None
    deadline: float
    notes: list[str] = field(default_factory=list)

    def out_of_time(self) -> bool:
        """Whether nothing more should be begun."""
        return time.perf_counter() > self.deadline


def rules_for(device: torch.device, minutes: float) -> Rules:
    """Cap *device* as a T4; on a CPU there is nothing to cap."""
    deadline = time.perf_counter() + 60 * minutes
    if device.type == "cpu":
        return Rules(device, load_gpu("cpu"), "float32", None, deadline)
    t4 = load_gpu("t4")
    total = torch.cuda.get_device_properties(device).total_memory
    capacity = t4.memory_bytes - t4.context_bytes
    notes: list[str] = []
    if total > t4.memory_bytes:
        torch.cuda.set_per_process_memory_fraction(capacity / total, device)
    else:
        capacity = total - t4.context_bytes
        notes.append(f"not capped: the device has {total / 2**20:,.0f} MiB in all")
    gpu = replace(t4, compute_capability=torch.cuda.get_device_capability(device))
    return Rules(device, gpu, "float16", capacity, deadline, notes)


# Predictions, all made before anything runs


def predicted(cell: Cell, rules: Rules) -> dict[str, Any]:
    """What is expected of *cell*: bytes and seconds, or that it does not fit."""
    try:
        record = simulate(cells.step_of(cell, rules.compute_dtype), rules.gpu, rules.capacity_bytes)
    except OutOfMemory as error:
        return {"outcome": "out of memory", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - such as an operator that these versions lack
        return failed(error)
    return {
        "outcome": "ran",
        "resident_bytes": record.resident_bytes,
        "peak_allocated_bytes": record.peak_allocated_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
        "peak_process_bytes": record.peak_process_bytes,
        "step_seconds": record.step_seconds,
    }


def predicted_boundary(cell: Cell, rules: Rules) -> int:
    """The largest micro-batch of *cell* whose simulated step fits; 0 if none does."""

    def fits(micro_batch_size: int) -> bool:
        outcome = predicted(replace(cell, micro_batch_size=micro_batch_size), rules)["outcome"]
        return bool(outcome == "ran")

    low, high = 0, 1
    while high <= MOST_SEQUENCES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# Measurements


def measured(cell: Cell, rules: Rules) -> dict[str, Any]:
    """What *cell* really takes."""
    make_step = cells.step_of(cell, rules.compute_dtype)
    try:
        if rules.device.type == "cuda":
            return _on_cuda(make_step, rules.device)
        with keeping_freed_memory():
            return _on_cpu(make_step)
    except torch.cuda.OutOfMemoryError as error:
        return {"outcome": "out of memory", "reason": str(error).split("\n")[0][:300]}
    except Exception as error:  # noqa: BLE001 - one cell that fails must not cost the others
        return failed(error)


def failed(error: Exception) -> dict[str, Any]:
    """What a record says of *error*: its type and the first line of its message."""
    return {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}


def _on_cpu(make_step: Callable[[str], Callable[[], Any]]) -> dict[str, Any]:
    made: list[Callable[[], Any]] = []

    def build() -> None:
        made.append(make_step("cpu"))

    def step() -> None:
        made[0]()

    levels = allocator_levels([build, *[step] * (NUM_WARMUP_STEPS + 1)])
    resident = levels[-2][-1]
    peak = max(levels[-1])
    times: list[float] = []
    for _ in range(NUM_TIMED_STEPS):
        start = time.perf_counter()
        made[0]()
        times.append(time.perf_counter() - start)
    highest = max(max(part) for part in levels)
    return _outcome(resident, peak, highest, highest, times)


def _on_cuda(make_step: Callable[[str], Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    forget(device)
    torch.cuda.reset_peak_memory_stats(device)
    step = make_step("cuda")
    skipped = sum(step().skipped for _ in range(NUM_WARMUP_STEPS))
    torch.cuda.synchronize(device)
    resident, reserved_before = torch.cuda.memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    for _ in range(NUM_TIMED_STEPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        skipped += step().skipped
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1000)
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = max(reserved_before, torch.cuda.max_memory_reserved(device))
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - torch.cuda.memory_reserved(device))
    return {**_outcome(resident, allocated, reserved, reserved + context, times), "num_skipped_steps": skipped}


def _outcome(resident: int, allocated: int, reserved: int, process: int, times: list[float]) -> dict[str, Any]:
    return {
        "outcome": "ran",
        "resident_bytes": resident,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "peak_process_bytes": process,
        "step_seconds": statistics.median(times),
        "all_step_seconds": times,
    }


def forget(device: torch.device) -> None:
    """Give everything back, the libraries' workspaces too, so that the next cell starts as a process does.

    After an error that ends a CUDA context nothing can be given back; what is run next fails and says so.
    """
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()


def measured_boundary(cell: Cell, guess: int, rules: Rules) -> int | None:
    """The largest micro-batch that really runs, looked for from *guess* on; None if it was not found in time."""

    def runs(micro_batch_size: int) -> bool:
        outcome = measured(replace(cell, micro_batch_size=micro_batch_size), rules)["outcome"]
        forget(rules.device)
        return bool(outcome == "ran")

    largest = guess
    while largest and not runs(largest):
        largest -= 1
        if rules.out_of_time():
            return None
    if largest < guess:
        return largest
    while largest < MOST_SEQUENCES and runs(largest + 1):
        largest += 1
        if rules.out_of_time():
            return None
    return largest
