"""What was measured of a model's weights, in the cache under their content; loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache as remembered
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from shallowflow.planner.profiler import cache
from shallowflow.planner.weighed import LayerErrors, Weighed
from shallowflow.profiles.specs import ModelSpec

MEASURED_BY = ("quantized.py", "weigh.py")
"""The code beside this that stores weights and says what that changed."""


class Record(msgspec.Struct, frozen=True):
    """What a model's weights were weighed to, and the files that they were read from: size and time of change."""

    files: dict[str, tuple[int, int]]
    weighed: Weighed


def recorded(model: ModelSpec) -> Weighed | None:
    """What *model*'s weights were weighed to, as long as their files are what they were; None where they never were."""
    text = cache.read_text(_name_of(model))
    if text is None:
        return None
    try:
        record = msgspec.json.decode(text, type=Record)
        changed = any(_status(Path(path)) != status for path, status in record.files.items())
    except (msgspec.DecodeError, OSError):
        return None
    return None if changed else record.weighed


def record(model: ModelSpec, files: Sequence[Path], weighed: Weighed) -> None:
    """Keep what *model*'s weights in *files* were weighed to."""
    made = Record({str(path.absolute()): _status(path) for path in files}, weighed)
    cache.write_text(_name_of(model), msgspec.json.encode(made).decode())


def layer_errors(digest: str) -> LayerErrors | None:
    """The errors of a layer whose weights have this *digest*; None where it was never weighed."""
    text = cache.read_text(_name("layer", digest))
    try:
        return None if text is None else msgspec.json.decode(text, type=LayerErrors)
    except msgspec.DecodeError:
        return None


def keep_layer(digest: str, errors: LayerErrors) -> None:
    """Keep the *errors* of a layer whose weights have this *digest*."""
    cache.write_text(_name("layer", digest), msgspec.json.encode(errors).decode())


def _status(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _name_of(model: ModelSpec) -> str:
    return _name("model", {"model": model.location or model.name, "config": model.config})


def _name(kind: str, facts: Any) -> str:
    """An entry's name, the same whatever else of this program changes: weighing a large model takes minutes."""
    content = {"kind": f"weighed {kind}", "facts": facts, "by": _measured_by()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


@remembered
def _measured_by() -> list[str]:
    here = Path(__file__).parent
    sources = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in MEASURED_BY]
    return [version("bitsandbytes"), *sources]
