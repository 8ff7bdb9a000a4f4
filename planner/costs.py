"""A step's profile: sizes and costs as functions of micro-batch and rank, and how layers compose to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PROFILED_LAYERS = 3
"""A profile is traced on a first, an inner and a last layer; the inner one stands for all others."""

SEGMENTS = (
    "embed",
    "first",
    "inner",
    "last",
    "release",
    "head",
    "last_back",
    "inner_back",
    "first_back",
    "update",
    "deeper",
)
"""The step in order: forward through the layers, loss, backward through the layers, optimizer.

``release`` is what the model lets go of once it is through its layers, unless the first of them saved it. ``deeper`` is
no part of the step: the update of a model of one more layer, which tells what of an update is the layers' where
something learns outside of them. Where it is empty, all is.
"""

OP_KINDS = (
    "float16",
    "bfloat16",
    "float32",
    "int8",
    "batched float16",
    "batched bfloat16",
    "batched float32",
    "attention float16",
    "attention bfloat16",
    "attention float32",
    "dequantize",
    "memory",
    "host",
    "arrival",
    "gather",
    "gathered",
)
"""What an operator's time is counted by: matrix products, batches of them and fused attention by dtype, weights made
into numbers again, everything that only moves bytes on the device, what crosses between device and host, and where the
device first needs something that crosses; then the same of what comes from other devices."""


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
        state, shared_state: rows of the optimizer's state for one layer, and of what its layers share.
        workspaces: bytes of each library's workspace in each thread, 0 where nothing asks for it.
        gradients, outside_gradients: rows of one layer's gradients, and of those outside the layers.
        recomputed: (allocations,) 1 for an activation that is computed again in the backward pass, else 0.
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
    workspaces: Ints
    layer: Ints
    state: Ints
    shared_state: Ints
    gradients: Ints
    outside_gradients: Ints
    recomputed: Ints
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


@dataclass(frozen=True, slots=True)
class Curve:
    """Allocated bytes over a stretch of a step, against its start: at most, and at its end."""

    high: int
    change: int


LayerRuns = Sequence[tuple[StepProfile, int]]
"""Profiles of consecutive layers, each with how many layers have it, in the model's order."""


def with_head(profile: StepProfile, head: StepProfile) -> StepProfile:
    """*profile* with the loss of *head*, a profile of the same model whose loss is computed in another way."""
    return _with_segment(profile, head, "head")


def with_update(profile: StepProfile, update: StepProfile) -> StepProfile:
    """*profile* with the optimizer of *update*, a profile of the same model with another one."""
    other = _with_segment(_with_segment(profile, update, "update"), update, "deeper")
    return replace(other, state=update.state, shared_state=update.shared_state)


def with_deeper(update: StepProfile, deeper: StepProfile) -> StepProfile:
    """*update* with that of *deeper*, a profile of the same model with one more layer."""
    return _with_segment(update, deeper, "deeper", of="update")


def _with_segment(profile: StepProfile, other: StepProfile, name: str, of: str | None = None) -> StepProfile:
    """*profile* with, for its segment *name*, that of *other*, which begins and ends with the same tensors.

    *of* is its name there, if it is another.
    """
    segment, source = SEGMENTS.index(name), SEGMENTS.index(of or name)
    kept, taken = profile.event_segment != segment, other.event_segment == source
    kept_ops, taken_ops = profile.op_segment != segment, other.op_segment == source
    numbers = other.events[taken]

    def both(ours: Ints, theirs: Ints) -> Ints:
        return np.concatenate([ours, theirs])

    return replace(
        profile,
        sizes=both(profile.sizes, other.sizes),
        events=both(profile.events[kept], numbers + np.sign(numbers) * len(profile.sizes)),
        event_segment=both(profile.event_segment[kept], np.full_like(numbers, segment)),
        event_pass=both(profile.event_pass[kept], other.event_pass[taken]),
        op_kind=both(profile.op_kind[kept_ops], other.op_kind[taken_ops]),
        op_segment=both(profile.op_segment[kept_ops], np.full_like(other.op_segment[taken_ops], segment)),
        op_flops=both(profile.op_flops[kept_ops], other.op_flops[taken_ops]),
        op_bytes=both(profile.op_bytes[kept_ops], other.op_bytes[taken_ops]),
        recomputed=both(profile.recomputed, np.zeros_like(other.recomputed)),
    )


