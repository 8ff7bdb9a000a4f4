"""Copies of models under other names, such as those that are not gated: the same configuration."""

from __future__ import annotations

import re

from shallowflow.profiles import model_names

MIRRORS = ("NousResearch", "unsloth")
"""Whose repositories repeat others' models, under their names or nearly so."""
_QUANTIZED = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)
_NEARLY = {
    "llama-3-8b": "meta-llama-3-8b",
    "llama-3-8b-instruct": "meta-llama-3-8b-instruct",
    "meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama-3.1-70b": "llama-3.1-70b",
    "llama-2-7b": "llama-2-7b-hf",
    "llama-2-13b": "llama-2-13b-hf",
    "mistral-7b": "mistral-7b-v0.1",
    "tinyllama": "tinyllama-1.1b-chat-v1.0",
    "tinyllama-chat": "tinyllama-1.1b-chat-v1.0",
}


def original(name: str) -> str:
    """The shipped model that *name* is a copy of, or *name* itself."""
    owner, slash, bare = name.partition("/")
    if not slash or owner not in MIRRORS:
        return name
    wanted = _QUANTIZED.sub("", bare).lower()
    wanted = _NEARLY.get(wanted, wanted)
    return next((known for known in model_names() if known.partition("/")[2].lower() == wanted), name)
