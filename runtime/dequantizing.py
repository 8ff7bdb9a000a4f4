"""Which kernel dequantizes nf4 on a GPU: ours, where it is right and faster on the model's own largest weight.

Elsewhere, and where ours cannot be compiled or tried at all, bitsandbytes' does it, and plans count on no other. Both
write into memory that bitsandbytes asks for, so what a step allocates does not depend on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import nf4_kernel, quantized
from .record import DequantizeRecord

NUM_TIMED = 20
"""Runs that are timed together, after one that compiles."""

Seconds = Callable[[Callable[[], object]], float]
"""What a function takes on the device."""

_replaced: list[tuple[Any, Any]] = []
"""Where ours stands in for bitsandbytes' own, and that."""


def choose(model: torch.nn.Module, device: torch.device) -> DequantizeRecord | None:
    """Let whichever is faster dequantize *model*, which lies on *device*; None where there is nothing to choose.

    What is tried is allocated apart, so that a step finds the allocator as it is planned.
    """
    restore()
    module = _largest(model)
    if device.type != "cuda" or module is None:
        return None
    try:
        import bitsandbytes.backends.cuda.ops as home

        before = torch.cuda.memory_reserved(device)
        with torch.cuda.device(device), torch.cuda.use_mem_pool(torch.cuda.MemPool()), quantized.whole(module, "alone"):
            found = compare(module, home, nf4_kernel.dequantize, _on_device)
        if torch.cuda.memory_reserved(device) > before:
            torch.cuda.empty_cache()
    except Exception:  # noqa: BLE001 - no Triton, no compiler, another bitsandbytes: nothing is lost but a trial
        restore()
        return None
    return found


def compare(module: Any, home: Any, ours: Callable[..., object], seconds: Seconds) -> DequantizeRecord:
    """Try both on the weight of *module*; *ours* takes over in *home*, bitsandbytes' own module, if it wins."""
    theirs, state = home._dequantize_4bit_impl, module.weight.quant_state
    packed, block, constants = module.weight.data, state.blocksize, _constants(state)
    expected, made = (torch.empty(state.shape, dtype=state.dtype, device=packed.device) for _ in range(2))
    as_theirs = functools.partial(theirs, packed, constants, block, state.quant_type, state.dtype, out=expected)
    as_ours = functools.partial(ours, packed, constants, state.code, block, made)
    as_theirs()
    as_ours()
    right = torch.equal(made, expected)
    before, after = seconds(as_theirs), seconds(as_ours) if right else None
    wins = after is not None and after < before
    if wins:
        _replaced.append((home, theirs))
        home._dequantize_4bit_impl = functools.partial(_by_ours, theirs, ours, state.code)
    return DequantizeRecord(
        kernel="own" if wins else "bitsandbytes",
        num_elements=made.numel(),
        bitsandbytes_seconds=before,
        own_seconds=after,
    )


def restore() -> None:
    """Let bitsandbytes dequantize again."""
    while _replaced:
        home, theirs = _replaced.pop()
        home._dequantize_4bit_impl = theirs


def _by_ours(
    theirs: Callable[..., object],
    ours: Callable[..., object],
    table: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """``_dequantize_4bit_impl``, by *ours* for whatever that is for."""
    plain = packed.dtype == torch.uint8 and absmax.dtype == torch.float32 and packed.is_contiguous()
    countable = out.numel() % 2 == 0 and out.numel() <= nf4_kernel.MOST_ELEMENTS
    if quant_type == "nf4" and plain and countable and packed.device == table.device and out.is_contiguous():
        ours(packed, absmax, table, blocksize, out)
    else:
        theirs(packed, absmax, blocksize, quant_type, dtype, out=out)


def _constants(state: Any) -> torch.Tensor:
    """One for each block, in fp32."""
    found: torch.Tensor = state.absmax
    if state.nested:
        found = quantized.bitsandbytes().functional.dequantize_blockwise(found, state.state2)
        found += state.offset
    return found


def _largest(model: torch.nn.Module) -> Any:
    made = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and quantized.is_quantized(m)]
    return max(made, key=_num_elements, default=None)


def _num_elements(module: Any) -> int:
    return int(module.in_features * module.out_features)  # of a weight that may be elsewhere


def _on_device(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(NUM_TIMED):
        run()
    end.record()
    torch.cuda.synchronize()
    seconds: float = begin.elapsed_time(end) / 1000 / NUM_TIMED
    return seconds
