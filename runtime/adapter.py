"""LoRA's forward and backward passes as one autograd function: base product and adapter with nothing in between.

PEFT's own forward pass converts the layer's input to the adapter's fp32, and multiplies and adds what is as large as
the layer's output in passes of their own. Here the fp32 adapter is rounded to the compute dtype, as autocast does it,
and cuBLAS adds its product to the base's in place; saved are the input, which others save too, and its product with
the smaller matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from . import dora, quantized


def fuse(model: torch.nn.Module) -> int:
    """Let the plain LoRA modules of *model* compute as here; returns how many.

    Those that do more, such as with dropout, keep PEFT's way.
    """
    from peft.tuners.lora import LoraLayer

    found = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for module in found:
        layer = cast(torch.nn.Module, module)
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(found)


def _is_plain(module: Any) -> bool:
    if len(module.lora_A) != 1:
        return False
    (name,) = module.lora_A
    known = name not in module.lora_variant or dora.is_ours(module, name)
    plain = isinstance(module.lora_dropout[name], torch.nn.Identity) and known
    return plain and not module.lora_bias.get(name, False) and quantized.has_weight(module.get_base_layer())


def _forward(module: Any, others: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    (name,) = module.lora_A
    if module.disable_adapters or module.merged or args or kwargs or name not in module.active_adapters:
        result: torch.Tensor = others(x, *args, **kwargs)
        return result
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    apply: Callable[..., torch.Tensor] = _Adapted.apply
    product = apply(x, down, up, module.get_base_layer(), module.scaling[name])
    return dora.rescaled(product, module, name) if name in module.lora_variant else product


class _Adapted(torch.autograd.Function):
    """``base(x) + scaling * (x @ down.T) @ up.T``; shapes (..., in), (rank, in), (out, rank); the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: torch.nn.Module, scaling: float
    ) -> torch.Tensor:
        result: torch.Tensor = base(x)
        rows = x.flatten(0, -2)
        inner = torch.mm(rows, down.to(x.dtype).t()).mul_(scaling)
        added = result.view(-1, result.size(-1))
        torch.addmm(added, inner, up.to(x.dtype).t(), out=added)
        ctx.save_for_backward(x, inner, down, up)
        ctx.base, ctx.scaling = base, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, down, up = ctx.saved_tensors
        gradient = outer[0].reshape(-1, outer[0].size(-1))
        towards_inner = torch.mm(gradient, up.to(x.dtype)).mul_(ctx.scaling)
        for_up = torch.mm(gradient.t(), inner).to(up.dtype)
        for_down = torch.mm(towards_inner.t(), x.flatten(0, -2)).to(down.dtype)
        for_x = None
        if ctx.needs_input_grad[0]:
            rows = torch.mm(gradient, quantized.weight_of(ctx.base, x.dtype))
            torch.addmm(rows, towards_inner, down.to(x.dtype), out=rows)
            for_x = rows.view(x.shape)
        return for_x, for_down, for_up, None, None
