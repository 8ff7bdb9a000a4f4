"""Simulate any training step, given as ``make_step(device)``: it builds everything and returns a callable."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from shallowflow.planner.memory_record import RECORD_VERSION, CategoryBytes, MemoryRecord, PhasePeak
from shallowflow.profiles import GpuSpec, load_gpu

from .allocator import Replay, replay
from .kernels import Target
from .simulate import CATEGORIES, exact
from .trace import Recorder, Trace, recording

MakeStep = Callable[[str], Callable[[], Any]]
NUM_STEPS = 3
"""The first step creates optimizer state, the last is steady."""


def simulate(make_step: MakeStep, gpu: GpuSpec | str, capacity_bytes: int | None = None) -> MemoryRecord:
    """What the step that ``make_step("meta")`` returns takes on *gpu*, from process start to the steady step.

    *capacity_bytes* bounds what the allocator may reserve, as the device's memory less the CUDA context would; None
    is no bound.

    Raises:
        FactsError: no GPU is called so.
        OutOfMemory: the step does not fit in *capacity_bytes*.
    """
    gpu = load_gpu(gpu) if isinstance(gpu, str) else gpu
    recorder = Recorder(Target.of(gpu))
    recorder.phase = "load"
    with recording(recorder):
        recorder.mark("load")
        step = make_step("meta")
        _follow_models(recorder, step)
        for index in range(NUM_STEPS):
            recorder.phase = "forward"
            recorder.mark(f"step {index}")
            step()
        recorder.mark("end")
    trace = recorder.trace
    end = next(position for position, label in trace.marks if label == "end")
    events = trace.events[:end]
    played = replay(events, trace.sizes, capacity_bytes) if gpu.device_type == "cuda" else exact(events, trace.sizes)
    return _record(trace, played, end, gpu)


def _follow_models(recorder: Recorder, step: Callable[[], Any]) -> None:
    """Name the parameters of every model that the step's closure holds, for the categories."""
    held = [cell.cell_contents for cell in getattr(step, "__closure__", None) or ()]
    held += list(vars(step).values()) if hasattr(step, "__dict__") else []
    owner = getattr(step, "__self__", None)
    held += list(vars(owner).values()) if owner is not None and hasattr(owner, "__dict__") else []
    for model in held:
        if isinstance(model, torch.nn.Module):
            recorder.name_modules(model)
            trains_all = all(p.requires_grad for p in model.parameters())
            for parameter in model.parameters():
                adapter = parameter.requires_grad and not trains_all
                recorder.follow(parameter, "adapter" if adapter else "base weights")
            for buffer in model.buffers():
                recorder.follow(buffer, "base weights")


def _record(trace: Trace, played: Replay, end: int, gpu: GpuSpec) -> MemoryRecord:
    start = next(position for position, label in trace.marks if label == f"step {NUM_STEPS - 1}")
    steady = played.allocated_bytes[start:end]
    peak = max(steady)
    peak_at = start + steady.index(peak)
    reserved = max(played.reserved_bytes)
    phase, module = _place(trace, peak_at)
    live = _categories(trace, played, peak_at)
    live["fragmentation"] = reserved - peak
    live["context"] = gpu.context_bytes
    return MemoryRecord(
        format_version=RECORD_VERSION,
        kind="simulated",
        device=gpu.name,
        resident_bytes=played.allocated_bytes[start - 1] if start else 0,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        peak_process_bytes=reserved + gpu.context_bytes,
        peak_phase=phase,
        peak_module=module,
        step_seconds=None,
        phases=_phases(trace, played, start, end),
        categories=tuple(CategoryBytes(category=c, num_bytes=live[c]) for c in CATEGORIES if live[c]),
    )


def _place(trace: Trace, position: int) -> tuple[str, str]:
    number = abs(trace.events[position]) - 1
    return trace.phases[number], trace.modules[number]


def _phases(trace: Trace, played: Replay, start: int, end: int) -> tuple[PhasePeak, ...]:
    """The highest level between one phase's mark and the next; what lies between phases counts as forward."""
    names = {"backward": "backward", "optimizer": "optimizer", "end optimizer": "forward", "end backward": "forward"}
    bounds = [(start, "forward")]
    bounds += [(position, names[label]) for position, label in trace.marks if position >= start and label in names]
    peaks: dict[str, int] = {}
    for (first, name), (last, _) in itertools.pairwise([*bounds, (end, "")]):
        level = max(played.allocated_bytes[max(0, first - 1) : max(first, last)], default=0)
        peaks[name] = max(peaks.get(name, 0), level)
    return tuple(PhasePeak(phase=name, peak_allocated_bytes=level) for name, level in peaks.items())


def _categories(trace: Trace, played: Replay, peak_at: int) -> Counter[str]:
    live: set[int] = set()
    for event in trace.events[: peak_at + 1]:
        if event > 0:
            live.add(event - 1)
        else:
            live.discard(-event - 1)
    by_phase = {"forward": "activations", "load": "base weights"}
    totals: Counter[str] = Counter()
    for number in live:
        category = trace.categories.get(number) or by_phase.get(trace.phases[number], "temporaries")
        totals[category] += played.block_bytes[number]
    return totals
