"""Documents to batches of one fixed shape, without one document ever seeing another."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .documents import Document
from .loss import IGNORED_LABEL
from .step import MicroBatch


@dataclass(frozen=True, slots=True)
class Window:
    """A window of one document: token numbers and the shifted labels, both of the sequence length."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_targets: int


def windows(documents: Sequence[Document], tokenizer: Any, sequence_length: int) -> list[Window]:
    """Cut every document into windows of *sequence_length* tokens, the last padded on the right.

    Attention is causal, so padding on the right is seen by no token before it and needs no mask; its labels are
    ignored. Prompts are read and not learned; each document ends with the end-of-text token.
    """
    end = tokenizer.eos_token_id
    start = _start(tokenizer)
    found: list[Window] = []
    for document in documents:
        prompt = [*start, *_tokens(tokenizer, document.prompt)]
        tokens = [*prompt, *_tokens(tokenizer, document.text), *([] if end is None else [end])]
        targets = [IGNORED_LABEL] * max(0, len(prompt) - 1) + tokens[max(1, len(prompt)) :]
        starts = range(0, len(targets), sequence_length)
        found += [_window(tokens, targets, first, sequence_length, end or 0) for first in starts]
    return [window for window in found if window.num_targets]


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts before a text, if any; its attributes do not always tell."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _window(tokens: list[int], targets: list[int], first: int, length: int, padding: int) -> Window:
    labels = targets[first : first + length]
    inputs = tokens[first : first + len(labels)]
    missing = length - len(labels)
    return Window(
        input_ids=tuple(inputs + [padding] * missing),
        labels=tuple(labels + [IGNORED_LABEL] * missing),
        num_targets=sum(label != IGNORED_LABEL for label in labels),
    )


def micro_batch(chosen: Sequence[Window], device: torch.device | str) -> MicroBatch:
    """Stack windows into one micro-batch on *device*."""
    return MicroBatch(
        input_ids=torch.tensor([w.input_ids for w in chosen], device=device),
        labels=torch.tensor([w.labels for w in chosen], device=device),
        num_targets=sum(w.num_targets for w in chosen),
    )


def steps(
    every: Sequence[Window], micro_batch_size: int, num_micro_batches: int, seed: int
) -> Iterator[list[list[Window]]]:
    """For each optimizer step its micro-batches, over the data again and again in a new order each time.

    The last sequences of an epoch are filled up from the next one, so that every batch has the same shape.
    """
    shuffle = random.Random(seed)  # noqa: S311  # an order, not a secret
    stock: list[Window] = []
    while True:
        while len(stock) < micro_batch_size * num_micro_batches:
            epoch = list(every)
            shuffle.shuffle(epoch)
            stock += epoch
        yield [stock[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_micro_batches)]
        del stock[: micro_batch_size * num_micro_batches]
