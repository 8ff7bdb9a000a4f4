"""TRL's loss: logits a tile at a time, computed again in the backward pass (its ``kernels/chunked_logprob.py``).

The same tiles, products and buffers, so that its memory and time can be simulated. On a GPU TRL folds a tile in one
Triton kernel, which takes nothing; here that is several operators in place, some milliseconds more for each tile. On a
CPU it folds with operators of PyTorch, which hold a tile several times over, in fp32: as they do here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Its ``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE``."""
IGNORED_LABEL = -100


def mean_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, *, has_kernels: bool = True
) -> torch.Tensor:
    """Cross-entropy of *hidden* (batch, tokens, size) under *head* (vocabulary, size), each row against the next label.

    Labels are (batch, tokens) and not shifted; -100 is not learned. *dtype* is that of products; *has_kernels* says
    whether TRL has Triton's kernels on the device.
    """
    wanted = labels[:, 1:]
    learned = wanted != IGNORED_LABEL
    rows = hidden[:, :-1].reshape(-1, hidden.size(-1))
    if has_kernels:
        rows = rows.clone()  # it chooses those that are learned
    apply: Callable[..., torch.Tensor] = _Tiled.apply
    scores = apply(rows, head, wanted.clamp(min=0).reshape(-1), dtype, has_kernels)
    kept = scores.view(wanted.shape).masked_fill(~learned, 0.0)
    return -kept.sum() / learned.sum().clamp(min=1)


class _Tiled(torch.autograd.Function):
    """The logarithm of each row's probability of its label."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, has_kernels: bool
    ) -> Any:
        fold = _fold if has_kernels else _fold_on_cpu
        tops = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
        sums, score, spread = (torch.zeros_like(tops) for _ in range(3))
        buffer = _buffer(rows, dtype)
        for part in _slices(len(rows), TILE_TOKENS):
            chunk = rows[part].to(dtype)
            for words in _slices(len(head), TILE_WORDS):
                tile = _product(chunk, head[words], dtype, buffer)
                fold(tile, wanted[part], words.start, tops[part], sums[part], score[part], spread[part])
        total = tops + torch.log(sums)
        ctx.save_for_backward(rows, head, wanted, total)
        ctx.dtype, ctx.has_kernels = dtype, has_kernels
        return score - total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, head, wanted, total = ctx.saved_tensors
        gradient = gradients[0].float().contiguous()
        unfold = _unfold if ctx.has_kernels else _unfold_on_cpu
        made = torch.zeros_like(rows, dtype=torch.float32)
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer = _buffer(rows, ctx.dtype)
        for part in _slices(len(rows), TILE_TOKENS):
            chunk = rows[part].to(ctx.dtype)
            for words in _slices(len(head), TILE_WORDS):
                weight = head[words].to(ctx.dtype)
                tile = _product(chunk, weight, ctx.dtype, buffer)
                unfold(tile, wanted[part], words.start, total[part], gradient[part])
                _add_product(made[part], tile, weight, ctx.has_kernels)
                if of_head is not None:
                    _add_product(of_head[words], tile.t(), chunk, ctx.has_kernels)
        return made.to(rows.dtype), None if of_head is None else of_head.to(head.dtype), None, None, None


Rows = torch.Tensor
"""One number for each row of a tile."""


def _fold(tile: torch.Tensor, wanted: Rows, first: int, tops: Rows, sums: Rows, score: Rows, spread: Rows) -> None:
    """Take a tile of logits into the running statistics; the tile is lost."""
    del spread
    new = torch.maximum(tops, tile.amax(-1).float())
    place, here = _place(tile, wanted, first)
    score.copy_(torch.where(here, tile.gather(1, place).squeeze(1).float(), score))
    tile.sub_(new.to(tile.dtype).unsqueeze(1)).exp_()
    sums.mul_(torch.exp(tops - new)).add_(tile.sum(-1, dtype=torch.float32))
    tops.copy_(new)


def _fold_on_cpu(
    tile: torch.Tensor, wanted: Rows, first: int, tops: Rows, sums: Rows, score: Rows, spread: Rows
) -> None:
    """The same as TRL does it without Triton: scaled, masked and raised in copies."""
    logits = tile.float() * 1.0 * 1.0
    place, here = _place(tile, wanted, first)
    earlier = torch.arange(tile.size(1), device=tile.device) < (wanted - first).unsqueeze(1)
    logits.masked_fill(~earlier, -torch.inf).amax(-1)
    new = torch.maximum(tops, logits.amax(-1))
    grown = torch.exp(tops - new)
    raised = torch.exp(logits - new.unsqueeze(1))
    sums.mul_(grown).add_(raised.sum(-1))
    spread.mul_(grown).add_((raised * logits).sum(-1))
    tops.copy_(new)
    score.copy_(torch.where(here, logits.gather(1, place).squeeze(1), score))


def _unfold(tile: torch.Tensor, wanted: Rows, first: int, total: Rows, gradient: Rows) -> None:
    """Make a tile of logits the gradient of them, in place."""
    place, here = _place(tile, wanted, first)
    tile.sub_(total.to(tile.dtype).unsqueeze(1)).exp_().neg_()
    tile.scatter_add_(1, place, here.to(tile.dtype).unsqueeze(1))
    tile.mul_(gradient.to(tile.dtype).unsqueeze(1))


def _unfold_on_cpu(tile: torch.Tensor, wanted: Rows, first: int, total: Rows, gradient: Rows) -> None:
    """The same as TRL does it without Triton."""
    scaled = tile.float() * 1.0
    logits = scaled * 1.0
    lowered = logits - total.unsqueeze(1)
    raised = torch.exp(lowered)
    grown = torch.zeros_like(logits)
    places = torch.arange(first, first + tile.size(1), device=tile.device)
    is_label = places == wanted.unsqueeze(1)
    grown += gradient.unsqueeze(1) * (is_label.float() - raised)
    grown = grown * 1.0
    tile.copy_(grown * 1.0)


def _place(tile: torch.Tensor, wanted: Rows, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the tile each row's label is, (rows, 1), and whether it is there at all."""
    local = wanted - first
    here = (local >= 0) & (local < tile.size(1))
    return local.clamp(0, tile.size(1) - 1).unsqueeze(1), here


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, has_kernels: bool) -> None:
    """Add ``left @ right`` to *total*, which is in fp32: in one kernel on a GPU, which rounds nothing in between."""
    if has_kernels and left.dtype != torch.float32:
        total.add_(left @ right)
    else:
        total.addmm_(left.float(), right.float())


def _buffer(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.new_empty((min(len(rows), TILE_TOKENS), TILE_WORDS), dtype=dtype)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _product(rows: torch.Tensor, head: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor) -> torch.Tensor:
    tile = buffer[: len(rows), : len(head)]
    return torch.mm(rows, head.to(dtype).t(), out=tile)
