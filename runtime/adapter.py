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

from . import again, dora, quantized


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
        return _adapted(module, x, *matrices, base, module.scaling[name])
    is_made = quantized.is_made(base, x.dtype)
    weight = quantized.weight_of(base, x.dtype, quantized.ahead() if is_made else "twice")
    lengths = dora.row_lengths(module, name, weight)
    magnitude = module.lora_magnitude_vector[name].weight
    made = weight if is_made else None
    scaled: torch.Tensor = _applied(_Rescaled, x, *matrices, magnitude, lengths, base, module.scaling[name], made)
    return scaled if base.bias is None else scaled + base.bias


def _adapted(
    module: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: Any, scaling: float
) -> torch.Tensor:
    """``_Adapted``, or, where computing again may end with *module*, the same in two parts."""
    if not again.ends_with(module):
        whole: torch.Tensor = _applied(_Adapted, x, down, up, base, scaling)
        return whole
    stand_in, inner, kept = _applied(_Ahead, x, down, up, base, scaling)
    result: torch.Tensor = _applied(_After, stand_in, x, inner, up, base, kept)
    return result


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    apply: Callable[..., Any] = function.apply
    return apply(*arguments)


class _Adapted(torch.autograd.Function):
    """``base(x) + scaling * (x @ down.T) @ up.T``; shapes (..., in), (rank, in), (out, rank); the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: torch.nn.Module, scaling: float
    ) -> torch.Tensor:
        kept = _kept(ctx, base, x)
        result = _base_product(x, base, kept)
        inner = _inner(x, down, scaling)
        _add(result, inner, up)
        _save(ctx, base, scaling, kept, x, inner, down, up)
        return result

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, outer[0], *ctx.saved_tensors), None, None


class _Ahead(torch.autograd.Function):
    """``_Adapted`` ahead of its product: saves what that saves, and gives what stands for its result in the graph.

    A recomputation that only wants again what was saved ends here; for any other ``_After`` is the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: torch.nn.Module, scaling: float
    ) -> tuple[torch.Tensor | None, ...]:
        kept = _kept(ctx, base, x)
        inner = _inner(x, down, scaling)
        _save(ctx, base, scaling, kept, x, inner, down, up)
        ctx.mark_non_differentiable(*(made for made in (inner, kept) if made is not None))
        return x.new_empty(()).expand(*x.shape[:-1], up.size(0)), inner, kept

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, outer[0], *ctx.saved_tensors), None, None


class _After(torch.autograd.Function):
    """The product itself, whose gradient is all that ``_Ahead`` needs."""

    @staticmethod
    def forward(
        _ctx: Any,
        _stand_in: torch.Tensor,
        x: torch.Tensor,
        inner: torch.Tensor,
        up: torch.Tensor,
        base: torch.nn.Module,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        result = _base_product(x, base, kept)
        _add(result, inner, up)
        return result

    @staticmethod
    def backward(_ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return outer[0], None, None, None, None, None


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
        made: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = _base_product(x, base, made)
        inner = _inner(x, down, scaling)
        _add(result, inner, up)
        bias: Any = base.bias
        if bias is not None:
            result.sub_(bias)
        factor = (magnitude / lengths).to(x.dtype)
        result.mul_(factor)
        kept = made if _keeps(ctx, base, x) else None
        _save(ctx, base, scaling, kept, magnitude, factor, result, x, inner, down, up)
        return result

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        magnitude, factor, result, *saved = ctx.saved_tensors
        products = outer[0].to(magnitude.dtype, copy=True).mul_(result)  # in fp16 they would overflow
        for_magnitude = products.flatten(0, -2).sum(0).div_(magnitude)
        del products
        return *_gradients(ctx, outer[0] * factor, *saved), for_magnitude, None, None, None, None


def _keeps(ctx: Any, base: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether the weight that the product of *x* is made with is saved for its gradient."""
    return quantized.reuses_weight(base, x.dtype) and ctx.needs_input_grad[0]


def _kept(ctx: Any, base: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    return quantized.weight_of(base, x.dtype, quantized.ahead()) if _keeps(ctx, base, x) else None


def _base_product(x: torch.Tensor, base: torch.nn.Module, made: torch.Tensor | None) -> torch.Tensor:
    """By the weight that is *made* of the base's, or as the base does it."""
    bias: Any = base.bias
    result: torch.Tensor = base(x) if made is None else torch.nn.functional.linear(x, made, bias)
    return result


def _inner(x: torch.Tensor, down: torch.Tensor, scaling: float) -> torch.Tensor:
    """What lies between the adapter's matrices."""
    return torch.mm(x.flatten(0, -2), down.to(x.dtype).t()).mul_(scaling)


def _add(result: torch.Tensor, inner: torch.Tensor, up: torch.Tensor) -> None:
    added = result.view(-1, result.size(-1))
    torch.addmm(added, inner, up.to(inner.dtype).t(), out=added)


def _save(ctx: Any, base: torch.nn.Module, scaling: float, kept: torch.Tensor | None, *tensors: torch.Tensor) -> None:
    ctx.save_for_backward(*tensors, *([] if kept is None else [kept]))
    ctx.base, ctx.scaling = base, scaling


def _gradients(
    ctx: Any,
    outer: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Of the product, for x, down and up."""
    gradient = outer.reshape(-1, outer.size(-1))
    towards_inner = torch.mm(gradient, up.to(x.dtype)).mul_(ctx.scaling)
    for_up = torch.mm(gradient.t(), inner).to(up.dtype)
    for_down = torch.mm(towards_inner.t(), x.flatten(0, -2)).to(down.dtype)
    if not ctx.needs_input_grad[0]:
        return None, for_down, for_up
    rows = torch.mm(gradient, quantized.weight_of(ctx.base, x.dtype) if kept is None else kept)
    torch.addmm(rows, towards_inner, down.to(x.dtype), out=rows)
    return rows.view(x.shape), for_down, for_up
