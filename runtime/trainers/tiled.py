"""TRL's loss: logits a tile at a time, computed again in the backward pass (its ``kernels/chunked_logprob.py``).

The same tiles, products and buffers, so that its memory and time can be simulated. What TRL does to a tile in one
Triton kernel is several in-place operators here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Its ``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE``."""
IGNORED_LABEL = -100


def mean_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cross-entropy of *hidden* (batch, tokens, size) under *head* (vocabulary, size), each row against the next label.

    Labels are (batch, tokens) and not shifted; -100 is not learned.
    """
    rows = hidden[:, :-1].reshape(-1, hidden.size(-1))
    wanted = labels[:, 1:].reshape(-1)
    losses: torch.Tensor = _Tiled.apply(rows, head, wanted.clamp(min=0), dtype)
    learned = wanted != IGNORED_LABEL
    return losses.masked_fill(~learned, 0.0).sum() / learned.sum().clamp(min=1)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> Any:
        buffer = _buffer(rows, dtype)
        total = torch.full_like(wanted, -torch.inf, dtype=torch.float32)
        score = torch.zeros_like(total)
        for part, words in _tiles(rows, head):
            tile = _product(rows[part], head[words], dtype, buffer)
            total[part] = torch.logaddexp(total[part], torch.logsumexp(tile, dim=-1).float())
            here = _here(wanted[part], words)
            found = tile.gather(1, (wanted[part] - words.start).clamp(0, tile.size(1) - 1).unsqueeze(1)).squeeze(1)
            score[part] = torch.where(here, found.float(), score[part])
        ctx.save_for_backward(rows, head, wanted, total)
        ctx.dtype = dtype
        return total - score

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, head, wanted, total = ctx.saved_tensors
        (gradient,) = gradients
        buffer = _buffer(rows, ctx.dtype)
        made = torch.zeros_like(rows, dtype=torch.float32)
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part, words in _tiles(rows, head):
            tile = _product(rows[part], head[words], ctx.dtype, buffer)
            tile.sub_(total[part].to(tile.dtype).unsqueeze(1)).exp_()
            here = _here(wanted[part], words).to(tile.dtype).unsqueeze(1)
            tile.scatter_add_(1, (wanted[part] - words.start).clamp(0, tile.size(1) - 1).unsqueeze(1), -here)
            tile.mul_(gradient[part].to(tile.dtype).unsqueeze(1))
            made[part] += tile @ head[words].to(ctx.dtype)
            if of_head is not None:
                of_head[words] += tile.t() @ rows[part].to(ctx.dtype)
        return made.to(rows.dtype), None if of_head is None else of_head.to(head.dtype), None, None


def _buffer(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.new_empty((min(len(rows), TILE_TOKENS), TILE_WORDS), dtype=dtype)


def _tiles(rows: torch.Tensor, head: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    return itertools.product(_slices(len(rows), TILE_TOKENS), _slices(len(head), TILE_WORDS))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _product(rows: torch.Tensor, head: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor) -> torch.Tensor:
    tile = buffer[: len(rows), : len(head)]
    return torch.mm(rows.to(dtype), head.to(dtype).t(), out=tile)


def _here(wanted: torch.Tensor, words: slice) -> torch.Tensor:
    return (wanted >= words.start) & (wanted < words.stop)
