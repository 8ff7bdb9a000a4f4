"""The allocator's simulator against the rules of PyTorch's, and against a slow one that shares nothing with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.profiler.allocator import CachingAllocator, OutOfMemory
from shallowflow.planner.profiler.replay import replay
from tests.planner.allocations import KIB, MIB, rounded, streams


def after(events: Sequence[int]) -> list[int]:
    """*events*, and then the frees of whatever they leave."""
    freed = {-event for event in events if event < 0}
    return [*events, *(-event for event in events if event > 0 and event not in freed)]


class Naive:
    """The same rules over plain lists: segments of [size, key or None], by address, so the newest first."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.segments: list[tuple[str, list[list[int | None]]]] = []

    def reserved(self) -> int:
        return sum(size or 0 for _, pieces in self.segments for size, _ in pieces)

    def allocated(self) -> int:
        return sum(size or 0 for _, pieces in self.segments for size, key in pieces if key is not None)

    def malloc(self, key: int, request: int) -> int:
        size = max(512, rounded(request, 512))
        pool = "small" if size <= MIB else "large"
        fits = [
            (piece[0] or 0, number, index)
            for number, (kind, pieces) in enumerate(self.segments)
            for index, piece in enumerate(pieces)
            if kind == pool and piece[1] is None and (piece[0] or 0) >= size
        ]
        if not fits:
            self._grow(pool, size)
            fits = [(0, 0, 0)]
        _, number, index = min(fits)
        pieces = self.segments[number][1]
        whole = pieces[index][0] or 0
        spare = whole - size
        if (spare >= 512) if pool == "small" else (spare > MIB):
            pieces[index : index + 1] = [[size, key], [spare, None]]
            return size
        pieces[index][1] = key
        return whole

    def _grow(self, pool: str, size: int) -> None:
        larger = 20 * MIB if size < 10 * MIB else rounded(size, 2 * MIB)
        segment = 2 * MIB if pool == "small" else larger
        if self.capacity is not None and self.reserved() + segment > self.capacity:
            self.segments = [s for s in self.segments if any(key is not None for _, key in s[1])]
            if self.reserved() + segment > self.capacity:
                raise MemoryError
        self.segments.insert(0, (pool, [[segment, None]]))

    def free(self, key: int) -> None:
        for _, pieces in self.segments:
            for piece in pieces:
                if piece[1] == key:
                    piece[1] = None
            joined: list[list[int | None]] = []
            for size, owner in pieces:
                if owner is None and joined and joined[-1][1] is None:
                    joined[-1][0] = (joined[-1][0] or 0) + (size or 0)
                else:
                    joined.append([size, owner])
            pieces[:] = joined


@given(st.integers(1, MIB))
def test_a_small_request_gets_itself_rounded_up_to_512_bytes(request_bytes: int) -> None:
    """In the small pool nothing but the rounding is lost, because every rest is worth keeping."""
    allocator = CachingAllocator()

    block = allocator.malloc(1, request_bytes)

    assert block == rounded(request_bytes, 512) == allocator.allocated_bytes


@pytest.mark.parametrize(
    ("request_bytes", "segment_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (100 * MIB + 1, 102 * MIB),
    ],
)
def test_the_size_of_a_request_decides_its_segment(request_bytes: int, segment_bytes: int) -> None:
    """Up to 1 MiB comes from 2 MiB, up to 10 MiB from 20 MiB, more from itself rounded up to 2 MiB."""
    allocator = CachingAllocator()

    allocator.malloc(1, request_bytes)

    assert allocator.reserved_bytes == segment_bytes


@given(st.integers(MIB + 1, 64 * MIB))
def test_a_large_block_is_split_when_more_than_one_mebibyte_is_left(request_bytes: int) -> None:
    """A rest of up to 1 MiB stays in the block and counts as allocated; a larger one serves others."""
    allocator = CachingAllocator()

    block = allocator.malloc(1, request_bytes)

    wanted, segment = rounded(request_bytes, 512), allocator.reserved_bytes
    assert block == (wanted if segment - wanted > MIB else segment)


@pytest.mark.parametrize(("request_bytes", "block_bytes"), [(19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)])
def test_a_rest_of_exactly_one_mebibyte_stays(request_bytes: int, block_bytes: int) -> None:
    """The large pool splits above a rest of 1 MiB, not at it."""
    allocator = CachingAllocator()
    allocator.malloc(1, 20 * MIB)
    allocator.free(1)

    block = allocator.malloc(2, request_bytes)

    assert block == allocator.allocated_bytes == block_bytes


def test_the_smallest_hole_that_serves_is_taken() -> None:
    """Best fit: 20 KiB goes where 32 were, so that the other holes and the unused end still serve whole requests."""
    allocator = CachingAllocator()
    sizes = [64 * KIB, 16 * KIB, 32 * KIB, MIB]
    for key, size in enumerate(sizes):
        allocator.malloc(key, size)
        allocator.malloc(key + 10, 512)
    for key in (0, 1, 2):
        allocator.free(key)

    allocator.malloc(20, 20 * KIB)

    for key, size in ((21, 64 * KIB), (22, 16 * KIB), (23, 12 * KIB), (24, 2 * MIB - sum(sizes) - 4 * 512)):
        allocator.malloc(key, size)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 2 * MIB


