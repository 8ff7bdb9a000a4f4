"""What an operator costs, read from shapes: operations, bytes, and its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shallowflow.planner.costs import OP_KINDS
from shallowflow.planner.profiler import operators
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.operators import OpCost
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder
from tests import flops
from tests.runtime import tiny

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of that shape."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cost(func: Any, *args: Any) -> tuple[OpCost, ...]:
    """What calling *func* costs."""
    return operators.costs(func, args, {}, func(*args))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float32, "float32")]
)
def test_a_product_is_counted_by_its_dtype(dtype: torch.dtype, kind: str) -> None:
    """2 m k n operations; both factors read and the product written; a batch of them is a kind of its own."""
    size = dtype.itemsize

    [single] = cost(aten.mm.default, meta(3, 4, dtype=dtype), meta(4, 5, dtype=dtype))
    [batch] = cost(aten.bmm.default, meta(2, 3, 4, dtype=dtype), meta(2, 4, 5, dtype=dtype))

    assert single == OpCost(kind, 2 * 3 * 4 * 5, size * (12 + 20 + 15))
    assert batch == OpCost(f"batched {kind}", 2 * 2 * 3 * 4 * 5, 2 * size * (12 + 20 + 15))


def test_bytes_are_those_that_lie_in_memory() -> None:
    """What is expanded lies there once; a fill reads nothing; a list that changes in place is written, too."""
    wide, narrow = meta(6, 8), meta(1, 8).expand(6, 8)

    assert cost(aten.mul.Tensor, wide, narrow) == (OpCost("memory", 0, 4 * (48 + 8 + 48)),)
    assert cost(aten.zeros_like.default, wide) == (OpCost("memory", 0, 4 * 48),)
    assert cost(aten._foreach_add_.List, [meta(5), meta(7)], [meta(5), meta(7)]) == (OpCost("memory", 0, 4 * 3 * 12),)
    assert cost(aten.embedding.default, meta(100, 8), torch.zeros(3, dtype=torch.int64, device="meta")) == (
        OpCost("memory", 0, 2 * 4 * 24),
    )


@pytest.mark.parametrize("backward", [False, True])
def test_attention_that_skips_nothing_costs_twice(backward: bool) -> None:
    """Rates are of causal kernels; a mask is read by each head, by half where the other half is skipped."""
    heads, tokens, size = 3, 16, 8
    parts = [meta(2, heads, tokens, size) for _ in range(3)]
    mask = meta(2, 1, tokens, tokens)

    def attention(is_causal: bool, given: torch.Tensor | None) -> OpCost:
        func = aten._scaled_dot_product_flash_attention_for_cpu.default
        args, kwargs = [*parts, 0.0, is_causal], {"attn_mask": given}
        out, sums = func(*args, **kwargs)
        if backward:
            func = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
            args = [out, *parts, out, sums, 0.0, is_causal]
            out = func(*args, **kwargs)
        [found] = operators.costs(func, tuple(args), kwargs, out)
        return found

    plain, masked, both = attention(True, None), attention(False, mask), attention(True, mask)

    assert plain.flops == both.flops == masked.flops / 2 > 0
    read = 2 * heads * tokens * tokens * 4
    assert masked.num_bytes - both.num_bytes == read / 2
    assert both.num_bytes - plain.num_bytes == read / 2


def test_a_fused_update_reads_all_and_writes_all_but_the_gradients() -> None:
    """28 bytes a parameter."""
    lists = [[meta(100), meta(20)] for _ in range(4)]
    steps = [meta(), meta()]
    args = (*lists, [], steps)

    [found] = operators.costs(aten._fused_adamw_.default, args, {}, None)

    assert (found.kind, found.num_bytes) == ("memory", 28 * 120)


def test_an_embeddings_gradient_is_zeros_and_the_tokens_rows() -> None:
    """Not twice a table of which few rows are touched."""
    gradient, tokens = meta(5, 8), torch.zeros(5, dtype=torch.int64, device="meta")
    args = (gradient, tokens, 100, -1, False)

    [found] = operators.costs(
        aten.embedding_dense_backward.default, args, {}, aten.embedding_dense_backward.default(*args)
    )

    assert found.num_bytes == 4 * 100 * 8 + 2 * 4 * 5 * 8


def test_rows_that_are_added_to_a_table_are_all_that_moves() -> None:
    """The rest of it is not touched."""
    table, tokens, rows = meta(100, 8), torch.zeros(5, dtype=torch.int64, device="meta"), meta(5, 8)

    [found] = operators.costs(aten.index_add_.default, (table, 0, tokens, rows), {}, table)

    assert found.num_bytes == 3 * 4 * 5 * 8


def test_a_product_added_to_a_finer_sum_is_one_of_16_bits() -> None:
    """cuBLAS multiplies halves, and sums in fp32."""
    total, left, right = meta(6, 7), meta(6, 4).half(), meta(4, 7).half()
    args = (total, left, right, torch.float32)

    [found] = operators.costs(aten.addmm.dtype_out, args, {"out": total}, total)

    assert (found.kind, found.flops) == ("float16", 2 * 6 * 4 * 7)


def test_what_launches_nothing_costs_nothing() -> None:
    """Views, and PyTorch's own notes for its profiler."""
    assert operators.is_view(aten.view.default)
    assert operators.is_view(aten._unsafe_view.default)
    assert not operators.is_view(aten.mul.Tensor)


def test_a_step_has_the_operations_that_pytorch_counts() -> None:
    """Over forward, backward and update, in all, as FlopCounterMode finds them while the same step really runs.

    It has no rule for a CPU's fused attention, and is given CUDA's.
    """
    trainee, batch = tiny.trainee(), tiny.random_batch([7, 9])
    with flops.counting() as counter:
        trainee.step([batch])
    recorder = Recorder(Target(device_type="cpu"))
    simulated, same = tiny.trainee(), tiny.random_batch([7, 9])

    with recording(recorder):
        simulated.step([same])

    found = sum(op.flops for _, op in recorder.trace.ops if op.kind not in ("dequantize", "memory", "host"))
    assert found == counter.get_total_flops() > 0
    assert {op.kind for _, op in recorder.trace.ops} <= set(OP_KINDS)
    assert any(op.kind == "attention float32" for _, op in recorder.trace.ops)
