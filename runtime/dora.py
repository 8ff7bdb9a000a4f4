"""DoRA: each row of an adapted matrix has a length of its own that is learned, apart from its direction.

PEFT makes the whole adapted matrix in fp32 to measure its rows, twice a layer, and keeps what is as large as a layer's
output several times over. Here their lengths follow from three small products, and only the output is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import quantized

LEAST_SQUARE = 1e-30
"""Of a row's length: a row of zeros must have one to be divided by."""


def learn_lengths(model: torch.nn.Module) -> None:
    """Make every LoRA module of PEFT's *model* a DoRA module, whose lengths begin as those of its base's rows.

    PEFT's own way to begin cannot be taken: on ``meta`` it refuses 4-bit weights.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    adapted: Any = model
    for config in adapted.peft_config.values():
        config.use_dora = True
    for module in model.modules():
        if isinstance(module, LoraLayer):
            (name,) = module.lora_A
            layer = DoraLinearLayer(fan_in_fan_out=getattr(module, "fan_in_fan_out", False))
            rows = quantized.weight_of(module.get_base_layer(), torch.float32)
            squares = rows.square().sum(1).clamp_(min=LEAST_SQUARE)
            layer.register_buffer("squares", squares, persistent=False)
            layer.weight = torch.nn.Parameter(squares.sqrt())
            module.use_dora[name] = True
            module.lora_variant[name] = DoraLinearVariant()
            module.lora_magnitude_vector[name] = layer


def is_ours(module: Any, name: str) -> bool:
    """Whether the adapter *name* of a LoRA *module* is one that ``learn_lengths`` made."""
    return name in module.lora_magnitude_vector and hasattr(module.lora_magnitude_vector[name], "squares")


def rescaled(product: torch.Tensor, module: Any, name: str) -> torch.Tensor:
    """*product* of the adapted matrix, in place, as if that matrix had rows of the learned lengths; the bias stays."""
    base, layer = module.get_base_layer(), module.lora_magnitude_vector[name]
    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    lengths = row_lengths(base, layer.squares, down, up, module.scaling[name], product.dtype)
    apply: Callable[..., torch.Tensor] = _Rescaled.apply
    found = apply(product, layer.weight, lengths, base.bias)
    return found if base.bias is None else found + base.bias


def row_lengths(
    base: torch.nn.Module,
    squares: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Of ``W + scaling * up @ down``, from the three terms of their squares; *squares* are those of the rows of W."""
    crossed = torch.mm(quantized.weight_of(base, dtype), down.to(dtype).t())
    terms = torch.mm(up, torch.mm(down, down.t())).mul_(scaling).add_(crossed, alpha=2).mul_(up).sum(1)
    return terms.mul_(scaling).add_(squares).clamp_(min=LEAST_SQUARE).sqrt_()


def with_lengths(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """*weight* with rows of these *lengths*."""
    return weight * (lengths / weight.square().sum(1).clamp_(min=LEAST_SQUARE).sqrt_()).unsqueeze(1)


class _Rescaled(torch.autograd.Function):
    """``(x - bias) * magnitude / length``, in place of x; lengths are held constant, as in the paper's section 4.3."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, magnitude: torch.Tensor, length: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if bias is not None:
            x.sub_(bias)
        factor = (magnitude / length).to(x.dtype)
        x.mul_(factor)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, factor, magnitude)
        return x

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        result, factor, magnitude = ctx.saved_tensors
        (gradient,) = outer
        products = gradient.to(torch.float32, copy=True).mul_(result)  # in fp16 they would overflow
        for_magnitude = products.flatten(0, -2).sum(0).div_(magnitude)
        del products
        return gradient * factor, for_magnitude, None, None
