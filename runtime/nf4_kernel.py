"""nf4 weights into numbers, element by element, as a Triton kernel: bound by the bytes that it reads and writes.

Two weights to a byte, the first in its upper half; each is an entry of nf4's table times the constant of its block, in
fp32, rounded once. bitsandbytes does the same, so that the results are alike to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

BLOCKS = 32
"""Blocks of weights, with a constant each, that one program unpacks."""
MOST_ELEMENTS = 2**31 - 2**20
"""Places are counted in 32 bits, a program's beyond the last included."""


@functools.cache
def kernel() -> Any:
    """The compiled-on-demand function; ImportError where there is no Triton."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]  # reads annotations, too, and knows no others
    def unpack(packed, absmax, table, out, num_bytes, num_blocks, half: tl.constexpr, blocks: tl.constexpr):  # type: ignore[no-untyped-def]
        block = tl.program_id(0) * blocks + tl.arange(0, blocks)
        scale = tl.load(absmax + block, mask=block < num_blocks, other=0)[:, None]
        place = block[:, None] * half + tl.arange(0, half)[None, :]
        pairs = tl.load(packed + place, mask=place < num_bytes, other=0).to(tl.int32)
        upper = tl.load(table + (pairs >> 4)) * scale
        lower = tl.load(table + (pairs & 15)) * scale
        both = tl.interleave(upper, lower).to(out.dtype.element_ty)
        where = block[:, None] * (half * 2) + tl.arange(0, half * 2)[None, :]
        tl.store(out + where, both, mask=where < num_bytes * 2)

    return unpack


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """Fill *out*, of an even number of elements, with what *packed* stands for.

    *absmax* has a constant in fp32 for every *block* of them, *table* is nf4's.
    """
    programs = -(-absmax.numel() // BLOCKS)
    sizes = {"half": block // 2, "blocks": BLOCKS, "enable_fp_fusion": False}
    kernel()[(programs,)](packed, absmax, table, out, out.numel() // 2, absmax.numel(), **sizes)
