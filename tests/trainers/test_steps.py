"""The simulated step against the trainer itself, run on a CPU with every byte that PyTorch's allocator reports."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch

from shallowflow.planner.profiler.user_step import simulate_accumulated
from shallowflow.profiles import load_gpu
from shallowflow.runtime.trainers import live, tiled
from shallowflow.runtime.trainers.steps import make_step
from tests.trainers import really
from tests.trainers.really import Work

TOLERANCE = 0.003
"""Of the peak: the batches, labels and masks of a data loader, and a scalar for each parameter of AdamW."""
WORKS = (
    Work(),
    Work(recomputes=True, gradient_accumulation_steps=2),
    Work(adapter=False, optimizer="adamw_torch_fused", gradient_accumulation_steps=2),
)


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("make", [really.plain, really.sft])
def test_the_simulated_peak_is_the_trainers(make: really.Make, work: Work) -> None:
    """Nothing of the trainer is told but what it was made with, as ``shallowflow.check`` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = live.settings_of(make(work, folder))

    record, _ = simulate_accumulated(make_step(settings, really.CONFIG, "cpu"), load_gpu("cpu"))

    assert record.peak_allocated_bytes == pytest.approx(really.peak_bytes(make, work), rel=TOLERANCE)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(("tokens", "words"), [(4096, 32768), (5, 7), (13, 24)])
def test_tiles_come_to_the_whole(
    tokens: int, words: int, has_kernels: bool, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, and gradients of hidden states and head, are those of cross-entropy over whole logits."""
    monkeypatch.setattr(tiled, "TILE_TOKENS", tokens)
    monkeypatch.setattr(tiled, "TILE_WORDS", words)
    torch.manual_seed(0)
    labels = torch.randint(0, 24, (3, 9))
    labels[0, :4] = tiled.IGNORED_LABEL
    start, weight = torch.randn(3, 9, 8), torch.randn(24, 8)

    def whole(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ head.t())[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    def in_tiles(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return tiled.mean_loss(hidden, head, labels, torch.float32, has_kernels=has_kernels)

    wanted, found = (_differentiated(loss, start, weight, learns=learns) for loss in (whole, in_tiles))

    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _differentiated(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    weight: torch.Tensor,
    *,
    learns: bool,
) -> list[torch.Tensor]:
    """The loss and its gradients."""
    hidden, head = start.clone().requires_grad_(), weight.clone().requires_grad_(learns)
    found = loss(hidden, head)
    found.backward()
    assert hidden.grad is not None and (head.grad is not None) == learns
    return [found.detach(), hidden.grad, *([] if head.grad is None else [head.grad])]
