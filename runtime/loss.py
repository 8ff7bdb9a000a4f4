"""Cross-entropy over a vocabulary, whole or in chunks of tokens so that the logits are never there at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the tokens that have a label; shapes (..., vocabulary) and (...)."""
    return torch.nn.functional.cross_entropy(
        logits.float().view(-1, logits.size(-1)), labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def chunked(model: Any, input_ids: torch.Tensor, labels: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """``summed`` of *model*'s logits, *chunk_tokens* at a time, each chunk's logits computed again for its gradient.

    Raises:
        ValueError: the model changes its logits after the head, which chunks would miss.
    """
    if getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logit_scale", None):
        raise ValueError(f"{model.config.model_type} scales its logits after the head; use the whole loss")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    hidden, labels = hidden.flatten(0, -2), labels.flatten()

    def part(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return summed(head(rows), wanted)

    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        total = total + checkpoint(part, rows, wanted, use_reentrant=False, preserve_rng_state=False)
    made: torch.Tensor = total
    return made
