"""How windows of documents come to sequences: several to a sequence, or one each in micro-batches of like length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shallowflow.profiles.specs import GpuSpec

from . import latency
from .costs import LayerRuns
from .plan import Workload
from .strategies import Configuration

LENGTH_STEP = 64
"""Tokens that a trimmed micro-batch's length is a multiple of, so that kernels and allocator meet few shapes."""

MASK_ALIGNMENT = 16
"""Tokens that a packed sequence's length is a multiple of: the memory-efficient kernel reads masks in such pieces.

PyTorch would copy any other mask for every head (``preprocess_mask`` in ATen's attention.cpp).
"""


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of *lengths* by bins of *capacity*: each goes, the longest first, where first there is room for it."""
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # a tree: each node has the most room of the bins below it
    bins: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[number] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(number)
        room[node] -= lengths[number]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def trimmed_length(longest: int, sequence_length: int) -> int:
    """The length of a micro-batch whose longest window has *longest* tokens."""
    return min(sequence_length, -(-longest // LENGTH_STEP) * LENGTH_STEP)


def window_counts(lengths: Sequence[int], sequence_length: int) -> tuple[int, ...]:
    """How many windows of these *lengths* are trimmed to one, two, ... times LENGTH_STEP."""
    steps = -(-sequence_length // LENGTH_STEP)
    counts = np.bincount([-(-length // LENGTH_STEP) - 1 for length in lengths], minlength=steps)
    return tuple(counts.tolist())


def trimmed_shares(counts: Sequence[int], num_windows: int, micro_batch_size: int) -> npt.NDArray[np.float64]:
    """The share of micro-batches that comes to each of the lengths that *counts* are of.

    A step has *num_windows* drawn at random, which are cut into micro-batches by their order of length: the longest of
    each micro-batch is one of the draw's order statistics. Left out: that a data set's windows are drawn once each.
    """
    from scipy.special import bdtr

    shorter = np.cumsum(counts) / sum(counts)
    longest = np.arange(0, num_windows, micro_batch_size)
    at_most = bdtr(longest[:, None], num_windows, 1 - shorter[None, :])
    shares: npt.NDArray[np.float64] = np.diff(at_most, axis=1, prepend=0.0).mean(axis=0)
    return shares


def trimmed_seconds(runs: LayerRuns, configuration: Configuration, workload: Workload, gpu: GpuSpec) -> float:
    """What a step of *configuration* is spared, on the mean, where micro-batches are trimmed to their longest window.

    Nothing where the lengths of the data are not known, or documents are packed.
    """
    if configuration.packing or not any(workload.window_counts):
        return 0.0
    size, num_micro_batches = configuration.micro_batch_size, configuration.gradient_accumulation_steps
    length = configuration.sequence_length

    def seconds(tokens: int) -> float:
        return latency.step_seconds(runs, size, configuration.rank or 0, gpu, tokens / length).micro_batch_seconds

    shares: list[float] = trimmed_shares(workload.window_counts, size * num_micro_batches, size).tolist()
    lengths = [trimmed_length(steps * LENGTH_STEP, length) for steps in range(1, len(shares) + 1)]
    mean = sum(share * seconds(tokens) for share, tokens in zip(shares, lengths, strict=True) if share)
    return num_micro_batches * max(0.0, seconds(length) - mean)