@pytest.mark.parametrize("order", list(permutations([1, 2, 3, 4])))
def test_neighbours_join_in_whatever_order_they_are_freed(order: tuple[int, ...]) -> None:
    """Once all blocks of a segment are free, one request for the whole segment needs no new one."""
    allocator = CachingAllocator()
    for key in order:
        allocator.malloc(key, 5 * MIB)

    for key in order:
        allocator.free(key)

    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.malloc(9, 20 * MIB) == 20 * MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_of_equal_holes_the_newest_segment_serves() -> None:
    """The driver maps segments downwards and the lowest address goes first, so the older segment comes free whole."""
    allocator = CachingAllocator()
    for key in range(8):  # 0 to 3 fill one segment, 4 to 7 the next
        allocator.malloc(key, 5 * MIB)
    allocator.free(0)
    allocator.free(4)

    allocator.malloc(8, 5 * MIB)

    for key in (1, 2, 3):
        allocator.free(key)
    allocator.malloc(9, 20 * MIB)
    assert allocator.allocated_bytes == allocator.reserved_bytes == 40 * MIB


def test_a_full_device_gives_cached_segments_back_and_tries_again() -> None:
    """What is cached for other sizes is no reason to fail."""
    allocator = CachingAllocator(capacity_bytes=32 * MIB)
    allocator.malloc(1, 20 * MIB)
    allocator.malloc(2, 512)
    allocator.free(1)

    allocator.malloc(3, 30 * MIB)

    assert allocator.reserved_bytes == 32 * MIB
    assert allocator.allocated_bytes == 30 * MIB + 512


def test_out_of_memory_says_what_was_asked_for_and_what_was_there() -> None:
    """The exception carries the segment wanted, what is allocated and reserved, and the capacity."""
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    allocator.malloc(1, 12 * MIB)
    allocator.malloc(2, 600)

    with pytest.raises(OutOfMemory, match="out of memory") as caught:
        allocator.malloc(3, 27 * MIB)

    error = caught.value
    assert (error.requested_bytes, error.capacity_bytes) == (28 * MIB, 40 * MIB)
    assert (error.allocated_bytes, error.reserved_bytes) == (12 * MIB + 1024, 14 * MIB)


@given(streams())
def test_allocated_is_what_lives_and_reserved_covers_it(stream: tuple[list[int], list[int]]) -> None:
    """After each event allocated is the sum of live blocks, at least what they asked for, at most what is reserved."""
    events, sizes = stream

    played = replay(events, sizes)

    live: set[int] = set()
    for event, allocated, reserved in zip(events, played.allocated_bytes, played.reserved_bytes, strict=True):
        live = live | {event} if event > 0 else live - {-event}
        assert allocated == sum(played.block_bytes[key - 1] for key in live)
        assert sum(sizes[key - 1] for key in live) <= allocated <= reserved


@given(streams())
def test_all_freed_is_nothing_allocated_and_an_empty_cache_nothing_reserved(
    stream: tuple[list[int], list[int]],
) -> None:
    """Every block finds back into its whole segment, and every whole segment back to the device."""
    events, sizes = stream
    allocator = CachingAllocator()

    for event in after(events):
        if event > 0:
            allocator.malloc(event, sizes[event - 1])
        else:
            allocator.free(-event)

    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


@given(streams(), st.integers(0, 30))
def test_an_empty_cache_keeps_what_is_in_use(stream: tuple[list[int], list[int]], count: int) -> None:
    """Giving the cache back changes nothing for live blocks, and what stays reserved still covers them."""
    events, sizes = stream
    allocator = CachingAllocator()
    for event in events[:count]:
        if event > 0:
            allocator.malloc(event, sizes[event - 1])
        else:
            allocator.free(-event)
    allocated, reserved = allocator.allocated_bytes, allocator.reserved_bytes

    allocator.empty_cache()

    assert allocator.allocated_bytes == allocated <= allocator.reserved_bytes <= reserved


@given(streams())
def test_the_uncapped_peak_is_capacity_enough(stream: tuple[list[int], list[int]]) -> None:
    """A device that holds the peak reserved without a bound replays the same stream to the same numbers."""
    events, sizes = stream
    free = replay(events, sizes)

    bound = replay(events, sizes, capacity_bytes=max(free.reserved_bytes, default=0))

    assert bound == free


@given(streams())
def test_a_capacity_below_what_lives_at_once_never_suffices(stream: tuple[list[int], list[int]]) -> None:
    """No order of segments serves more than the device has."""
    events, sizes = stream
    signed = [sizes[event - 1] if event > 0 else -sizes[-event - 1] for event in events]
    needed = max(accumulate(signed), default=0)

    def play() -> None:
        replay(events, sizes, capacity_bytes=needed - 1)

    if needed:
        with pytest.raises(OutOfMemory):
            play()
    else:
        play()


@given(streams(max_size=40), st.one_of(st.none(), st.integers(2 * MIB, 120 * MIB)))
def test_it_agrees_with_a_naive_allocator(stream: tuple[list[int], list[int]], capacity: int | None) -> None:
    """Block by block, byte by byte, up to the request at which both run out of memory."""
    events, sizes = stream
    allocator, naive = CachingAllocator(capacity), Naive(capacity)

    for event in events:
        if event < 0:
            allocator.free(-event)
            naive.free(-event)
        else:
            try:
                expected = naive.malloc(event, sizes[event - 1])
            except MemoryError:
                with pytest.raises(OutOfMemory):
                    allocator.malloc(event, sizes[event - 1])
                break
            assert allocator.malloc(event, sizes[event - 1]) == expected
        assert (allocator.allocated_bytes, allocator.reserved_bytes) == (naive.allocated(), naive.reserved())
