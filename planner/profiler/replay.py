"""A recorded stream of allocations and frees, run through the simulated allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .allocator import CachingAllocator, OutOfMemory
from .expandable import ExpandableAllocator


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replayed stream came to.

    Attributes:
        allocated_bytes: whole blocks in use after each event.
        reserved_bytes: segments held after each event.
        block_bytes: per allocation, the block that it got.
        num_retries: how often cached segments had to be given back before a request could be served.
    """

    allocated_bytes: list[int]
    reserved_bytes: list[int]
    block_bytes: list[int]
    num_retries: int = 0


def replay(
    events: Sequence[int], sizes: Sequence[int], capacity_bytes: int | None = None, *, expandable_segments: bool = False
) -> Replay:
    """Run a recorded stream (see ``Trace``) through the allocator.

    Raises:
        OutOfMemory: the stream does not fit in *capacity_bytes*.
    """
    allocator = (ExpandableAllocator if expandable_segments else CachingAllocator)(capacity_bytes)
    malloc, free = allocator.malloc, allocator.free
    allocated: list[int] = []
    reserved: list[int] = []
    blocks = [0] * len(sizes)
    for event in events:
        if event > 0:
            try:
                blocks[event - 1] = malloc(event, sizes[event - 1])
            except OutOfMemory as error:
                error.event = len(allocated)
                raise
        elif event < 0:
            free(-event)
        else:
            allocator.empty_cache()
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
    return Replay(allocated, reserved, blocks, allocator.num_retries)
