"""Profiles that a user's own measurements made: where they lie, and how one is written down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .specs import GpuSpec


def folder() -> Path:
    """Where they lie: ``gpus`` under ``SHALLOWFLOW_CONFIG``, or under the user's configuration folder."""
    named = os.environ.get("SHALLOWFLOW_CONFIG")
    if not named:
        import platformdirs

        named = platformdirs.user_config_dir("shallowflow")
    return Path(named) / "gpus"


def files() -> list[Path]:
    """Every one of them, by name."""
    return sorted(folder().glob("*.toml"))


def to_toml(gpu: GpuSpec) -> str:
    """The file of a profile: every number with its trust and its source beside it."""
    import tomli_w

    facts: dict[str, Any] = {
        "name": gpu.name,
        "title": gpu.title,
        "device_type": gpu.device_type,
        "aliases": list(gpu.aliases),
    }
    if gpu.compute_capability is not None:
        facts["compute_capability"] = list(gpu.compute_capability)
    for key, source in gpu.sources.items():
        facts[key] = {"value": getattr(gpu, key), "trust": source.trust, "source": source.text}
    return tomli_w.dumps(facts)
