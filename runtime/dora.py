"""DoRA: each row of an adapted matrix has a length of its own that is learned, apart from its direction.

PEFT makes the whole adapted matrix in fp32 to measure its rows, twice a layer, and keeps what is as large as a layer's
output several times over. Here their lengths follow from three small products, and only the output is kept.
"""

from __future__ import annotations

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
            rows = quantized.weight_of(module.get_base_layer(), torch.float32, "alone")
            squares = rows.square().sum(1).clamp_(min=LEAST_SQUARE)
            layer.register_buffer("squares", squares, persistent=False)
            layer.weight = torch.nn.Parameter(squares.sqrt())
            module.use_dora[name] = True
            module.lora_variant[name] = DoraLinearVariant()
            module.lora_magnitude_vector[name] = layer


def is_ours(module: Any, name: str) -> bool:
    """Whether the adapter *name* of a LoRA *module* is one that ``learn_lengths`` made."""
    return name in module.lora_magnitude_vector and hasattr(module.lora_magnitude_vector[name], "squares")


def row_lengths(module: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Of ``W + scaling * up @ down``, from the three terms of their squares, with products of W in its dtype.

    A profile takes for linear what is square in the rank: up to thousandths of the layer's own products at rank 128.
    """
    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    crossed = torch.mm(weight, down.to(weight.dtype).t())
    terms = torch.mm(up, torch.mm(down, down.t())).mul_(module.scaling[name]).add_(crossed, alpha=2).mul_(up).sum(1)
    squares = terms.mul_(module.scaling[name]).add_(module.lora_magnitude_vector[name].squares)
    return squares.clamp_(min=LEAST_SQUARE).sqrt_()


def with_lengths(weight: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """*weight* with rows of these *lengths*."""
    return weight * (lengths / weight.square().sum(1).clamp_(min=LEAST_SQUARE).sqrt_()).unsqueeze(1)
