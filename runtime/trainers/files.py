"""Files that other trainers are configured by: whose a file is, what it says, and a corrected one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from . import axolotl, llamafactory, scripts, trl
from .settings import TITLES, ConfigurationError, Settings, Tool

MOST_BYTES = 2**20
_YAMLS = {"axolotl": axolotl.DISTINCT, "llamafactory": llamafactory.DISTINCT, "trl": trl.DISTINCT}


def read(path: Path, tool: Tool | None, *, has_bf16: bool) -> Settings:
    """What the file at *path* says; *tool* is told from its keys if it is None.

    Args:
        has_bf16: whether the GPU has bf16, and does not emulate it.

    Raises:
        ConfigurationError: it cannot be read, or is no configuration of a trainer that is known here.
    """
    text = _text(path)
    if path.suffix == ".py":
        return scripts.read(text, str(path), has_bf16=has_bf16)
    entries = _entries(text, path)
    tool = tool or _whose(entries, path)
    settings = _read(entries, str(path), tool)
    if not settings.model:
        raise ConfigurationError(f"{path} names no model; give {settings.key('model')}")
    return settings


def _read(entries: Mapping[str, Any], where: str, tool: Tool) -> Settings:
    # axolotl and others ask PyTorch whether a GPU has bf16, which says so wherever it is emulated
    if tool == "axolotl":
        return axolotl.read(entries, where, has_bf16=True)
    if tool == "llamafactory":
        return llamafactory.read(entries, where)
    if tool == "trl":
        return trl.read(entries, where)
    raise ConfigurationError(f"{where}: {TITLES[tool]} is configured by a Python script; give a file that ends in .py")


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
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())[:200] or "it is nested too deeply"
        raise ConfigurationError(f"{path} is no {'JSON' if path.suffix == '.json' else 'YAML'}: {said}") from None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigurationError(f"{path} has no entries; give a trainer's configuration, such as axolotl's")
    return found


def _whose(entries: Mapping[str, Any], path: Path) -> Tool:
    counts = {tool: sum(key in entries for key in keys) for tool, keys in _YAMLS.items()}
    best = max(counts, key=lambda tool: counts[tool])
    if not counts[best]:
        raise ConfigurationError(
            f"{path} has no key of {', '.join(TITLES[tool] for tool in _YAMLS if tool in get_args(Tool))}; "  # type: ignore[index]
            "name its tool by --tool"
        )
    return best  # type: ignore[return-value]


_WRITERS = {"axolotl": axolotl.write, "llamafactory": llamafactory.write}
WRITTEN: tuple[Tool, ...] = ("axolotl", "llamafactory")
"""Whose corrected configurations can be written."""


def corrected(path: Path, settings: Settings, better: Settings) -> str:
    """The YAML at *path*, with those of its entries changed in which *better* differs from *settings*.

    Entries that decide nothing here, such as the data, stay as they are; comments do not.
    """
    entries = dict(_entries(_text(path), path))
    write = _WRITERS[settings.tool]
    before, after = write(settings, ""), write(better, "")
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            entries[key] = after.get(key)
    for name in REPLACED.get(settings.tool, ()):
        if name in entries and name not in after:
            del entries[name]
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return text


REPLACED: dict[Tool, tuple[str, ...]] = {
    "axolotl": (
        "flash_attention",
        "flex_attention",
        "sdp_attention",
        "xformers_attention",
        "bfloat16",
        "float16",
        "cut_cross_entropy",
        "liger_fused_linear_cross_entropy",
        "auto_resume_from_checkpoints",
    ),
    "llamafactory": ("enable_liger_kernel", "pure_bf16", "resume_from_checkpoint"),
}
"""Other spellings of what a written file says, and what it shall not have."""
