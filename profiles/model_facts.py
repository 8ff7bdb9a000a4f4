"""A model's sizes, read from its configuration under whichever of Hugging Face's spellings it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPELLINGS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
}

_OVERFLOWING = ("gemma3", "gemma4", "qwen3_5", "qwen3_moe", "gpt_oss", "glm4_moe")
"""How the names of kinds of model begin whose residual streams leave fp16's range (65504): they were made for bf16."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def is_mixture_of_experts(config: Mapping[str, Any]) -> bool:
    """Whether tokens choose among experts, so that memory and time depend on the data."""
    return any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERTS)


def overflows_fp16(config: Mapping[str, Any]) -> bool:
    """Whether the model's activations leave the range of fp16."""
    return str(config.get("model_type")).startswith(_OVERFLOWING)


_CHANGED_LOGITS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "mup_width_scale",
)

_HEADS = frozenset(
    (
        "bert",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "gemma4",
        "megatron-bert",
        "mllama_text_model",
        "modernbert-decoder",
        "musicgen_decoder",
        "musicgen_melody_decoder",
        "prophetnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)
"""Kinds of model whose head is more than one product with what their decoder returns when it is called by itself."""


def changes_logits(config: Mapping[str, Any]) -> bool:
    """Whether a product of the head with what the decoder returns is not yet the logits: capped, scaled, or more."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and changes_logits(nested):
        return True
    if config.get("model_type") in _HEADS:
        return True
    return any(config.get(name) not in (None, 1, 1.0) for name in _CHANGED_LOGITS)


_PACKABLE = frozenset(
    (
        "cohere",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    )
)
"""Kinds of model of which the tests show that a packed document is computed as if it were alone."""


def why_not_packed(config: Mapping[str, Any], sequence_length: int) -> str | None:
    """What keeps documents from being packed into sequences of this length for the model; None if nothing does."""
    kind = str(config.get("model_type"))
    if kind not in _PACKABLE:
        return f"attention of model_type {kind} was never shown to keep packed documents apart"
    window = config.get("sliding_window")
    if isinstance(window, int) and window < sequence_length and config.get("use_sliding_window", True):
        return f"its sliding window of {window} tokens is shorter than a sequence of {sequence_length}"
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope"):
        return "its rotary embeddings depend on the longest document in a batch"
    return None


_CUTTABLE = frozenset(
    (
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
    )
)
"""Kinds of model of which the tests show that stages compute, one after the other, what the whole model does."""


def why_not_cut(config: Mapping[str, Any]) -> str | None:
    """What keeps the model from being cut into pipeline stages; None if nothing does."""
    kind = str(config.get("model_type"))
    if kind not in _CUTTABLE:
        return f"models of model_type {kind} were never shown to compute in stages what they do whole"
    if any(_is_rate(name, value) for name, value in config.items()):
        return "it drops activations at random, which stages would draw otherwise than the whole model"
    return None


def _is_rate(name: str, value: Any) -> bool:
    dropping = "drop" in name and not name.startswith(("classifier", "summary"))
    return dropping and isinstance(value, (int, float)) and value > 0


def size(config: Mapping[str, Any], name: str) -> int | None:
    """The size called *name* in most configurations, under any spelling; None where it is not stated."""
    for spelling in _SPELLINGS[name]:
        value = config.get(spelling)
        if isinstance(value, int):
            return value
    return None


def num_layers(config: Mapping[str, Any]) -> int:
    """Decoder layers; ValueError where the configuration does not say."""
    layers = size(config, "num_hidden_layers")
    if layers is None:
        raise ValueError("num_hidden_layers is missing from the model's configuration")
    return layers


def least_outside_weights(config: Mapping[str, Any]) -> int:
    """At least this many parameters lie outside the decoder layers: the table of embeddings."""
    return (size(config, "hidden_size") or 0) * (size(config, "vocab_size") or 0)
