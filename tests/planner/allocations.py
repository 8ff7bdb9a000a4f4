"""Streams of allocations and frees."""

from __future__ import annotations

from hypothesis import strategies as st

KIB, MIB = 2**10, 2**20

REQUESTS = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(1, 45 * MIB),
    st.sampled_from([4 * MIB, 5 * MIB, 6 * MIB]),
    st.sampled_from([512, MIB - 512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 19 * MIB, 20 * MIB, 21 * MIB]),
)


@st.composite
def streams(draw: st.DrawFn, max_size: int = 60) -> tuple[list[int], list[int]]:
    """(events, sizes) in which everything freed was allocated before, and once."""
    sizes: list[int] = []
    events: list[int] = []
    live: list[int] = []
    for wants_free in draw(st.lists(st.booleans(), max_size=max_size)):
        if wants_free and live:
            events.append(-live.pop(draw(st.integers(0, len(live) - 1))))
        else:
            sizes.append(draw(REQUESTS))
            live.append(len(sizes))
            events.append(len(sizes))
    return events, sizes


def rounded(num_bytes: int, unit: int) -> int:
    """Up to a multiple of *unit*."""
    return -(-num_bytes // unit) * unit
