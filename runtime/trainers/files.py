"""Files that other trainers are configured by: whose a file is, what it says, and a corrected one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from . import axolotl, llamafactory, scripts, trl
from .settings import TITLES, ConfigurationError, Settings, Tool

MOST_BYTES = 2**20
_YAMLS: dict[Tool, tuple[str, ...]] = {
    "axolotl": axolotl.DISTINCT,
    "llamafactory": llamafactory.DISTINCT,
    "trl": trl.DISTINCT,
}


def read(path: Path, tool: Tool | None, *, has_bf16: bool, claims_bf16: bool = True) -> Settings:
    """What the file at *path* says; *tool* is told from its keys if it is None.

    Args:
        has_bf16: whether the GPU has bf16, and does not emulate it.
        claims_bf16: whether PyTorch says that it has: of every GPU, as it counts emulation.

    Raises:
        ConfigurationError: it cannot be read, or is no configuration of a trainer that is known here.
    """
    text = _text(path)
    if path.suffix == ".py":
        return scripts.read(text, str(path), has_bf16=has_bf16)
    entries = _entries(text, path)
    tool = tool or _whose(entries, path)
    if tool == "axolotl":
        settings = axolotl.read(entries, str(path), claims_bf16=claims_bf16)
    elif tool == "llamafactory":
        settings = llamafactory.read(entries, str(path), claims_bf16=claims_bf16)
    else:
        settings = trl.read(entries, str(path))
    if not settings.model:
        raise ConfigurationError(
            f"{path} names no model; give {'base_model' if tool == 'axolotl' else 'model_name_or_path'}"
        )
    return settings


_MODEL_KEYS: dict[Tool, str] = {
    "axolotl": "base_model",
    "llamafactory": "model_name_or_path",
    "trl": "model_name_or_path",
}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigurationError(f"{path} has more than {MOST_BYTES:,} bytes; a configuration is shorter")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None


def _entries(text: str, path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200] or "it is nested too deeply"
        raise ConfigurationError(f"{path} is no {'JSON' if path.suffix == '.json' else 'YAML'}: {said}") from None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigurationError(f"{path} has no entries; give a trainer's configuration, such as axolotl's")
    return found


def _whose(entries: Mapping[str, Any], path: Path) -> Tool:
    counts = {tool: sum(key in entries for key in keys) for tool, keys in _YAMLS.items()}
    best: Tool = max(counts, key=lambda tool: counts[tool])
    if not counts[best]:
        raise ConfigurationError(
            f"{path} has no key of {', '.join(TITLES[tool] for tool in _YAMLS)}; name its tool by --tool"
        )
    return best


_WRITERS = {"axolotl": axolotl.write, "llamafactory": llamafactory.write}
WRITTEN: tuple[Tool, ...] = ("axolotl", "llamafactory")
"""Whose corrected configurations can be written."""


def corrected(path: Path, settings: Settings, better: Settings) -> str:
    """The YAML at *path*, with those of its entries changed in which *better* differs from *settings*.

    Entries that decide nothing here, such as the data, stay as they are; comments do not.
    """
    entries = dict(_entries(_text(path), path))
    write = _WRITERS[settings.tool]
    before, after = write(settings), write(better)
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            entries[key] = after.get(key)
    for field, names in REPLACED[settings.tool].items():
        if getattr(settings, field) != getattr(better, field):
            for name in set(names) & set(entries) - set(after):
                del entries[name]
    if settings.loss == "cut" and better.loss != "cut":
        entries["cut_cross_entropy"] = False  # or its plugin, where it is loaded, takes it for wanted
    if settings.tool == "llamafactory" and settings.resumes_blindly and not better.resumes_blindly:
        entries["overwrite_output_dir"] = True
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return text


REPLACED: dict[Tool, dict[str, tuple[str, ...]]] = {
    "axolotl": {
        "attention": (*axolotl.FLAGS,),
        "precision": ("bfloat16", "float16"),
        "adapter_dtype": ("peft_autocast_adapter_dtype",),
        "loss": ("liger_fused_linear_cross_entropy",),
        "resumes_blindly": ("auto_resume_from_checkpoints",),
    },
    "llamafactory": {
        "loss": ("enable_liger_kernel",),
        "precision": ("pure_bf16",),
        "adapter_dtype": ("pure_bf16",),
        "longest_first": ("group_by_length",),
        "resumes_blindly": ("resume_from_checkpoint",),
    },
}
"""By a field, other spellings of what a written file says of it, and what it shall not have any more."""
