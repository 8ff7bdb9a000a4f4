"""A simulator of PyTorch's CUDA caching allocator: what it reserves for a stream of allocations and frees.

The rules and constants are those of ``c10/cuda/CUDACachingAllocator`` in PyTorch 2.13 for one stream, with its default
settings and with ``expandable_segments:True``; no ``max_split_size``, no garbage collection.

Among free blocks of one size the allocator takes the one at the lowest address, so it matters where segments lie. The
driver maps each new one below those before it, as Linux's ``mmap`` does from the top of the address space down. With
rising addresses the same replay misses the reserved bytes of recorded T4 steps with eager attention by up to 9 %; with
falling ones it gives them to the MiB (`make accuracy`).
"""

from __future__ import annotations

from bisect import bisect_left, insort

from shallowflow.planner.memory_record import OutOfDeviceMemory

MIN_BLOCK_BYTES = 512
"""Every request is rounded up to a multiple of this."""
SMALL_BYTES = 1 << 20
"""Largest request that the small pool serves."""
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
MIN_LARGE_BYTES = 10 << 20
"""From here on, a segment is as large as its request, rounded up."""
ROUND_LARGE_BYTES = 2 << 20

EMPTY_CACHE = 0
"""The event of ``torch.cuda.empty_cache()``."""

ADDRESS_BITS = 47
"""Of a process's virtual memory; a free block's key is its size above its address."""
SPACE = 1 << (ADDRESS_BITS - 1)


class OutOfMemory(OutOfDeviceMemory):
    """The allocation that did not fit.

    Attributes:
        requested_bytes, allocated_bytes, reserved_bytes, capacity_bytes: as CUDA's message gives them.
        event: the position in a replayed stream; None outside of one.
        where: the phase and module that asked, where they are known.
    """

    def __init__(self, requested: int, allocated: int, reserved: int, capacity: int, event: int | None = None) -> None:
        self.requested_bytes = requested
        self.allocated_bytes = allocated
        self.reserved_bytes = reserved
        self.capacity_bytes = capacity
        self.event = event
        self.where = ""
        super().__init__(requested, allocated, reserved, capacity)

    def __str__(self) -> str:
        """CUDA's message, with the place before it."""
        return (
            f"out of memory{self.where}: tried to allocate {_mib(self.requested_bytes)} where "
            f"{_mib(self.capacity_bytes - self.reserved_bytes)} of {_mib(self.capacity_bytes)} were free; "
            f"{_mib(self.allocated_bytes)} were allocated, "
            f"{_mib(self.reserved_bytes - self.allocated_bytes)} reserved but unallocated"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"


class Block:
    """A stretch of a segment; neighbours are linked so that free ones can join."""

    __slots__ = ("address", "free", "mapped", "next", "previous", "size", "small")

    def __init__(self, address: int, size: int, small: bool, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.mapped = mapped
        self.previous: Block | None = None
        self.next: Block | None = None

    def link(self, after: Block) -> None:
        """Put this block behind *after*."""
        self.previous, self.next = after, after.next
        if after.next is not None:
            after.next.previous = self
        after.next = self

    def absorb_next(self) -> None:
        """Take the next block's bytes and place."""
        after = self.next
        assert after is not None
        self.size += after.size
        self.next = after.next
        if after.next is not None:
            after.next.previous = self


class CachingAllocator:
    """The allocator's state; ``malloc`` and ``free`` behave as PyTorch's.

    *capacity_bytes* bounds what it may reserve, as the memory left beside the CUDA context does; None is no bound.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.num_retries = 0
        self._lowest_address = (1 << ADDRESS_BITS) - 1
        self._blocks: dict[int, Block] = {}
        self._free: tuple[list[int], list[int]] = ([], [])
        self._by_key: dict[int, Block] = {}

    def malloc(self, key: int, num_bytes: int) -> int:
        """Serve a request and return the size of the block given.

        Raises:
            OutOfMemory: it does not fit even after giving cached segments back.
        """
        size = -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES or MIN_BLOCK_BYTES
        small = size <= SMALL_BYTES
        block = self._take_cached(size, small) or self._grow(size, small)
        if self._worth_splitting(block.size - size, small):
            rest = Block(block.address + size, block.size - size, small)
            rest.link(block)
            block.size = size
            self._add_free(rest)
        self._blocks[key] = block
        self.allocated_bytes += block.size
        return block.size

    def free(self, key: int) -> None:
        """Return the block of *key* to its pool, joined with free neighbours."""
        block = self._blocks.pop(key)
        self.allocated_bytes -= block.size
        self._join(block)

    def empty_cache(self) -> None:
        """Give back every segment that holds no block in use."""
        for block in list(self._by_key.values()):
            if block.previous is None and block.next is None:
                self._remove_free(block)
                self.reserved_bytes -= block.size

    def _join(self, block: Block) -> None:
        """Make *block* free and one with its free neighbours."""
        before = block.previous
        if before is not None and before.free:
            self._remove_free(before)
            before.absorb_next()
            block = before
        after = block.next
        if after is not None and after.free:
            self._remove_free(after)
            block.absorb_next()
        self._add_free(block)

    def _add_free(self, block: Block) -> None:
        block.free = True
        key = block.size << ADDRESS_BITS | block.address
        self._by_key[key] = block
        insort(self._free[block.small], key)

    def _remove_free(self, block: Block) -> None:
        block.free = False
        key = block.size << ADDRESS_BITS | block.address
        del self._by_key[key]
        pool = self._free[block.small]
        del pool[bisect_left(pool, key)]

    def _take_cached(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        index = bisect_left(pool, size << ADDRESS_BITS)
        if index == len(pool):
            return None
        block = self._by_key.pop(pool.pop(index))
        block.free = False
        return block

    def _worth_splitting(self, rest: int, small: bool) -> bool:
        return rest >= MIN_BLOCK_BYTES if small else rest > SMALL_BYTES

    def _grow(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            segment = LARGE_SEGMENT_BYTES
        else:
            segment = -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        self._reserve(segment)
        self._lowest_address -= segment
        return Block(self._lowest_address, segment, small)

    def _reserve(self, num_bytes: int) -> None:
        """Count *num_bytes* as reserved, after giving cached segments back if they do not fit otherwise."""
        if self.capacity_bytes is not None and self.reserved_bytes + num_bytes > self.capacity_bytes:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved_bytes + num_bytes > self.capacity_bytes:
                raise OutOfMemory(num_bytes, self.allocated_bytes, self.reserved_bytes, self.capacity_bytes)
        self.reserved_bytes += num_bytes
