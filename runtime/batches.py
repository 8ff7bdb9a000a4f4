"""Documents to batches, without one document ever seeing another."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shallowflow.planner.packing import first_fit_decreasing, trimmed_length

from .documents import Example
from .loss import IGNORED_LABEL
from .step import MicroBatch
from .tokens import tokens_of

PADDING = 0
"""The token after a window's end: read by no other, and not learned."""

NUM_WHOLE_STEPS = 2
"""Steps that are not trimmed: the second is the first to meet the optimizer's state, so that the planned peak is
reached at once or never."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window of one document, or several that are packed: token numbers and the shifted labels.

    Attributes:
        input_ids, labels: arrays of 4 bytes a token, which tuples would need 24 for.
        packed: the lengths of the packed windows, one after the other; empty for a window that stands alone.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    num_targets: int
    packed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """The windows of one micro-batch, the length that they are padded to, and whether that is the planned one."""

    windows: tuple[Window, ...]
    length: int
    is_whole: bool


def windows(documents: Sequence[Example], tokenizer: Any, sequence_length: int) -> list[Window]:
    """Cut every document into windows of at most *sequence_length* tokens."""
    found: list[Window] = []
    for document in documents:
        tokens, learned = tokens_of(document, tokenizer)
        targets = [token if wanted else IGNORED_LABEL for token, wanted in zip(tokens[1:], learned[1:], strict=True)]
        starts = range(0, len(targets), sequence_length)
        found += [_window(tokens, targets, first, sequence_length) for first in starts]
    return [window for window in found if window.num_targets]


def _window(tokens: list[int], targets: list[int], first: int, length: int) -> Window:
    labels = targets[first : first + length]
    return Window(
        input_ids=array("i", tokens[first : first + len(labels)]),
        labels=array("i", labels),
        num_targets=sum(label != IGNORED_LABEL for label in labels),
    )


def packed(every: Sequence[Window], sequence_length: int) -> list[Window]:
    """As few sequences of at most *sequence_length* tokens as first-fit decreasing packs *every* window into."""
    bins = first_fit_decreasing([len(window.input_ids) for window in every], sequence_length)
    return [_joined([every[number] for number in chosen]) for chosen in bins]


def _joined(chosen: Sequence[Window]) -> Window:
    return Window(
        input_ids=array("i", itertools.chain.from_iterable(window.input_ids for window in chosen)),
        labels=array("i", itertools.chain.from_iterable(window.labels for window in chosen)),
        num_targets=sum(window.num_targets for window in chosen),
        packed=tuple(len(window.input_ids) for window in chosen),
    )


def micro_batch(chosen: Sequence[Window], device: torch.device | str, length: int | None = None) -> MicroBatch:
    """Stack windows into one micro-batch on *device*, padded on the right to *length*, or to the longest of them.

    Attention is causal, so padding on the right is seen by no token before it and needs no mask; its labels are
    ignored. In packed sequences positions begin anew with each window, and with the padding.
    """
    length = length or max(len(window.input_ids) for window in chosen)
    positions = [_positions(w.packed, length) for w in chosen] if any(w.packed for w in chosen) else None
    return MicroBatch(
        input_ids=_padded([w.input_ids for w in chosen], length, PADDING).to(device),
        labels=_padded([w.labels for w in chosen], length, IGNORED_LABEL).to(device),
        num_targets=sum(w.num_targets for w in chosen),
        position_ids=None if positions is None else torch.tensor(positions, device=device),
    )


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> torch.Tensor:
    made = np.full((len(rows), length), padding, dtype=np.int64)
    for row, values in zip(made, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(made)


def _positions(lengths: tuple[int, ...], total: int) -> list[int]:
    return [position for length in (*lengths, total - sum(lengths)) for position in range(length)]


def steps(
    every: Sequence[Window],
    micro_batch_size: int,
    num_micro_batches: int,
    sequence_length: int,
    seed: int,
    first_whole: int = 0,
) -> Iterator[list[Group]]:
    """For each optimizer step its micro-batches, over the data again and again in a new order each time.

    The last sequences of an epoch are filled up from the next one, so that every step has as many. Which windows a
    step has does not depend on their lengths; how they are spread over its micro-batches does, and that changes no
    gradient. Each micro-batch is as long as its longest window, but in the first steps from *first_whole* on as long as
    *sequence_length*.
    """
    shuffle = random.Random(seed)  # noqa: S311  # an order, not a secret
    stock: list[Window] = []
    num_windows = micro_batch_size * num_micro_batches
    for number in itertools.count():
        while len(stock) < num_windows:
            epoch = list(every)
            shuffle.shuffle(epoch)
            stock += epoch
        chosen = sorted(stock[:num_windows], key=lambda window: -len(window.input_ids))
        del stock[:num_windows]
        yield [
            _group(
                chosen[first : first + micro_batch_size],
                sequence_length,
                trims=not 0 <= number - first_whole < NUM_WHOLE_STEPS,
            )
            for first in range(0, num_windows, micro_batch_size)
        ]


def _group(chosen: Sequence[Window], sequence_length: int, *, trims: bool) -> Group:
    longest = max(len(window.input_ids) for window in chosen)
    length = trimmed_length(longest, sequence_length) if trims else sequence_length
    return Group(tuple(chosen), length, is_whole=length == sequence_length)
