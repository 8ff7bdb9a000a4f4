"""A device whose memory runs out where a test says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shallowflow.runtime.step import MicroBatch, Trainee

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Seen:
    """What every micro-batch of a step held, and a device whose memory runs out at some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[list[int]]] = []
        self.fails: Callable[[Seen], bool] = lambda _seen: False
        real = Trainee.loss

        def loss(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
            if batch.input_ids.is_meta:
                return real(trainee, batch)
            if torch.is_grad_enabled():
                self.batches.append(batch.input_ids.tolist())
            if self.fails(self):
                raise torch.OutOfMemoryError(OUT)
            return real(trainee, batch)

        monkeypatch.setattr(Trainee, "loss", loss)
