"""LoRA's forward and backward passes as one autograd function: base product and adapter with nothing in between.

PEFT's own forward pass converts the layer's input to the adapter's fp32, and multiplies and adds what is as large as
the layer's output in passes of their own. Here the fp32 adapter is rounded to the compute dtype, as autocast does it,
and cuBLAS adds its product to the base's in place; saved are the input, which others save too, and its product with
the smaller matrix. DoRA's passes are the same, with the result rescaled in place.
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
    matrices, base = (module.lora_A[name].weight, module.lora_B[name].weight), module.get_base_layer()
    if name not in module.lora_variant:
        return _applied(_Adapted, x, *matrices, base, module.scaling[name])
    lengths = dora.row_lengths(module, name, x.dtype)
    magnitude = module.lora_magnitude_vector[name].weight
    scaled = _applied(_Rescaled, x, *matrices, magnitude, lengths, base, module.scaling[name])
    return scaled if base.bias is None else scaled + base.bias


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    apply: Callable[..., torch.Tensor] = function.apply
    return apply(*arguments)


class _Adapted(torch.autograd.Function):
    """``base(x) + scaling * (x @ down.T) @ up.T``; shapes (..., in), (rank, in), (out, rank); the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: torch.nn.Module, scaling: float
    ) -> torch.Tensor:
        result, inner = _product(x, down, up, base, scaling)
        ctx.save_for_backward(x, inner, down, up)
        ctx.base, ctx.scaling = base, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, outer[0], *ctx.saved_tensors), None, None


class _Rescaled(torch.autograd.Function):
    """What ``_Adapted`` gives, less the base's bias, times ``magnitude / lengths``, the lengths of the matrix's rows.

    They are held constant, as in section 4.3 of the DoRA paper. The result is saved for the magnitude's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        magnitude: torch.Tensor,
        lengths: torch.Tensor,
        base: torch.nn.Module,
        scaling: float,
    ) -> torch.Tensor:
        result, inner = _product(x, down, up, base, scaling)
        bias: Any = base.bias
        if bias is not None:
            result.sub_(bias)
        factor = (magnitude / lengths).to(x.dtype)
        result.mul_(factor)
        ctx.save_for_backward(x, inner, down, up, magnitude, factor, result)
        ctx.base, ctx.scaling = base, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, magnitude, factor, result = ctx.saved_tensors
        products = outer[0].to(magnitude.dtype, copy=True).mul_(result)  # in fp16 they would overflow
        for_magnitude = products.flatten(0, -2).sum(0).div_(magnitude)
        del products
        return *_gradients(ctx, outer[0] * factor, *saved), for_magnitude, None, None, None


def _product(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: torch.nn.Module, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapted product, and what lies between the adapter's matrices."""
    result: torch.Tensor = base(x)
    inner = torch.mm(x.flatten(0, -2), down.to(x.dtype).t()).mul_(scaling)
    added = result.view(-1, result.size(-1))
    torch.addmm(added, inner, up.to(x.dtype).t(), out=added)
    return result, inner


def _gradients(
    ctx: Any, outer: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Of ``_product``, for x, down and up."""
    gradient = outer.reshape(-1, outer.size(-1))
    towards_inner = torch.mm(gradient, up.to(x.dtype)).mul_(ctx.scaling)
    for_up = torch.mm(gradient.t(), inner).to(up.dtype)
    for_down = torch.mm(towards_inner.t(), x.flatten(0, -2)).to(down.dtype)
    if not ctx.needs_input_grad[0]:
        return None, for_down, for_up
    rows = torch.mm(gradient, quantized.weight_of(ctx.base, x.dtype))
    torch.addmm(rows, towards_inner, down.to(x.dtype), out=rows)
    return rows.view(x.shape), for_down, for_up
