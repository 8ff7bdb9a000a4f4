"""Attention as each device runs it best: PyTorch's SDPA, on a GPU with the KV heads expanded first; packed, too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from shallowflow.planner.profiler.trace import device_type

NAME = "shallowflow_sdpa"
PACKED = "shallowflow_packed"
FUSED_ALIGNMENT_BYTES = 16
"""Of a head, for the memory-efficient kernel."""


def expanded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention over as many KV heads as query heads.

    The memory-efficient kernel, the only fused one below sm_80, refuses grouped KV heads; PyTorch then falls back
    to the math kernel, which keeps the whole score matrix. A CPU's kernel takes them as they are, and saves as much
    less for the backward pass. Shapes: query (batch, heads, tokens, head size), key
    and value (batch, KV heads, tokens, head size); returns (batch, tokens, heads, head size).
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    query, key, value = _as_multiplied(query, key, value)
    skips = bool(causal) and attention_mask is None and query.shape[2] > 1
    return _attention(query, key, value, attention_mask, dropout, scaling, skips), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``expanded_attention`` under a mask that hides all later tokens.

    Fused kernels take mask and causality together and pass over what is hidden by the latter, half of their work; the
    math kernel, which takes heads that do not align, refuses both at once, and a CPU's takes no dropout.
    """
    query, key, value = _as_multiplied(query, key, value)
    is_fused = not dropout and all((t.size(-1) * t.element_size()) % FUSED_ALIGNMENT_BYTES == 0 for t in (query, value))
    skips = attention_mask is None or is_fused
    return _attention(query, key, value, attention_mask, dropout, scaling, skips), None


def _as_multiplied(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """*tensors* as autocast, where it is on, gives them to the kernel: before heads are repeated."""
    kind = device_type(tensors[0])
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    skips_later: bool,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and device_type(query) == "cpu"
    if groups > 1 and not grouped:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=skips_later, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


def pack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let *model*, which has this module's attention, take ``position_ids`` that begin at 0 with each document.

    The mask is made once, in the compute *dtype*, for all layers.

    Raises:
        ValueError: the model's attention is another.
    """
    if model.config._attn_implementation != NAME:
        raise ValueError(f"documents for {model.config.model_type} cannot be packed: its attention is its own")
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)
    decoder: Any = model.get_decoder()
    decoder.forward = functools.partial(_masked_forward, decoder.forward, dtype)


def _masked_forward(forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("position_ids") is not None:
        kwargs["attention_mask"] = document_mask(kwargs["position_ids"], dtype)
    return forward(*args, **kwargs)


def document_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores so that a token at position p of its document sees the p before it, and itself.

    Shapes (batch, tokens) and (batch, 1, tokens, tokens).
    """
    place = torch.arange(position_ids.size(-1), device=position_ids.device)
    begins = (place - position_ids).unsqueeze(-1)
    hidden = (place < begins).logical_or_(place > place.unsqueeze(-1))
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf).unsqueeze(1)


def register() -> str:
    """Make this attention known to transformers and return the name to ask for it by."""
    AttentionInterface.register(NAME, expanded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def best_for(config: PreTrainedConfig) -> str:
    """The leanest attention that a model of *config* can take: ours, transformers' SDPA, or eager.

    Raises:
        ValueError: transformers has no causal language model of this kind.
    """
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is None:
        raise ValueError(f"{config.model_type} is not a causal language model")
    model_class = known[0] if isinstance(known, (list, tuple)) else known
    if not getattr(model_class, "_supports_sdpa", False):
        return "eager"
    return register() if getattr(model_class, "_supports_attention_backend", False) else "sdpa"


def shown(implementation: str) -> str:
    """What people call it."""
    return "SDPA" if implementation in (NAME, PACKED, "sdpa") else implementation
