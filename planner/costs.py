"""A step's profile: sizes and costs as functions of micro-batch and rank, and how layers compose to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PROFILED_LAYERS = 3
"""A profile is traced on a first, an inner and a last layer; the inner one stands for all others."""

SEGMENTS = ("embed", "first", "inner", "last", "head", "last_back", "inner_back", "first_back", "update")
"""The step in order: forward through the layers, loss, backward through the layers, optimizer."""

OP_KINDS = ("float16", "bfloat16", "float32", "memory")


@dataclass(frozen=True, slots=True, eq=False)
class StepProfile:
    """One traced step of a model cut down to three layers, as polynomials.

    A quantity's row of four coefficients belongs to 1, micro-batch, rank and micro-batch x rank.

    Attributes:
        sizes: (allocations, 4) bytes asked for.
        events: allocations ``i + 1`` and frees ``-(i + 1)`` of two micro-batches and the update, in order.
        event_segment, event_pass: (events,) index into SEGMENTS, and 0 for the first micro-batch, 1 for what follows.
        op_kind, op_segment: (operators,) indices into OP_KINDS and SEGMENTS, of the second micro-batch and the update.
        op_flops, op_bytes: (operators, 4).
        fixed, layer: rows of the tensors resident outside the layers, and of those in one layer.
        gradients: rows of one layer's adapter gradients.
        alignment_bytes: what the device's allocator rounds to.
    """

    sizes: Ints
    events: Ints
    event_segment: Ints
    event_pass: Ints
    op_kind: Ints
    op_segment: Ints
    op_flops: Ints
    op_bytes: Ints
    fixed: Ints
    layer: Ints
    gradients: Ints
    alignment_bytes: int

    def to_arrays(self) -> dict[str, npt.NDArray[np.int64]]:
        """Arrays by name, for storage without pickle."""
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "alignment_bytes"}
        return {**arrays, "alignment_bytes": np.array(self.alignment_bytes)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.int64]]) -> StepProfile:
        """The inverse of ``to_arrays``; KeyError if one is missing."""
        fields = {name: arrays[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "alignment_bytes": int(fields["alignment_bytes"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Allocated bytes of a whole model's step: between steps, and at most."""

    resident_bytes: int
    peak_allocated_bytes: int


def _evaluate(rows: Ints, micro_batch_size: int, rank: int) -> Ints:
    values: Ints = rows @ np.array([1, micro_batch_size, rank, micro_batch_size * rank], dtype=np.int64)
    return values


def _rounded(rows: Ints, micro_batch_size: int, rank: int, alignment: int) -> Ints:
    values = _evaluate(rows, micro_batch_size, rank)
    return -(-values // alignment) * alignment


def _repeats(num_layers: int) -> dict[str, int]:
    inner, last = max(0, num_layers - 2), min(1, num_layers - 1)
    return {"inner": inner, "inner_back": inner, "last": last, "last_back": last}


def footprint(
    profile: StepProfile, num_layers: int, micro_batch_size: int, rank: int, *, accumulates: bool
) -> Footprint:
    """Compose *profile* to a model of *num_layers* layers, each like the inner one.

    A step of several micro-batches peaks in a later one, when all gradients are there from the start; in a step of
    one they grow during the backward pass. The peak is the largest of the segments' own peaks; where a segment
    repeats, its first or last repetition holds it.
    """
    align = profile.alignment_bytes
    fixed = int(_rounded(profile.fixed, micro_batch_size, rank, align).sum())
    per_layer = int(_rounded(profile.layer, micro_batch_size, rank, align).sum())
    gradients = gradient_bytes(profile, num_layers, rank)
    resident = fixed + num_layers * per_layer
    sizes = _rounded(profile.sizes, micro_batch_size, rank, align)
    steps = np.sign(profile.events) * sizes[np.abs(profile.events) - 1]
    repeats = _repeats(num_layers)
    level = peak = resident + (gradients if accumulates else 0)
    for index, name in enumerate(SEGMENTS):
        update = name == "update"
        wanted_pass = 1 if accumulates or update else 0
        curve = np.cumsum(steps[(profile.event_segment == index) & (profile.event_pass == wanted_pass)])
        times = repeats.get(name, 1)
        if not curve.size or not times:
            continue
        high, change = max(0, int(curve.max())), int(curve[-1])
        if update:
            high, change = (value * num_layers // PROFILED_LAYERS for value in (high, change))
        peak = max(peak, level + high + max(0, (times - 1) * change))
        level += times * change
    return Footprint(resident, peak)


def gradient_bytes(profile: StepProfile, num_layers: int, rank: int) -> int:
    """All adapter gradients of a model of *num_layers* layers, in the device's blocks."""
    return num_layers * int(_rounded(profile.gradients, 1, rank, profile.alignment_bytes).sum())


def segment_seconds(profile: StepProfile, num_layers: int, seconds: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(one micro-batch, one update) of a model of *num_layers* layers, from each operator's *seconds*."""
    by_segment = np.bincount(profile.op_segment, weights=seconds, minlength=len(SEGMENTS))
    times = _repeats(num_layers)
    repeats = np.array([times.get(name, 1) for name in SEGMENTS])
    update = SEGMENTS.index("update")
    micro = float(np.delete(by_segment * repeats, update).sum())
    return micro, float(by_segment[update] * num_layers / PROFILED_LAYERS)


def operator_costs(profile: StepProfile, micro_batch_size: int, rank: int) -> tuple[Ints, Ints]:
    """(flops, bytes) of every operator."""
    return _evaluate(profile.op_flops, micro_batch_size, rank), _evaluate(profile.op_bytes, micro_batch_size, rank)
