"""What is found of a trainer's settings, and what all traps ask of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shallowflow.profiles import GpuSpec

from .settings import Settings

Severity = Literal["fails", "wrong", "slow", "late"]
AMPERE = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trap that settings walk into.

    Attributes:
        trap: a short name of it.
        severity: the run fails; it learns something else than was meant; it takes longer or more memory than it
            needs; or trouble shows late.
        where: the line of the file, as ``key: value``.
        what: what happens.
        instead: what to write, or to do.
    """

    trap: str
    severity: Severity
    where: str
    what: str
    instead: str


Trap = Callable[[Settings, Mapping[str, Any], GpuSpec], Iterator[Finding]]


def is_old(gpu: GpuSpec) -> bool:
    """Whether *gpu* is older than Ampere: no bf16, no FlashAttention, no products by Triton."""
    return gpu.compute_capability is not None and gpu.compute_capability < AMPERE


def a(gpu: GpuSpec) -> str:
    """*gpu* with its article."""
    return f"{'an' if gpu.title.startswith(('A', 'E', 'I', 'L', 'NVIDIA', 'O')) else 'a'} {gpu.title}"
