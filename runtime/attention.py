"""Attention as a T4 can run it: PyTorch's SDPA with the KV heads expanded first."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

NAME = "shallowflow_sdpa"


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
    to the math kernel, which keeps the whole score matrix. Shapes: query (batch, heads, tokens, head size), key
    and value (batch, KV heads, tokens, head size); returns (batch, tokens, heads, head size).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
    )
    return out.transpose(1, 2).contiguous(), None


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
    return "SDPA" if implementation in (NAME, "sdpa") else implementation
