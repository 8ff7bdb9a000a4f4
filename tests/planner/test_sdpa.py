"""Attention: which kernel a device takes, and what it allocates inside."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.planner.kernel_traces import CUDA, HEAD_SIZE, HEADS, TOKENS, empty, recorded, temporaries


@CUDA
@pytest.mark.parametrize("recompute", [False, True])
def test_attention_keeps_nothing_quadratic_in_the_tokens(gpu: str, recompute: bool) -> None:
    """With expanded heads and no mask, twice the tokens make no allocation more than twice as large."""

    def largest(tokens: int) -> int:
        def attend(x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

        def work() -> None:
            query = empty(1, HEADS, tokens, HEAD_SIZE)
            out = torch.utils.checkpoint.checkpoint(attend, query, use_reentrant=False) if recompute else attend(query)
            out.sum().backward()

        return max(recorded(gpu, work).sizes)

    assert largest(512) <= 2 * largest(256)


@pytest.mark.parametrize(
    ("gpu", "masked", "kernel"),
    [
        ("t4", False, "_scaled_dot_product_efficient_attention"),
        ("t4", True, "_scaled_dot_product_efficient_attention"),
        ("l4", False, "_scaled_dot_product_flash_attention"),
        ("l4", True, "_scaled_dot_product_efficient_attention"),
        ("cpu", False, "_scaled_dot_product_flash_attention_for_cpu"),
        ("cpu", True, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_attention_takes_the_kernel_of_the_chip(gpu: str, masked: bool, kernel: str, called: list[str]) -> None:
    """Below sm_80 the memory-efficient kernel; from there flash, unless there is a mask; a CPU has its own flash."""
    query = empty(2, HEADS, TOKENS, HEAD_SIZE)
    mask = empty(2, 1, TOKENS, TOKENS, trains=False) if masked else None

    recorded(gpu, lambda: functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))

    assert [name for name in called if "attention" in name] == [kernel]


@pytest.mark.parametrize(("gpu", "fused"), [("t4", False), ("l4", True)])
def test_grouped_heads_need_flash(gpu: str, fused: bool, called: list[str]) -> None:
    """A T4's only fused kernel refuses grouped KV heads, and the math path keeps a score per pair of tokens."""
    query, key = empty(1, HEADS, TOKENS, HEAD_SIZE), empty(1, HEADS // 2, TOKENS, HEAD_SIZE)

    trace = recorded(
        gpu, lambda: functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    )

    scores = HEADS * TOKENS * TOKENS * 2
    assert ("_scaled_dot_product_flash_attention" in called) is fused
    assert (max(trace.sizes) < scores) is fused
    assert (called.count("bmm") == 2) is not fused


@pytest.mark.parametrize(("head_size", "fused"), [(20, False), (24, True)])
def test_heads_that_do_not_align_take_the_math_path(head_size: int, fused: bool, called: list[str]) -> None:
    """The memory-efficient kernel wants rows of whole 16 bytes."""
    query = empty(1, HEADS, TOKENS, head_size)

    recorded("t4", lambda: functional.scaled_dot_product_attention(query, query, query, is_causal=True))

    assert ("_scaled_dot_product_efficient_attention" in called) is fused


@pytest.mark.parametrize("length", [128, 129])
def test_a_boolean_mask_costs_what_the_kernel_makes_of_it(length: int) -> None:
    """The mask's numbers are shared by all heads, their rows padded to a multiple of 8."""
    query = empty(2, HEADS, length, HEAD_SIZE)
    mask = empty(2, 1, length, length, dtype=torch.bool, trains=False)

    trace = recorded("t4", lambda: functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))

    padded = -(-length // 8) * 8
    assert max(trace.sizes) == 2 * length * padded * 2


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_size", "kv_heads", "expected"),
    [
        # one tile of 64 x 64 sums and a lock per 64 queries and head
        ("t4", torch.float16, 64, 32, [2 * 32 * 1024 * 4, 64 * 16 * (4 * 4096 + 16)]),
        # two such tiles, and keys' and values' sums of 200 // 64 splits
        ("t4", torch.float16, 128, 32, [2 * 32 * 1024 * 4, 64 * (32 * (4 * 4096 + 16) + 2 * 3 * 64 * 128 * 4)]),
        ("l4", torch.float16, 64, 32, [2 * 32 * 1024 * 4, 2 * 32 * 1024 * 64 * 4]),
        ("l4", torch.float16, 64, 8, [2 * 32 * 1024 * 4, 2 * 32 * 1024 * 64 * 4, *2 * [2 * 32 * 1024 * 64 * 2]]),
    ],
)
def test_attention_adds_gradients_up_in_single_precision(
    gpu: str, dtype: torch.dtype, head_size: int, kv_heads: int, expected: list[int]
) -> None:
    """The backward pass's own buffers, computed by hand from the kernels' sources."""
    query = empty(2, 32, 1024, head_size, dtype=dtype)
    key = empty(2, kv_heads, 1024, head_size, dtype=dtype)
    upstream = empty(2, 32, 1024, head_size, dtype=dtype, trains=False)

    def work() -> None:
        out = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=kv_heads != 32)
        out.backward(upstream)

    assert temporaries(recorded(gpu, work)) == expected


@pytest.mark.parametrize(("tokens", "rows"), [(16, 16), (64, 32), (200, 64), (800, 256)])
def test_a_cpus_attention_works_in_tiles(tokens: int, rows: int) -> None:
    """Per thread, a tile of scores with two numbers and an output for each row; the backward pass has two tiles."""
    query = empty(1, HEADS, tokens, HEAD_SIZE, dtype=torch.float32)
    columns, threads = min(512, tokens), torch.get_num_threads()

    def work() -> None:
        functional.scaled_dot_product_attention(query, query, query).sum().backward()

    forward, scores, sums, *_ = temporaries(recorded("cpu", work))
    assert forward == threads * rows * (columns + 2 + HEAD_SIZE) * 4
    assert (scores, sums) == (threads * 2 * rows * columns * 4, threads * rows * 4)
