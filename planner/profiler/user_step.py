"""Simulate any training step, given as ``make_step(device)``: it builds everything and returns a callable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from shallowflow.planner import latency
from shallowflow.planner.costs import OP_KINDS, Ints
from shallowflow.planner.memory_record import RECORD_VERSION, CategoryBytes, MemoryRecord, PhasePeak
from shallowflow.profiles import GpuSpec, load_gpu

from .allocator import OutOfMemory
from .attribution import by_category, live_at, timeline
from .kernels import Target
from .operators import OpCost
from .recording import recording
from .replay import Replay, replay
from .simulate import exact
from .trace import Recorder, Trace

MakeStep = Callable[[str], Callable[[], Any]]
NUM_STEPS = 3
"""The first step creates optimizer state, the last is steady."""

LATE_PHASES = ("evaluate", "save")
"""Attributes of the step that are called after it, if it has them, so that what they take is seen too."""


def simulate(
    make_step: MakeStep,
    gpu: GpuSpec | str,
    capacity_bytes: int | None = None,
    *,
    expandable_segments: bool = False,
) -> MemoryRecord:
    """What the step that ``make_step("meta")`` returns takes on *gpu*, from process start to the steady step.

    If the returned callable has the attributes ``evaluate`` or ``save``, they are called after the steps.

    Args:
        make_step: builds model, data and optimizer on the device it is given; returns a function that runs one step.
        gpu: a GPU or its name.
        capacity_bytes: what the allocator may reserve, as the device's memory less the CUDA context; None is no bound.
        expandable_segments: as with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.

    Raises:
        FactsError: no GPU is called so.
        OutOfMemory: the step does not fit in *capacity_bytes*; it says in which phase and module.
    """
    gpu = load_gpu(gpu) if isinstance(gpu, str) else gpu
    trace = _trace(make_step, Target.of(gpu))
    end = next(position for position, label in trace.marks if label == "end")
    events = trace.events[:end]
    if gpu.device_type != "cuda":
        return _record(trace, exact(events, trace.sizes), end, gpu)
    try:
        played = replay(events, trace.sizes, capacity_bytes, expandable_segments=expandable_segments)
    except OutOfMemory as error:
        error.where = _where(trace, error.event or 0)
        raise
    return _record(trace, played, end, gpu)


def simulate_accumulated(make_step: MakeStep, gpu: GpuSpec) -> tuple[MemoryRecord, float]:
    """``simulate`` in two steps, of which the first makes the optimizer's state, and the seconds of the update.

    The update is the optimizer's own step: it is there once, however many micro-batches come before it. What building
    takes is left out, as a model that is loaded is quantized weight by weight.
    """
    step = make_step("meta")
    trace = _trace(lambda _device: step, Target.of(gpu), num_steps=2)
    end = next(position for position, label in trace.marks if label == "end")
    events = trace.events[:end]
    played = replay(events, trace.sizes) if gpu.device_type == "cuda" else exact(events, trace.sizes)
    start = [position for position, label in trace.marks if label == "optimizer"][-1]
    stop = [position for position, label in trace.marks if label == "end optimizer"][-1]
    # from the mark on, as an update in place allocates nothing: what shares its position is the gradients' clipping
    update = [cost for position, cost in trace.ops if start <= position <= stop]
    return _record(trace, played, end, gpu), latency.stretch_seconds(*operator_arrays(update), gpu)


def steady_operators(make_step: MakeStep, target: Target) -> tuple[Ints, Ints, Ints]:
    """Kinds (indices into OP_KINDS), operations and bytes of every operator of the steady step; (operators,) each."""
    trace = _trace(make_step, target)
    return operator_arrays(_steady(trace))


def _steady(trace: Trace) -> list[OpCost]:
    start = _steady_start(trace)
    stop = next(position for position, label in trace.marks if label == "steady end")
    return [cost for position, cost in trace.ops if start < position <= stop]


def _steady_start(trace: Trace) -> int:
    """Where the last step begins."""
    return max(position for position, label in trace.marks if label.startswith("step "))


def operator_arrays(ops: Sequence[OpCost]) -> tuple[Ints, Ints, Ints]:
    """(kinds, flops, bytes) of *ops*, as the latency model takes them."""
    kinds = np.array([OP_KINDS.index(op.kind) for op in ops], dtype=np.int64)
    return kinds, np.array([op.flops for op in ops]), np.array([op.num_bytes for op in ops])


def _trace(make_step: MakeStep, target: Target, num_steps: int = NUM_STEPS) -> Trace:
    recorder = Recorder(target)
    with recording(recorder):
        recorder.mark("load")
        step = make_step("meta")
        _follow_models(recorder, step)
        for index in range(num_steps):
            recorder.phase = "forward"
            recorder.mark(f"step {index}")
            step()
        recorder.mark("steady end")
        for name in LATE_PHASES:
            late = getattr(step, name, None)
            if late is not None:
                recorder.phase = "forward"
                recorder.mark(f"late {name}")
                late()
        recorder.mark("end")
    return recorder.trace


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
                recorder.owned(parameter, parameter, "adapter" if adapter else "base weights")
                for tensor in _constants(parameter):
                    recorder.owned(parameter, tensor, "quantization constants")
            for buffer in model.buffers():
                recorder.follow(buffer, "base weights")


def _constants(parameter: torch.nn.Parameter) -> Sequence[torch.Tensor]:
    """What bitsandbytes keeps beside a quantized weight."""
    state = getattr(parameter, "quant_state", None)
    found = [getattr(parameter, "SCB", None)]
    while state is not None:
        found += [state.absmax, state.code, state.offset]
        state = state.state2
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _record(trace: Trace, played: Replay, end: int, gpu: GpuSpec) -> MemoryRecord:
    start = _steady_start(trace)
    stop = next(position for position, label in trace.marks if label == "steady end")
    steady = played.allocated_bytes[start:stop]
    if not steady:
        raise ValueError("the step allocates nothing; make_step(device) builds its model and data on that device")
    peak = max(steady)
    peak_at = start + steady.index(peak)
    reserved = max(played.reserved_bytes)
    phase, module = _place(trace, peak_at)
    live = live_at(trace, played, peak_at)
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
        step_seconds=latency.stretch_seconds(*operator_arrays(_steady(trace)), gpu),
        phases=_phases(trace, played, start, end),
        categories=tuple(
            CategoryBytes(category=name, num_bytes=num_bytes)
            for name, num_bytes in by_category(live, reserved, gpu.context_bytes)
        ),
        num_retries=played.num_retries,
        modules=live,
        timeline=timeline(trace, played, start, stop),
    )


def _place(trace: Trace, position: int) -> tuple[str, str]:
    """Phase and module of the allocation at *position*, or of the last one before it."""
    while position > 0 and trace.events[position] <= 0:
        position -= 1
    number = abs(trace.events[position]) - 1
    return trace.phases[number], trace.modules[number]


def _where(trace: Trace, position: int) -> str:
    phase, module = _place(trace, position)
    late = [label.removeprefix("late ") for p, label in trace.marks if p <= position and label.startswith("late ")]
    steps = [label for p, label in trace.marks if p <= position and label.startswith("step ")]
    during = late[-1] if late else f"{phase} of {steps[-1]}" if steps else phase
    return f" in {during}" + (f", module {module}" if module else "")


def _phases(trace: Trace, played: Replay, start: int, end: int) -> tuple[PhasePeak, ...]:
    """The highest level between one phase's mark and the next; what lies between phases counts as forward."""
    names = {"backward": "backward", "optimizer": "optimizer", "end optimizer": "forward", "end backward": "forward"}
    names.update({f"late {name}": name for name in LATE_PHASES})
    bounds = [(start, "forward")]
    bounds += [(position, names[label]) for position, label in trace.marks if position >= start and label in names]
    first_step = next(position for position, label in trace.marks if label == "step 0")
    peaks: dict[str, int] = {"load": max(played.allocated_bytes[:first_step], default=0)}
    late = ""
    for (first, name), (last, _) in itertools.pairwise([*bounds, (end, "")]):
        late = name if name in LATE_PHASES else late
        level = max(played.allocated_bytes[max(0, first - 1) : max(first, last)], default=0)
        peaks[late or name] = max(peaks.get(late or name, 0), level)
    return tuple(PhasePeak(phase=name, peak_allocated_bytes=level) for name, level in peaks.items())
