"""Trace a whole step from process start and replay it through the allocator: peaks, and what they consist of."""

from __future__ import annotations

from shallowflow.planner.memory_record import Timeline, TracedPeak
from shallowflow.planner.plan import MemoryPart

from .attribution import by_category, live_at, timeline
from .kernels import Target
from .profile import TraceableStep, mark_layers
from .recording import recording
from .replay import Replay, replay
from .trace import Recorder, Trace


def trace_step(step: TraceableStep, target: Target) -> Trace:
    """Everything that *step* allocates, from loading through two runs to an evaluation.

    The first run, with one micro-batch, creates the optimizer's state; the second shows the steady peak.
    """
    recorder = Recorder(target)
    for item in step.resident_tensors():
        number = recorder.follow(item.tensor, item.category)
        if number is not None:
            recorder.trace.owners[number] = item.path.rpartition(".")[0]
    recorder.name_modules(step.model)
    handles = mark_layers(step, recorder)
    try:
        with recording(recorder):
            for index, num_micro_batches in enumerate((1, None)):
                recorder.phase = "forward"
                recorder.mark(f"step {index}")
                step.run(num_micro_batches)
            recorder.phase = "forward"
            recorder.mark("evaluation")
            step.evaluate()
            recorder.mark("end")
    finally:
        for handle in handles:
            handle.remove()
    return recorder.trace


def traced_peak(step: TraceableStep, target: Target, context_bytes: int = 0) -> TracedPeak:
    """The peaks of *step* on *target*, and the memory of its process at the peak by category."""
    trace = trace_step(step, target)
    end = next(position for position, label in trace.marks if label == "end")
    steady = max(position for position, label in trace.marks if label.startswith("step "))
    if target.device_type == "cuda":
        played = replay(trace.events[:end], trace.sizes)
    else:
        played = exact(trace.events[:end], trace.sizes)
    last = next(position for position, label in trace.marks if label == "evaluation")
    peak_allocated = max(played.allocated_bytes[:last])
    peak_reserved = max(played.reserved_bytes)
    live = live_at(trace, played, played.allocated_bytes.index(peak_allocated))
    return TracedPeak(
        resident_bytes=played.allocated_bytes[steady - 1],
        peak_allocated_bytes=peak_allocated,
        peak_reserved_bytes=peak_reserved,
        parts=tuple(
            MemoryPart(category=name, num_bytes=num_bytes)
            for name, num_bytes in by_category(live, peak_reserved, context_bytes)
        ),
        attention=step.attention,
        evaluation_allocated_bytes=max(played.allocated_bytes[last:], default=0),
    )


def traced_timeline(step: TraceableStep, target: Target) -> Timeline:
    """The allocator over the second run of *step*."""
    trace = trace_step(step, target)
    end = next(position for position, label in trace.marks if label == "evaluation")
    start = max(position for position, label in trace.marks if label.startswith("step "))
    play = replay if target.device_type == "cuda" else exact
    return timeline(trace, play(trace.events[:end], trace.sizes), start, end)


def exact(events: list[int], sizes: list[int]) -> Replay:
    """An allocator that gives every request just its bytes and keeps nothing, as a CPU's is counted."""
    level = 0
    levels: list[int] = []
    for event in events:
        if event:
            level += sizes[event - 1] if event > 0 else -sizes[-event - 1]
        levels.append(level)
    return Replay(levels, levels, list(sizes))
