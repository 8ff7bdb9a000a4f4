"""Cross-entropy over a vocabulary, whole or in chunks of tokens so that the logits are never there at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shallowflow.profiles import model_facts

from . import build, gradients, quantized

IGNORED_LABEL = -100
KEPT_SCALE = 1024.0
"""What gradients are kept times. In fp16 the probability of most tokens, some 1e-8 of one learned well, would be zero.

A power of two, which rounds nothing; they overflow only where a head's weights are beyond 32.
"""


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in fp32, summed over the tokens that have a label; shapes (..., vocabulary) and (...)."""
    return torch.nn.functional.cross_entropy(
        logits.float().view(-1, logits.size(-1)), labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def chunked(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int,
    position_ids: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """``summed`` of *model*'s logits, *chunk_tokens* at a time, with products in *dtype*, if not in the model's own.

    Each chunk's gradient is computed beside its loss, so nothing is computed twice and one chunk's logits are held.
    That of a head that learns is added to its ``grad`` at once.

    Args:
        factor: what the loss will be multiplied by before its backward pass.
        before: what the layers here go on from, where those before them are elsewhere.

    Raises:
        ValueError: the model changes its logits after the head, which chunks would miss.
    """
    if model_facts.changes_logits(model.config.to_dict()):
        raise ValueError(f"{model.config.model_type} changes its logits after the head; use the whole loss")
    base = build.without_adapter(model)
    taken = {"input_ids": input_ids} if before is None else {"inputs_embeds": before}
    if position_ids is not None:
        taken["position_ids"] = position_ids
    hidden = base.get_decoder()(**taken, use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    rows, wanted = hidden.flatten(0, -2).to(dtype or hidden.dtype), labels.flatten()
    shared: Any = getattr(head, "shared_out", None)
    if shared is not None and shared.is_divided:
        of_parts: Callable[..., torch.Tensor] = _InParts.apply
        return of_parts(rows, shared, head.bias, wanted, chunk_tokens, wants_gradient)
    apply: Callable[..., torch.Tensor] = _Chunked.apply
    with quantized.whole(head, "alone"):
        return apply(rows, head, wanted, chunk_tokens, wants_gradient, factor)


class _Chunked(torch.autograd.Function):
    """Cross-entropy of a *head*'s ``rows @ weight.T + bias``, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        head: Any,
        labels: torch.Tensor,
        chunk_tokens: int,
        wants_gradient: bool,
        factor: float,
    ) -> torch.Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(rows) if wants_gradient else None
        weight = head.weight.detach().to(rows.dtype)
        bias = None if head.bias is None else head.bias.detach().to(rows.dtype)
        learns = head if wants_gradient and head.weight.requires_grad else None
        for first in range(0, len(rows), chunk_tokens):
            here = slice(first, first + chunk_tokens)
            towards = None if gradient is None else gradient[here]
            total += _chunk(rows[here], weight, bias, labels[here], towards, learns, factor)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _kept(ctx, outer[0]), None, None, None, None, None


def _kept(ctx: Any, outer: torch.Tensor) -> torch.Tensor:
    """The gradient that was computed beside the loss, times *outer*."""
    gradient: torch.Tensor | None
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        raise RuntimeError("the gradient of a chunked loss serves one backward pass")
    return gradient.mul_((outer / KEPT_SCALE).view(1))  # with a dimension, or it would be rounded to its dtype


class _InParts(torch.autograd.Function):
    """``_Chunked`` where processes share the head: of its rows too, only one part after the other is here.

    All parts come once for each token's largest logit and the sum of exponentials beside it (Milakov and Gimelshein,
    2018), and once more for the gradient, with which logits are computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        head: Any,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
        wants_gradient: bool,
    ) -> torch.Tensor:
        chunks = [slice(first, first + chunk_tokens) for first in range(0, len(rows), chunk_tokens)]
        tops = rows.new_full((len(rows), 1), -torch.inf, dtype=torch.float32)
        sums, at_label = torch.zeros_like(tops), torch.zeros_like(tops)
        for first, weight in head.parts():
            for here in chunks:
                logits = _logits(rows[here], weight, bias, first)
                top = torch.maximum(tops[here], logits.amax(-1, keepdim=True))
                place, inside = _place(labels[here], first, len(weight))
                at_label[here] += logits.gather(-1, place) * inside
                sums[here] = sums[here] * (tops[here] - top).exp_() + logits.sub_(top).exp_().sum(-1, keepdim=True)
                tops[here] = top
                del logits
            del weight
        learned = (labels != IGNORED_LABEL).unsqueeze(-1)
        ctx.gradient = None
        if wants_gradient:
            ctx.gradient = torch.zeros_like(rows)
            for first, weight in head.parts(backward=True):
                for here in chunks:
                    logits = _logits(rows[here], weight, bias, first).sub_(tops[here]).exp_()
                    logits.mul_(learned[here] * KEPT_SCALE / sums[here])
                    place, inside = _place(labels[here], first, len(weight))
                    logits.scatter_add_(-1, place, inside * -KEPT_SCALE)
                    torch.addmm(ctx.gradient[here], logits.to(rows.dtype), weight, out=ctx.gradient[here])
                    del logits
                del weight
        return ((sums.log_() + tops - at_label) * learned).sum()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _kept(ctx, outer[0]), None, None, None, None, None


def _logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, first: int) -> torch.Tensor:
    """In fp32, of those tokens of the vocabulary whose rows *weight* has, from number *first* on."""
    own = None if bias is None else bias[first : first + len(weight)]
    return torch.nn.functional.linear(rows, weight, own).float()


def _place(labels: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where among *count* tokens from *first* on each label is, and whether it is, as a number."""
    place = (labels - first).unsqueeze(-1)
    inside = (place >= 0) & (place < count) & (labels != IGNORED_LABEL).unsqueeze(-1)
    return place.clamp_(0, count - 1), inside.float()


def _chunk(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    gradient: torch.Tensor | None,
    head: Any,
    factor: float,
) -> torch.Tensor:
    """The summed loss of a few rows; KEPT_SCALE times its *gradient*, as to them, is written where it is wanted.

    To the gradients of a *head* that learns its own is added, times *factor*.

    In fp32 and in place: the logits become probabilities, less one at the label, which is the loss's gradient.
    """
    logits = torch.nn.functional.linear(rows, weight, bias).float()
    learned = (labels != IGNORED_LABEL).unsqueeze(-1)
    label = labels.unsqueeze(-1).clamp_min(0)
    logits.sub_(logits.amax(-1, keepdim=True))
    at_label = logits.gather(-1, label)
    sums = logits.exp_().sum(-1, keepdim=True)
    loss = ((sums.log() - at_label) * learned).sum()
    if gradient is not None:
        logits.mul_(learned * KEPT_SCALE / sums)
        logits.scatter_add_(-1, label, learned * -KEPT_SCALE)
        rounded = logits.to(rows.dtype)
        torch.mm(rounded, weight, out=gradient)
        if head is not None:
            gradients.add_product(head.weight, rounded.t(), rows, factor / KEPT_SCALE)
            if head.bias is not None:
                gradients.kept(head.bias).add_(logits.sum(0), alpha=factor / KEPT_SCALE)
    return loss
