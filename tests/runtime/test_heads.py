"""A loss in parts is the model's own, for every kind of causal language model that is given one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import small_models
from shallowflow.profiles import model_facts
from shallowflow.runtime import loss

UNPLANNED = (
    *("gemma3n", "gemma4_assistant", "gemma4_unified_assistant"),  # which are not built by themselves
    *("inkling_text", "llama4", "llama4_text"),  # mixtures of experts
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in small_models.model_types() if kind not in UNPLANNED])
def test_a_loss_in_parts_is_the_models_own(kind: str) -> None:
    """Head and decoder by themselves give the logits that the model gives, or parts are refused."""
    torch.manual_seed(0)
    model: Any = small_models.small_model(kind, "float32", "cpu").eval()
    facts = model.config.to_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        tokens = small_models.batch(kind, model, "cpu", (2, 16))["input_ids"]
        labels = tokens.roll(-1, 1)
        if model_facts.changes_logits(facts):
            with pytest.raises(ValueError, match="use the whole loss"):
                loss.chunked(model, tokens, labels, 8)
            return
        logits = model(input_ids=tokens, use_cache=False).logits

        found = loss.chunked(model, tokens, labels, 8)

    assert float(found) == pytest.approx(float(loss.summed(logits, labels)), rel=1e-4)
