"""Gradients of large tables, added where they are kept: autograd would make each anew, as large as the table.

A head that is the embeddings has both, and its own would wait for theirs to the end of the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from shallowflow.planner.profiler.trace import device_type


def kept(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of *parameter*, zero at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_product(parameter: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
    """Add the product, times *factor*, to the gradient of *parameter*, summed and kept in its dtype.

    cuBLAS multiplies 16 bits so; a CPU's library has no such product.
    """
    held = kept(parameter)
    if right.dtype != held.dtype and device_type(right) == "cuda":
        torch.addmm(held, left, right, alpha=factor, out_dtype=held.dtype, out=held)
    else:
        torch.addmm(held, left.to(held.dtype), right.to(held.dtype), alpha=factor, out=held)


def add_rows(model: torch.nn.Module) -> None:
    """Let the plain embeddings of *model* add their tokens' gradients to the table's; on CUDA in no fixed order."""
    for module in model.modules():
        if type(module) is torch.nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
            table: Any = module
            table.forward = functools.partial(_looked_up, table)


def _looked_up(module: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
    apply: Callable[..., torch.Tensor] = _LookedUp.apply
    return apply(module.weight, tokens, module.padding_idx)


class _LookedUp(torch.autograd.Function):
    """Rows of *weight*; the row at *padding* does not learn."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, tokens: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.padding = weight, padding
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        rows = outer[0]
        if ctx.padding is not None:
            rows = rows.masked_fill((tokens == ctx.padding).unsqueeze(-1), 0.0)
        kept(ctx.weight).index_add_(0, tokens.flatten(), rows.flatten(0, -2))
        return None, None, None
