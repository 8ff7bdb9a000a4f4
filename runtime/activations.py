"""What becomes of a layer's activations between its forward and its backward pass: saved, recomputed or offloaded."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shallowflow.planner.strategies import Strategy

from . import quantized
from .again import Part
from .offload import Offload

_PARTS = {
    "recompute attention": re.compile(r"attn|attention"),
    "recompute mlp": re.compile(r"mlp|ffn|feed_forward|^ff$|^ffwd$|moe"),
}
"""How the attention and MLP modules of decoder layers are named in transformers."""


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a forward pass draws random numbers, by a module or by a rate that its configuration names.

    A layer computed again must then drop what it dropped the first time, or its gradients are another function's.
    """
    config = getattr(model, "config", None)
    named_rates = config.to_dict() if config else {}
    rates = [v for k, v in named_rates.items() if "drop" in k and not k.startswith(("classifier", "summary"))]
    named = any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
    return named or any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())


def part(layer: torch.nn.Module, policy: str) -> torch.nn.Module:
    """The module of *layer* that *policy*, a strategy's ``recomputes``, computes again: itself, its attention or MLP.

    Raises:
        ValueError: the layer has no such module of its own.
    """
    if policy not in _PARTS:
        return layer
    for name, child in layer.named_children():
        if _PARTS[policy].search(name) and any(quantized.is_linear(module) for module in child.modules()):
            return child
    raise ValueError(f"cannot {policy}: {type(layer).__name__} has no such module of its own; recompute whole layers")


def apply_policies(model: torch.nn.Module, layers: Iterable[torch.nn.Module], strategies: Sequence[Strategy]) -> None:
    """Make *layers* of *model* forget, or send to the host, what their strategies say.

    Raises:
        ValueError: there is no such module to compute again.
    """
    random = has_dropout(model)
    offload = Offload()
    for layer, strategy in zip(layers, strategies, strict=True):
        if strategy.activations == "offload":
            layer.forward = offload.around(layer.forward)
        elif strategy.recomputes:
            module = part(layer, strategy.recomputes)
            if strategy.reuses_weights:
                quantized.reuse_weights(module)
            module.forward = functools.partial(
                checkpoint,
                module.forward,
                use_reentrant=False,
                preserve_rng_state=random,
                context_fn=Part().contexts,
            )
    if any(strategy.activations == "offload" for strategy in strategies):
        _keep_model(model, offload)


def _keep_model(model: torch.nn.Module, offload: Offload) -> None:
    """Tell *offload* the model's own tensors at each forward pass, when all have their device and adapters theirs."""

    def tell(module: torch.nn.Module, _args: object) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        offload.keep([*tensors, *(t for m in module.modules() for t in quantized.constants(m))])

    decoder: Any = model
    decoder.get_decoder().register_forward_pre_hook(tell)  # which a loss in chunks calls, and not the model
