"""What one layer costs under one strategy, at any micro-batch, rank and sequence length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from shallowflow.profiles.specs import GpuSpec

from . import costs, latency
from .costs import OP_KINDS, SEGMENTS, Ints, StepProfile
from .plan import Bytes, Seconds
from .strategies import Method, Strategy, TargetModules

LENGTH_STRIDE = 128
"""Sequence lengths that differ by a multiple of this are described by one polynomial.

Attention kernels round a sequence up to whole tiles: the memory-efficient one to 32 in its log-sum-exp and 64 in its
backward pass, the flash kernel to 128 (PyTorch's kernel_forward.h, kernel_backward.h, flash_api.cpp).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer costs in one micro-batch, under one strategy; bytes are whole blocks of the device's allocator.

    Attributes:
        resident_bytes: held between steps: weights, quantization constants, adapter, optimizer state.
        gradient_bytes: of all that learns in it.
        saved_bytes: held from the layer's forward pass to its backward pass.
        forward_transient_bytes: beyond those, at the worst moment of its forward pass.
        backward_transient_bytes: beyond what was held when its backward pass began, at that pass's worst moment.
        recomputed_bytes: activations that were computed again, at most at once; part of the transient ones.
        host_bytes: sent to host memory for the backward pass.
        forward_seconds, backward_seconds: on the device; recomputation counts as backward.
    """

    resident_bytes: Bytes
    gradient_bytes: Bytes
    saved_bytes: int
    forward_transient_bytes: Bytes
    backward_transient_bytes: Bytes
    recomputed_bytes: Bytes
    host_bytes: Bytes
    forward_seconds: Seconds
    backward_seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that are alike, and what each of them costs under every strategy that their code allows.

    Attributes:
        layers: their numbers.
    """

    layers: tuple[int, ...]
    costs: tuple[tuple[Strategy, LayerCost], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model's layers on one GPU, each kind under each strategy.

    Attributes:
        refused: strategies that the model's code does not allow, with the reason.
    """

    model_name: str
    gpu: str
    sequence_length: int
    micro_batch_size: int
    rank: int | None
    adapter: Method
    target_modules: TargetModules | None
    kinds: tuple[LayerKind, ...]
    refused: tuple[tuple[Strategy, str], ...]


def layer_cost(profile: StepProfile, micro_batch_size: int, rank: int, gpu: GpuSpec) -> LayerCost:
    """The cost of one inner layer of *profile*."""
    curves = costs.curves(profile, micro_batch_size, rank, accumulates=True)
    forward, backward = curves["inner"], curves["inner_back"]
    seconds, _ = latency.profile_seconds(profile, micro_batch_size, rank, gpu)
    return LayerCost(
        resident_bytes=costs.resident_layer_bytes(profile, micro_batch_size, rank) + costs.state_bytes(profile, rank),
        gradient_bytes=costs.gradient_bytes(profile, 1, rank),
        saved_bytes=forward.change,
        forward_transient_bytes=forward.high - max(0, forward.change),
        backward_transient_bytes=backward.high,
        recomputed_bytes=_recomputed(profile, micro_batch_size, rank),
        host_bytes=sent_to_host(profile, micro_batch_size, rank),
        forward_seconds=seconds["inner"],
        backward_seconds=seconds["inner_back"],
    )


def _recomputed(profile: StepProfile, micro_batch_size: int, rank: int) -> int:
    """The most bytes of recomputed activations that live at once in the inner layer's backward pass."""
    steps = costs.level_changes(profile, micro_batch_size, rank)
    inner = (profile.event_segment == SEGMENTS.index("inner_back")) & (profile.event_pass == 1)
    again = profile.recomputed[np.abs(profile.events) - 1] == 1
    return max(0, int(np.cumsum(steps[inner & again]).max(initial=0)))


def sent_to_host(profile: StepProfile, micro_batch_size: int, rank: int) -> int:
    """What one inner layer sends to host memory for its backward pass."""
    _, num_bytes = costs.operator_costs(profile, micro_batch_size, rank)
    sent = (profile.op_kind == OP_KINDS.index("host")) & (profile.op_segment == SEGMENTS.index("inner"))
    return int(num_bytes[sent].sum())


class Unlike(ValueError):
    """Profiles at several sequence lengths that no polynomial of the length describes."""


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """A profile at every sequence length between the shortest and the longest sample, in steps of LENGTH_STRIDE.

    Every size is a polynomial of second degree in the length (scores are quadratic, all else is linear), which three
    samples fix, so that what is in between is as exact as the samples.

    Attributes:
        samples: three profiles by their lengths.
    """

    samples: Mapping[int, StepProfile]

    @classmethod
    def fitted(cls, samples: Mapping[int, StepProfile]) -> LengthProfile:
        """From three samples and at least one more, which the polynomial must meet.

        Raises:
            Unlike: the step does other things at another length, or a size is no such polynomial.
        """
        shortest, *between, longest = sorted(samples)
        chosen = cls({length: samples[length] for length in (shortest, between[0], longest)})
        first = samples[shortest]
        for length in between:
            if not all(np.array_equal(getattr(samples[length], name), getattr(first, name)) for name in _STRUCTURE):
                raise Unlike(f"the step does other things with {length} tokens than with {shortest}")
            if any(not np.array_equal(a, b) for a, b in _rows(chosen.at(length), samples[length])):
                raise Unlike(f"a size at {length} tokens is not on the polynomial through {sorted(chosen.samples)}")
        return chosen

    def covers(self, sequence_length: int) -> bool:
        """Whether *sequence_length* is between the samples and in step with them."""
        shortest, longest = min(self.samples), max(self.samples)
        return shortest <= sequence_length <= longest and (sequence_length - shortest) % LENGTH_STRIDE == 0

    def at(self, sequence_length: int) -> StepProfile:
        """The profile at *sequence_length*.

        Raises:
            ValueError: it is not covered.
        """
        if not self.covers(sequence_length):
            raise ValueError(f"{sequence_length} tokens are not between {sorted(self.samples)}")
        lengths = sorted(self.samples)
        profiles = [self.samples[length] for length in lengths]
        changed: dict[str, Any] = {
            name: _through(lengths, [getattr(p, name) for p in profiles], sequence_length) for name in _SIZES
        }
        return replace(profiles[0], **changed)


_SIZES = (
    "sizes",
    "op_flops",
    "op_bytes",
    "fixed",
    "layer",
    "state",
    "shared_state",
    "gradients",
    "outside_gradients",
)
_STRUCTURE = tuple(f.name for f in fields(StepProfile) if f.name not in _SIZES)


def _rows(first: StepProfile, second: StepProfile) -> list[tuple[Ints, Ints]]:
    return [(getattr(first, name), getattr(second, name)) for name in _SIZES]


def _through(lengths: Sequence[int], values: Sequence[Ints], at: int) -> Ints:
    """The parabola through *values* at three *lengths*, by Newton's divided differences in whole numbers.

    Raises:
        Unlike: its value at *at* is no whole number.
    """
    (x0, x1, x2), (y0, y1, y2) = lengths, (value.astype(object) for value in values)
    near, far, whole = x1 - x0, x2 - x1, x2 - x0
    slope, bend = (y1 - y0), (y2 - y1) * near - (y1 - y0) * far
    numerator = slope * (at - x0) * far * whole + bend * (at - x0) * (at - x1)
    rest = numerator % (near * far * whole)
    if np.any(rest):
        raise Unlike(f"a size at {at} tokens would be no whole number of bytes")
    found: Ints = (y0 + numerator // (near * far * whole)).astype(np.int64)
    return found
