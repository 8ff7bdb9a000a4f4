"""The caching allocator with expandable segments: pages mapped where they are needed."""

from __future__ import annotations

from bisect import bisect_left

from .allocator import (
    ADDRESS_BITS,
    LARGE_SEGMENT_BYTES,
    MIN_BLOCK_BYTES,
    SMALL_SEGMENT_BYTES,
    SPACE,
    Block,
    CachingAllocator,
    OutOfMemory,
)


class _NoRoom(Exception):
    """A page that cannot be mapped before others are unmapped."""


class ExpandableAllocator(CachingAllocator):
    """The same with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.

    Each pool is one stretch of addresses, of which pages are mapped where they are needed; so free blocks side by side
    can always join, and a request that no free block holds extends one.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        super().__init__(capacity_bytes)
        self._first = (Block(0, SPACE, False, mapped=False), Block(0, SPACE, True, mapped=False))

    def empty_cache(self) -> None:
        """Unmap every whole page that lies inside a free block."""
        for block in list(self._by_key.values()):
            page = _page(block.small)
            start = -(-block.address // page) * page
            end = (block.address + block.size) // page * page
            if end > start:
                self._remove_free(block)
                self._unmap(block, start, end)

    def _unmap(self, block: Block, start: int, end: int) -> None:
        self.reserved_bytes -= end - start
        before, after = start - block.address, block.address + block.size - end
        if before:
            head = Block(block.address, before, block.small)
            previous = block.previous
            if previous is None:
                head.next, block.previous = block, head
                self._set_first(head)
            else:
                head.link(previous)
            self._add_free(head)
        block.address, block.size = start, end - start
        block.mapped = False
        if after:
            tail = Block(end, after, block.small)
            tail.link(block)
            self._add_free(tail)
        elif block.next is not None and not block.next.mapped:
            block.absorb_next()
        if block.previous is not None and not block.previous.mapped:
            block.previous.absorb_next()

    def _set_first(self, block: Block) -> None:
        large, small = self._first
        self._first = (large, block) if block.small else (block, small)

    def _take_cached(self, size: int, small: bool) -> Block | None:
        """Best fit, where a block that can grow counts as large as it can become."""
        pool = self._free[small]
        index = bisect_left(pool, size << ADDRESS_BITS)
        if index == len(pool):
            return None
        block = self._by_key[pool[index]]
        for key in pool[index + 1 :]:
            following = self._by_key[key]
            if _reach(following) >= _reach(block):
                break
            block = following
        self._remove_free(block)
        return block

    def _worth_splitting(self, rest: int, small: bool) -> bool:
        return rest >= MIN_BLOCK_BYTES

    def _grow(self, size: int, small: bool) -> Block:
        """Map pages behind the first free or unmapped stretch that is long enough."""
        while True:
            block = self._stretch(size, small)
            missing = size - (block.size if block.mapped else 0)
            try:
                if not block.mapped:
                    block = self._map(block, min(block.size, size))
                while block.size < size:
                    following = block.next
                    assert following is not None
                    block = self._map(following, min(size - block.size, following.size))
            except _NoRoom:
                before = self.reserved_bytes
                self.num_retries += 1
                self.empty_cache()
                if self.reserved_bytes == before:
                    capacity = self.capacity_bytes or 0
                    raise OutOfMemory(missing, self.allocated_bytes, before, capacity) from None
                continue
            self._remove_free(block)
            return block

    def _stretch(self, size: int, small: bool) -> Block:
        block: Block | None = self._first[small]
        while block is not None:
            if not block.mapped:
                start = block.previous if block.previous is not None and block.previous.free else block
                room = 0
                last: Block | None = start
                while room < size and last is not None and (last.free or not last.mapped):
                    room += last.size
                    last = last.next
                if room >= size:
                    return start
            block = block.next
        raise AssertionError("the address space is larger than any request")

    def _map(self, block: Block, num_bytes: int) -> Block:
        """Map the pages that hold the first *num_bytes* of an unmapped block, and join them with what is free."""
        page = _page(block.small)
        mapped = min(block.size, -(-(block.address + num_bytes) // page) * page - block.address)
        if self.capacity_bytes is not None and self.reserved_bytes + mapped > self.capacity_bytes:
            raise _NoRoom
        self.reserved_bytes += mapped
        if mapped < block.size:
            rest = Block(block.address + mapped, block.size - mapped, block.small, mapped=False)
            rest.link(block)
            block.size = mapped
        block.mapped = True
        previous = block.previous
        self._join(block)
        return previous if previous is not None and previous.free else block


def _page(small: bool) -> int:
    return SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES


def _reach(block: Block) -> int:
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)