def level_changes(profile: StepProfile, micro_batch_size: int, rank: int) -> Ints:
    """By how many bytes each event of *profile* changes what is allocated."""
    sizes = _rounded(profile.sizes, micro_batch_size, rank, profile.alignment_bytes)
    changes: Ints = np.sign(profile.events) * sizes[np.abs(profile.events) - 1]
    return changes


def curves(profile: StepProfile, micro_batch_size: int, rank: int, *, accumulates: bool) -> dict[str, Curve]:
    """The curve of every segment of *profile*'s second micro-batch, or, if it does not accumulate, its first."""
    steps = level_changes(profile, micro_batch_size, rank)
    found: dict[str, Curve] = {}
    for index, name in enumerate(SEGMENTS):
        wanted = profile.event_pass == (1 if accumulates or name in ("update", "deeper") else 0)
        levels = np.cumsum(steps[(profile.event_segment == index) & wanted])
        found[name] = Curve(max(0, int(levels.max())), int(levels[-1])) if levels.size else Curve(0, 0)
    return found


def _stretches(runs: LayerRuns, curve: Sequence[Mapping[str, Curve]], num_layers: int) -> Iterator[tuple[Curve, int]]:
    """The curves of a whole step in order, with how often each comes in a row."""
    places = [(i, "inner", count) for i, (_, count) in enumerate(runs)]
    places[0] = (0, "inner", places[0][2] - 1)
    layers = [(0, "first", 1), *places]
    if num_layers > 1:
        index, _, count = layers[-1]
        layers[-1:] = [(index, "inner", count - 1), (index, "last", 1)]
    yield curve[0]["embed"], 1
    yield from ((curve[i][place], count) for i, place, count in layers)
    yield curve[0]["release"], 1
    yield curve[-1]["head"], 1
    yield from ((curve[i][f"{place}_back"], count) for i, place, count in reversed(layers))
    yield update_curve(curve[0], num_layers), 1


