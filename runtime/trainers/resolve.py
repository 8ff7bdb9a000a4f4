"""What a trainer's settings come to for one model: what its configuration decides and a file does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .settings import VARLEN, Settings, dtype_of

MOST_VARLEN_HEAD = 256
"""The largest size of a head that FlashAttention takes, and with it ``varlen_attn``."""


def resolved(settings: Settings, config: Mapping[str, Any]) -> Settings:
    """*settings* for a model of *config*.

    A checkpoint whose dtype is not known is counted as bf16, as most are.
    """
    changed: dict[str, Any] = {}
    if settings.weights_dtype == "auto":
        told = dtype_of(config.get("dtype") or config.get("torch_dtype"), "bfloat16")
        changed["weights_dtype"] = "bfloat16" if told == "auto" else told
    if settings.attention == VARLEN and not _takes_varlen(config):
        changed["attention"] = "sdpa"
    if caps_scores(config) and settings.attention == "sdpa" and not settings.is_said("attention"):
        changed["attention"] = "eager"
    return replace(settings, **changed)


def caps_scores(config: Mapping[str, Any]) -> bool:
    """Whether attention scores are capped softly, as in Gemma 2, which SDPA does not do."""
    return config.get("attn_logit_softcapping") is not None


def repeats_heads(config: Mapping[str, Any]) -> bool:
    """Whether query heads share KV heads."""
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    return isinstance(heads, int) and isinstance(shared, int) and heads != shared


def head_size(config: Mapping[str, Any]) -> int | None:
    """Of the attention's heads, where it is known."""
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    told = config.get("head_dim")
    if isinstance(told, int):
        return told
    return size // heads if isinstance(size, int) and isinstance(heads, int) and heads else None


def _takes_varlen(config: Mapping[str, Any]) -> bool:
    """As axolotl decides (its ``patch_manager.py``): heads that are not too large, and no sliding window."""
    kinds = config.get("layer_types")
    slides = bool(config.get("sliding_window")) and (not kinds or "sliding_attention" in kinds)
    return not slides and (head_size(config) or 0) <= MOST_VARLEN_HEAD
