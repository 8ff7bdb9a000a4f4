"""What one training step takes of a device's memory: the same record whether simulated or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .plan import MemoryPart

RECORD_VERSION = 2


class OutOfDeviceMemory(Exception):
    """A request that a device of some capacity does not serve."""


@dataclass(frozen=True, slots=True)
class TracedPeak:
    """What tracing a whole step and replaying it through the allocator gave.

    Attributes:
        parts: the process's memory at the peak by category; sums to reserved plus context.
        peak_allocated_bytes: of the step; reserved is of the step and an evaluation after it.
        attention: the implementation that the model took.
        evaluation_allocated_bytes: the most during an evaluation of one micro-batch.
    """

    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    parts: tuple[MemoryPart, ...]
    attention: str
    evaluation_allocated_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The most bytes allocated during one phase of the steady step."""

    phase: str
    peak_allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryBytes:
    """Bytes of one category at the moment of the peak, fragmentation and context included."""

    category: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBytes:
    """Blocks in use at the moment of the peak, of one category and one module; ``""`` is outside of any."""

    category: str
    module: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The allocator over one step.

    Attributes:
        positions: allocations and frees since the step began; each point is the highest of its stretch.
        categories: bytes of each category at every position.
        reserved_bytes: segments held at every position.
        phases: (position, name) of where each phase begins.
    """

    positions: tuple[int, ...]
    categories: dict[str, tuple[int, ...]]
    reserved_bytes: tuple[int, ...]
    phases: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRecord:
    """A training step's memory on one device.

    Attributes:
        resident_bytes: allocated just before the steady step.
        peak_allocated_bytes: most bytes in live blocks, during the steady step.
        peak_reserved_bytes: most bytes held by the caching allocator since the process began; equal to the highest
            allocated on a CPU, which keeps no cache.
        peak_process_bytes: reserved plus the CUDA context.
        peak_phase, peak_module: where the peak is; empty where that was not seen.
        step_seconds: of a simulation, what the latency model gives; None where time was not measured.
        num_retries: how often cached memory had to be given back to the device to serve a request.
        categories: of a simulation; sum to ``peak_process_bytes``. Empty for a measurement.
        modules: of a simulation, by category and module, largest first; sum to ``peak_allocated_bytes``.
        timeline: of a simulation.
    """

    format_version: int
    kind: Literal["simulated", "measured"]
    device: str
    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_process_bytes: int
    peak_phase: str
    peak_module: str
    step_seconds: float | None
    phases: tuple[PhasePeak, ...]
    categories: tuple[CategoryBytes, ...]
    num_retries: int = 0
    modules: tuple[LiveBytes, ...] = ()
    timeline: Timeline | None = None
