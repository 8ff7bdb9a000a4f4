"""Profiles and traced peaks on disk, found again by their content; loads no torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import platformdirs

from shallowflow.planner.costs import StepProfile
from shallowflow.planner.memory_record import TracedPeak

_UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading a damaged entry raises; msgspec's and Unicode's errors are ValueErrors."""

TRACED_WITH = ("torch", "transformers", "peft", "bitsandbytes")


def folder() -> Path:
    """Where the cache lies: ``SHALLOWFLOW_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("SHALLOWFLOW_CACHE") or platformdirs.user_cache_dir("shallowflow"))


@cache
def versions() -> dict[str, str]:
    """Versions of the packages whose code is traced."""
    found: dict[str, str] = {}
    for package in TRACED_WITH:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def _own_code() -> str:
    """A digest of the code that makes profiles, so that a changed rule never meets an old answer."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for source in sorted(p for name in ("planner", "profiles", "runtime") for p in (root / name).rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def key(kind: str, facts: Mapping[str, Any]) -> str:
    """A name for an entry that says everything it depends on."""
    content = {"kind": kind, "facts": facts, "versions": versions(), "code": _own_code()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read_profile(name: str) -> StepProfile | None:
    """The stored profile, or None; a damaged entry counts as none."""
    try:
        content = io.BytesIO((folder() / f"{name}.npz").read_bytes())
        with np.load(content, allow_pickle=False) as arrays:
            return StepProfile.from_arrays(arrays)
    except Exception:  # noqa: BLE001 - numpy reads a damaged header as Python, which fails in a dozen ways
        return None


def write_profile(name: str, profile: StepProfile) -> None:
    """Store *profile*; a cache that cannot be written is done without."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **profile.to_arrays())  # type: ignore[arg-type]

    _write(f"{name}.npz", save)


def read_peak(name: str) -> TracedPeak | None:
    """The stored peak, or None."""
    try:
        return msgspec.json.decode((folder() / f"{name}.json").read_bytes(), type=TracedPeak)
    except _UNREADABLE:
        return None


def write_peak(name: str, peak: TracedPeak) -> None:
    """Store *peak*."""
    _write(f"{name}.json", lambda path: path.write_bytes(msgspec.json.encode(peak)))


def read_numbers(name: str) -> tuple[int, ...] | None:
    """The stored numbers, or None."""
    try:
        return msgspec.json.decode((folder() / f"{name}.json").read_bytes(), type=tuple[int, ...])
    except _UNREADABLE:
        return None


def write_numbers(name: str, numbers: tuple[int, ...]) -> None:
    """Store *numbers*."""
    _write(f"{name}.json", lambda path: path.write_bytes(msgspec.json.encode(numbers)))


def read_text(name: str) -> str | None:
    """The stored text, or None."""
    try:
        return (folder() / f"{name}.json").read_text(encoding="utf-8")
    except _UNREADABLE:
        return None


def write_text(name: str, text: str) -> None:
    """Store *text*."""
    _write(f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def _write(name: str, save: Any) -> None:
    """Write beside, then rename, so that a reader never meets half an entry."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder())
        os.close(handle)
        try:
            save(Path(temporary))
            os.replace(temporary, folder() / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        return