def update_curve(curve: Mapping[str, Curve], num_layers: int) -> Curve:
    """The update's curve in a model of so many layers."""
    three, four = curve["update"], curve["deeper"]
    if four == Curve(0, 0):
        return Curve(*(value * num_layers // PROFILED_LAYERS for value in (three.high, three.change)))
    more = num_layers - PROFILED_LAYERS
    return Curve(three.high + more * (four.high - three.high), three.change + more * (four.change - three.change))


def update_seconds(segments: Mapping[str, float], num_layers: int) -> float:
    """The update's time in a model of so many layers."""
    three, four = segments["update"], segments["deeper"]
    if not four:
        return three * num_layers / PROFILED_LAYERS
    return three + (num_layers - PROFILED_LAYERS) * (four - three)


def footprint(runs: LayerRuns, micro_batch_size: int, rank: int, *, accumulates: bool) -> Footprint:
    """Compose a model from its layers' profiles, each standing for layers like its inner one.

    A step of several micro-batches peaks in a later one, when all gradients are there from the start; in a step of
    one they grow during the backward pass. The peak is the largest of the stretches' own peaks; where a stretch
    repeats, its first or last repetition holds it.
    """
    num_layers = sum(count for _, count in runs)
    resident = resident_bytes(runs, micro_batch_size, rank)
    gradients = learned_bytes(runs, rank)
    curve = [curves(profile, micro_batch_size, rank, accumulates=accumulates) for profile, _ in runs]
    level = peak = resident + (gradients if accumulates else 0)
    for stretch, count in _stretches(runs, curve, num_layers):
        if count:
            peak = max(peak, level + stretch.high + max(0, (count - 1) * stretch.change))
            level += count * stretch.change
    return Footprint(resident, peak)


def resident_bytes(runs: LayerRuns, micro_batch_size: int, rank: int) -> int:
    """What lives between steps: what is outside the layers, the layers, and every workspace that any of them needs."""
    fixed = outside_bytes(runs[0][0], micro_batch_size, rank)
    workspaces = int(np.max([profile.workspaces for profile, _ in runs], axis=0).sum())
    layers = sum(
        count * (resident_layer_bytes(profile, micro_batch_size, rank) + state_bytes(profile, rank))
        for profile, count in runs
    )
    return fixed + workspaces + layers


def outside_bytes(profile: StepProfile, micro_batch_size: int, rank: int) -> int:
    """What lives between steps outside the layers, workspaces not counted."""
    rows = np.concatenate([profile.fixed, profile.shared_state])
    return int(_rounded(rows, micro_batch_size, rank, profile.alignment_bytes).sum())


def optimizer_bytes(runs: LayerRuns, rank: int) -> int:
    """The optimizer's state for all that learns, in the device's blocks."""
    first, _ = runs[0]
    shared = int(_rounded(first.shared_state, 1, rank, first.alignment_bytes).sum())
    return shared + sum(count * state_bytes(profile, rank) for profile, count in runs)


def resident_layer_bytes(profile: StepProfile, micro_batch_size: int, rank: int) -> int:
    """What one layer holds between steps but for the optimizer's state, in the device's blocks."""
    return int(_rounded(profile.layer, micro_batch_size, rank, profile.alignment_bytes).sum())


def state_bytes(profile: StepProfile, rank: int) -> int:
    """The optimizer's state for one layer, in the device's blocks."""
    return int(_rounded(profile.state, 1, rank, profile.alignment_bytes).sum())


def gradient_bytes(profile: StepProfile, num_layers: int, rank: int) -> int:
    """The gradients of *num_layers* layers, in the device's blocks."""
    return num_layers * int(_rounded(profile.gradients, 1, rank, profile.alignment_bytes).sum())


def outside_gradient_bytes(profile: StepProfile, rank: int) -> int:
    """The gradients outside the layers, in the device's blocks."""
    return int(_rounded(profile.outside_gradients, 1, rank, profile.alignment_bytes).sum())


def learned_bytes(runs: LayerRuns, rank: int) -> int:
    """The gradients of all that learns, each as large as what it is of."""
    layers = sum(gradient_bytes(profile, count, rank) for profile, count in runs)
    return layers + outside_gradient_bytes(runs[0][0], rank)


def segment_seconds(profile: StepProfile, seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    """Each segment's time, from each operator's *seconds*."""
    by_segment = np.bincount(profile.op_segment, weights=seconds, minlength=len(SEGMENTS))
    return dict(zip(SEGMENTS, by_segment.tolist(), strict=True))


def total_seconds(runs: LayerRuns, segments: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """(one micro-batch, one update) of the model of *runs*, from the *segments* of each run's profile."""
    num_layers = sum(count for _, count in runs)
    micro = segments[0]["embed"] + segments[0]["release"] + segments[-1]["head"]
    for place, count in (("first", 1), ("last", min(1, num_layers - 1))):
        at = segments[0 if place == "first" else -1]
        micro += count * (at[place] + at[f"{place}_back"])
    for index, (_, count) in enumerate(runs):
        inner = count - (index == 0) - (index == len(runs) - 1 and num_layers > 1)
        micro += inner * (segments[index]["inner"] + segments[index]["inner_back"])
    return micro, update_seconds(segments[0], num_layers)


def operator_costs(profile: StepProfile, micro_batch_size: float, rank: int) -> tuple[Ints, Ints]:
    """(flops, bytes) of every operator; a micro-batch may end with a part of a sequence."""
    values = np.array([1, micro_batch_size, rank, micro_batch_size * rank])
    return profile.op_flops @ values, profile.op_bytes @ values
