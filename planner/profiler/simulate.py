"""Trace a whole step from process start and replay it through the allocator: peaks, and what they consist of."""

from __future__ import annotations

from collections import Counter

from shallowflow.planner.plan import MemoryPart
from shallowflow.planner.solver import TracedPeak

from .allocator import Replay, replay
from .kernels import Target
from .profile import TraceableStep, mark_layers
from .trace import Recorder, Trace, recording

CATEGORIES = (
    "base weights",
    "quantization constants",
    "adapter",
    "optimizer",
    "gradients",
    "activations",
    "logits and loss",
    "temporaries",
    "workspace",
    "fragmentation",
    "context",
)
"""In the order in which they are shown."""


def trace_step(step: TraceableStep, target: Target) -> Trace:
    """Everything that *step* allocates, from loading to the end of its second run.

    The first run, with one micro-batch, creates the optimizer's state; the second shows the steady peak.
    """
    recorder = Recorder(target)
    for item in step.resident_tensors():
        recorder.follow(item.tensor, item.category)
    handles = mark_layers(step, recorder)
    try:
        with recording(recorder):
            for index, num_micro_batches in enumerate((1, None)):
                recorder.phase = "forward"
                recorder.mark(f"step {index}")
                step.run(num_micro_batches)
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
    peak_allocated = max(played.allocated_bytes)
    peak_at = played.allocated_bytes.index(peak_allocated)
    peak_reserved = max(played.reserved_bytes)
    live = _categories_at(trace, played, peak_at)
    live["fragmentation"] = peak_reserved - peak_allocated
    live["context"] = context_bytes
    return TracedPeak(
        resident_bytes=played.allocated_bytes[steady - 1],
        peak_allocated_bytes=peak_allocated,
        peak_reserved_bytes=peak_reserved,
        parts=tuple(MemoryPart(category=c, num_bytes=live[c]) for c in CATEGORIES if live[c]),
        attention=step.attention,
    )


def exact(events: list[int], sizes: list[int]) -> Replay:
    """An allocator that gives every request just its bytes and keeps nothing, as a CPU's is counted."""
    level = 0
    levels: list[int] = []
    for event in events:
        level += sizes[event - 1] if event > 0 else -sizes[-event - 1]
        levels.append(level)
    return Replay(levels, levels, list(sizes))


def _categories_at(trace: Trace, played: Replay, peak_at: int) -> Counter[str]:
    """Block bytes of each category that are live right after event *peak_at*."""
    live: set[int] = set()
    for event in trace.events[: peak_at + 1]:
        if event > 0:
            live.add(event - 1)
        else:
            live.discard(-event - 1)
    stage = _stages(trace)
    totals: Counter[str] = Counter()
    for number in live:
        totals[trace.categories.get(number) or stage[number]] += played.block_bytes[number]
    return totals


def _stages(trace: Trace) -> dict[int, str]:
    """For each allocation, what it is by the moment of its birth: activation, logits and loss, or temporary."""
    names = {"head": "logits and loss", "embed": "activations", "end backward": "temporaries"}
    bounds = [
        (p, names.get(label, "temporaries" if label.startswith("backward ") else None)) for p, label in trace.marks
    ]
    changes = [(position, name) for position, name in bounds if name]
    stage: dict[int, str] = {}
    current = "activations"
    pointer = 0
    for position, event in enumerate(trace.events):
        while pointer < len(changes) and changes[pointer][0] <= position:
            current = changes[pointer][1] or current
            pointer += 1
        if event > 0:
            stage[event - 1] = current
    return stage
