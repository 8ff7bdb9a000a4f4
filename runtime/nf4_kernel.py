"""nf4 weights into numbers, element by element, as a Triton kernel: bound by the bytes that it reads and writes.

Two weights to a byte, the first in its upper half; each is an entry of nf4's table times the constant of its block, in
fp32, rounded once. bitsandbytes does the same, so that the results are alike to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

PROGRAM_BYTES = 1024
"""Packed bytes that one program unpacks."""
MOST_ELEMENTS = 2**31 - 2 * PROGRAM_BYTES
"""Places are counted in 32 bits."""


@functools.cache
def kernel() -> Any:
    """The compiled-on-demand function; ImportError where there is no Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def unpack(
        packed: Any, absmax: Any, table: Any, out: Any, num_elements: Any, block: tl.constexpr, at_once: tl.constexpr
    ) -> None:
        first = tl.program_id(0) * at_once
        place = first + tl.arange(0, at_once)
        pairs = tl.load(packed + place, mask=place * 2 < num_elements, other=0).to(tl.int32)
        scale = tl.load(absmax + place * 2 // block, mask=place * 2 < num_elements, other=0)
        upper = tl.load(table + (pairs >> 4)) * scale
        lower = tl.load(table + (pairs & 15)) * scale
        where = first * 2 + tl.arange(0, at_once * 2)
        tl.store(out + where, tl.interleave(upper, lower).to(out.dtype.element_ty), mask=where < num_elements)

    return unpack


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill *out* with what *packed* stands for; *absmax* in fp32 for every *block* of weights, *table* nf4's."""
    programs = -(-packed.numel() // PROGRAM_BYTES)
    kernel()[(programs,)](packed, absmax, table, out, out.numel(), block=block, at_once=PROGRAM_BYTES)
    return out
