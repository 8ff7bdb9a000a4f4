"""Expandable segments: the same allocator with pages mapped where they are needed, against a naive one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.profiler.allocator import EMPTY_CACHE, OutOfMemory
from shallowflow.planner.profiler.replay import replay
from tests.planner.allocations import MIB, rounded, streams


class NaivePages:
    """One pool of expandable segments as a list of live stretches and a set of mapped pages."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.live: dict[int, tuple[int, int]] = {}
        self.mapped: set[int] = set()

    def gaps(self) -> list[tuple[int, int, bool]]:
        """(start, end, mapped) of all that is not live, by address; the last one has no end."""
        taken = sorted((start, start + size) for start, size in self.live.values())
        limits = sorted({0, *(page * self.page for page in self.mapped), *((p + 1) * self.page for p in self.mapped)})
        cuts = sorted({*limits, *(edge for pair in taken for edge in pair)})
        found: list[tuple[int, int, bool]] = []
        for start, end in pairwise([*cuts, 2**45]):
            if any(first <= start < last for first, last in taken):
                continue
            mapped = start // self.page in self.mapped
            joins = found and found[-1][1:] == (start, mapped)
            found.append((found.pop()[0] if joins else start, end, mapped))
        return found

    def place(self, size: int) -> int:
        gaps = self.gaps()
        starts_unmapped = {start: end - start for start, end, mapped in gaps if not mapped}
        fits = sorted((end - start, start) for start, end, mapped in gaps if mapped and end - start >= size)
        if fits:
            reach = [length + starts_unmapped.get(start + length, 0) for length, start in fits]
            chosen = 0
            while chosen + 1 < len(fits) and reach[chosen + 1] < reach[chosen]:
                chosen += 1
            return fits[chosen][1]
        for index, (start, _, mapped) in enumerate(gaps):
            if mapped:
                continue
            first = index - 1 if index and gaps[index - 1][2] and gaps[index - 1][1] == start else index
            end = gaps[first][0]
            for gap in gaps[first:]:
                if gap[0] != end:
                    break
                end = gap[1]
            if end - gaps[first][0] >= size:
                return gaps[first][0]
        raise AssertionError

    def malloc(self, key: int, size: int) -> None:
        start = self.place(size)
        self.live[key] = (start, size)
        self.mapped |= set(range(start // self.page, -(-(start + size) // self.page)))

    def empty(self) -> None:
        for start, end, mapped in self.gaps():
            if mapped:
                self.mapped -= set(range(-(-start // self.page), end // self.page))


@given(streams(), st.sets(st.integers(0, 60), max_size=3))
def test_expandable_segments_map_the_pages_that_are_used(
    stream: tuple[list[int], list[int]], empties: set[int]
) -> None:
    """Allocated and reserved bytes after every event are those of a slow simulator over sets of pages."""
    plain, sizes = stream
    events = [e for i, event in enumerate(plain) for e in ((EMPTY_CACHE, event) if i in empties else (event,))]
    pools = (NaivePages(20 * MIB), NaivePages(2 * MIB))
    allocated, reserved = [], []
    for event in events:
        if event > 0:
            size = rounded(sizes[event - 1], 512)
            pools[size <= MIB].malloc(event, size)
        elif event < 0:
            next(pool for pool in pools if -event in pool.live).live.pop(-event)
        else:
            for pool in pools:
                pool.empty()
        allocated.append(sum(size for pool in pools for _, size in pool.live.values()))
        reserved.append(sum(len(pool.mapped) * pool.page for pool in pools))

    played = replay(events, sizes, expandable_segments=True)

    assert played.allocated_bytes == allocated
    assert played.reserved_bytes == reserved


@pytest.mark.parametrize("expandable_segments", [False, True])
@given(stream=streams())
def test_a_stream_fits_in_its_own_peak_and_in_no_less_than_it_allocates(
    stream: tuple[list[int], list[int]], expandable_segments: bool
) -> None:
    """With the reserved peak as capacity nothing is retried; with less than what is allocated, something fails."""
    events, sizes = stream
    free = replay(events, sizes, expandable_segments=expandable_segments)
    peak = max(free.reserved_bytes, default=0)

    capped = replay(events, sizes, peak, expandable_segments=expandable_segments)

    assert capped == free
    if events:
        with pytest.raises(OutOfMemory) as caught:
            replay(events, sizes, max(free.allocated_bytes) - 1, expandable_segments=expandable_segments)
        assert caught.value.event is not None and events[caught.value.event] > 0


def test_expandable_segments_give_pages_back_before_they_fail() -> None:
    """A cache of small pages is unmapped for a large request, and the retry is counted."""
    sizes = [MIB] * 30 + [25 * MIB]
    events = [*range(1, 31), *(-e for e in range(1, 31)), 31]

    played = replay(events, sizes, 40 * MIB, expandable_segments=True)

    assert played.num_retries == 1
    assert played.reserved_bytes[-1] == 40 * MIB
    assert str(_failure(events, sizes, 39 * MIB)).startswith("out of memory: tried to allocate ")


def _failure(events: list[int], sizes: list[int], capacity: int) -> OutOfMemory:
    with pytest.raises(OutOfMemory) as caught:
        replay(events, sizes, capacity, expandable_segments=True)
    return caught.value
