"""Configurations of models, sound ones and what is said of others."""

from __future__ import annotations

from typing import Any

import pytest

from shallowflow.profiles.check import LARGEST
from shallowflow.profiles.load import (
    BadFacts,
    FactsError,
    validate_config,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "vocab_size": 50257,
}

SIZES = [(LLAMA, key) for key in LLAMA if key in LARGEST] + [(GPT2, key) for key in GPT2 if key in LARGEST]


def complaint(config: object) -> str:
    """What validate_config says of a bad configuration."""
    with pytest.raises(BadFacts) as caught:
        validate_config(config, "config.json")
    return one_line(caught.value)


def one_line(error: FactsError) -> str:
    """A message, once it is seen to be one line without the inside of a program."""
    message = str(error)
    assert message and "\n" not in message
    assert not any(word in message for word in ("Traceback", "Error(", "<class", "object at"))
    return message
