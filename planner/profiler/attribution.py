"""What every byte is: categories and module paths at one moment, and how they rise and fall over a step."""

from __future__ import annotations

from collections import Counter, defaultdict

from shallowflow.planner.memory_record import LiveBytes, Timeline

from .replay import Replay
from .trace import Trace

CATEGORIES = (
    "weights",
    "base weights",
    "quantization constants",
    "gathered weights",
    "adapter",
    "optimizer",
    "gradients",
    "inputs",
    "activations",
    "recomputed activations",
    "logits and loss",
    "temporaries",
    "workspace",
    "fragmentation",
    "context",
)
"""In the order in which they are shown."""

TIMELINE_POINTS = 400


def categories(trace: Trace) -> list[str]:
    """The category of every allocation: the one it was given, else what its birth and its end tell.

    What the forward pass makes and the backward pass still finds is an activation; what does not last so long is a
    temporary.
    """
    found = [trace.categories.get(number) or stage for number, stage in enumerate(trace.stages)]
    backward = [position for position, label in trace.marks if label == "backward"]
    born: dict[int, int] = {}
    for position, event in enumerate(trace.events):
        if event > 0:
            born[event - 1] = position
        elif event < 0 and found[-event - 1] == "activations":
            number = -event - 1
            if not any(born[number] < turn <= position for turn in backward):
                found[number] = "temporaries"
    return found


def live_at(trace: Trace, played: Replay, position: int) -> tuple[LiveBytes, ...]:
    """Every block in use right after event *position*, by category and module, largest first; sums to allocated."""
    live: set[int] = set()
    for event in trace.events[: position + 1]:
        if event > 0:
            live.add(event - 1)
        elif event < 0:
            live.discard(-event - 1)
    category = categories(trace)
    totals: Counter[tuple[str, str]] = Counter()
    for number in live:
        totals[category[number], trace.owners.get(number, trace.modules[number])] += played.block_bytes[number]
    return tuple(LiveBytes(category=c, module=m, num_bytes=n) for (c, m), n in totals.most_common())


def by_category(live: tuple[LiveBytes, ...], reserved_bytes: int, context_bytes: int) -> list[tuple[str, int]]:
    """(category, bytes) in the order in which they are shown, with what the process holds beside live blocks."""
    totals: Counter[str] = Counter()
    for part in live:
        totals[part.category] += part.num_bytes
    totals["fragmentation"] = reserved_bytes - sum(part.num_bytes for part in live)
    totals["context"] = context_bytes
    return [(name, totals[name]) for name in CATEGORIES if totals[name]]


def timeline(trace: Trace, played: Replay, start: int, end: int) -> Timeline:
    """The categories' bytes over the events from *start* to *end*, at the highest moment of every stretch."""
    category = categories(trace)
    width = max(1, -(-(end - start) // TIMELINE_POINTS))
    levels: defaultdict[str, int] = defaultdict(int)
    for event in trace.events[:start]:
        _move(levels, category, played, event)
    positions: list[int] = []
    shown: dict[str, list[int]] = {}
    for first in range(start, end, width):
        last = min(first + width, end)
        highest = max(range(first, last), key=played.allocated_bytes.__getitem__)
        for position in range(first, last):
            _move(levels, category, played, trace.events[position])
            if position == highest:
                for name in (*shown, *(n for n in levels if n not in shown)):
                    shown.setdefault(name, [0] * len(positions)).append(levels[name])
                positions.append(position - start)
    return Timeline(
        positions=tuple(positions),
        categories={name: tuple(shown[name]) for name in CATEGORIES if any(shown.get(name, ()))},
        reserved_bytes=tuple(played.reserved_bytes[start + position] for position in positions),
        phases=tuple((max(0, p - start), label) for p, label in trace.marks if start <= p < end and " " not in label),
    )


def _move(levels: defaultdict[str, int], category: list[str], played: Replay, event: int) -> None:
    if event > 0:
        levels[category[event - 1]] += played.block_bytes[event - 1]
    elif event < 0:
        levels[category[-event - 1]] -= played.block_bytes[-event - 1]
