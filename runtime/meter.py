"""Measure what a step takes: time and peak memory, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd.profiler import profile, record_function

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPeak:
    """What a device said of one step.

    Attributes:
        resident_bytes: in live tensors before the step.
        peak_allocated_bytes: most bytes in live tensors during it.
        peak_reserved_bytes: held by the caching allocator; equal to allocated on a CPU, which keeps no cache.
    """

    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


def highest(peaks: Sequence[MeasuredPeak]) -> MeasuredPeak:
    """Of several devices the most that any of them said, quantity by quantity."""
    return MeasuredPeak(
        resident_bytes=max(peak.resident_bytes for peak in peaks),
        peak_allocated_bytes=max(peak.peak_allocated_bytes for peak in peaks),
        peak_reserved_bytes=max(peak.peak_reserved_bytes for peak in peaks),
    )


def measure_peak(
    run: Callable[[], T], resident: Iterable[torch.Tensor], device: torch.device
) -> tuple[T, MeasuredPeak]:
    """Run *run* once and return its result and its peak memory.

    On CUDA the allocator's own counters are read. On a CPU the allocator reports each allocation and free to
    PyTorch's profiler; *resident* are the tensors that live already, which those reports do not cover.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, MeasuredPeak(
            resident_bytes=before,
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
        )
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in resident}
    before = sum(storages.values())
    with _silent_stderr(), profile(profile_memory=True) as recorded:
        result = run()
    peak = before + _highest(recorded, storages)
    return result, MeasuredPeak(resident_bytes=before, peak_allocated_bytes=peak, peak_reserved_bytes=peak)


def allocator_levels(parts: Iterable[Callable[[], Any]]) -> list[list[int]]:
    """Run *parts* one after the other and return, for each, the CPU allocator's running total after every event.

    A part without events has the level that it began with.
    """
    marks: list[int] = []
    with _silent_stderr(), profile(profile_memory=True) as recorded:
        for index, part in enumerate(parts):
            with record_function(f"{_MARK}{index}"):
                part()
            marks.append(index)
    assert recorded.kineto_results is not None
    events: list[Any] = recorded.kineto_results.events()
    ends = sorted(e.start_ns() + e.duration_ns() for e in events if e.name().startswith(_MARK))
    reports = _reports(recorded)
    levels: list[list[int]] = []
    level, position = 0, 0
    for end in ends:
        part_levels = [level]
        while position < len(reports) and reports[position][0] <= end:
            level += reports[position][1]
            part_levels.append(level)
            position += 1
        levels.append(part_levels)
    assert len(levels) == len(marks)
    return levels


_MARK = "shallowflow part "


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Kineto announces start and stop on the process's standard error, below Python; Python's own is kept."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _reports(recorded: profile, resident: Collection[int] = ()) -> list[tuple[int, int]]:
    """When (ns) and by how many bytes the CPU allocator's total changed, in order; *resident* are addresses.

    What was allocated under an earlier profile and is freed under this one is reported too, but counts only where it
    is resident.
    """
    results = recorded.kineto_results
    assert results is not None
    found: list[tuple[int, int, int]] = []
    pending: list[Any] = list(reversed(results.experimental_event_tree()))
    while pending:
        event = pending.pop()
        pending.extend(reversed(event.children))
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    found.sort(key=lambda report: report[0])
    reports: list[tuple[int, int]] = []
    live = set(resident)
    for when, address, num_bytes in found:
        if num_bytes > 0:
            live.add(address)
        elif address not in live:
            continue
        else:
            live.remove(address)
        reports.append((when, num_bytes))
    return reports


def _highest(recorded: profile, resident: Collection[int]) -> int:
    """The highest running total of the CPU allocator's reports."""
    level = highest = 0
    for _, num_bytes in _reports(recorded, resident):
        level += num_bytes
        highest = max(highest, level)
    return highest


class Stopwatch:
    """Seconds since it was made, with the device's pending work finished first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self) -> float:
        """Elapsed so far."""
        return self._now() - self.start
