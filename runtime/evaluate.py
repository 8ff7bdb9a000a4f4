"""Loss and perplexity on text that was not learned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from . import quantized
from .batches import Window, micro_batch
from .step import MicroBatch, Trainee

MOST_LOSS = 700.0
"""Beyond it, exp leaves a float's range."""


def perplexity(loss: float) -> float:
    """The perplexity of a mean *loss*: infinite where it is more than a float holds."""
    return math.exp(loss) if loss < MOST_LOSS or math.isnan(loss) else math.inf


def mean_loss(
    trainee: Trainee,
    windows: Sequence[Window],
    micro_batch_size: int,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """The mean cross-entropy per target token over all *windows*, which the trainee's processes share.

    *on_batch* is called as often in each of them.
    """
    ranks = trainee.ranks
    starts = range(0, len(windows), micro_batch_size)
    losses: list[float] = []
    with evaluating(trainee.model):
        mine = ranks.share(starts)
        num_turns = -(-len(starts) // ranks.num_replicas)
        for turn in range(0, num_turns, ranks.num_stages):  # as many at once as there are stages, which all have work
            together = range(turn, min(turn + ranks.num_stages, num_turns))
            firsts = [mine[number] for number in together if number < len(mine)]
            starting = firsts or ([0] if trainee.in_step else [])  # one that counts for nothing, where others need it
            batches = [micro_batch(windows[first : first + micro_batch_size], device) for first in starting]
            losses += trainee.losses(batches)[: len(firsts)] if batches else []
            for _ in together:
                on_batch()
    return sum(ranks.interleaved(losses)) / sum(w.num_targets for w in windows)


def loss(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
    """The sum of cross-entropies over one batch, computed as an evaluation does."""
    with evaluating(trainee.model):
        return trainee.loss(batch)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout; quantized layers stay in training, or a CPU would repack their weights."""
    model.eval()
    for module in model.modules():
        if quantized.is_quantized(module):
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
