"""Profiling a step: a toy counted by hand, steps that no polynomial describes, every segment, the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowflow.planner import costs
from shallowflow.planner.costs import SEGMENTS, StepProfile
from shallowflow.planner.profiler.optimizers import NORM_CHUNK
from shallowflow.planner.profiler.profile import CORNERS, Misaligned, profile_step
from shallowflow.planner.strategies import Strategy
from shallowflow.profiles import ModelSpec, load_gpu
from shallowflow.session import Session
from tests.planner import tiny
from tests.profile_strategies import same


@dataclass
class Toy:
    """Three layers of a frozen matrix with an adapter each, whose sizes can be counted on fingers."""

    micro_batch_size: int
    rank: int
    habit: Callable[[torch.Tensor, int], torch.Tensor]

    WIDTH = 256

    def __post_init__(self) -> None:
        with torch.device("meta"):
            self.model = torch.nn.Sequential(*(ToyLayer(self.WIDTH, self.rank, self.habit) for _ in range(3)))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, foreach=True)
        self.attention = "none"

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        return list(self.model)

    def resident_tensors(self) -> Sequence[Any]:
        return [
            ToyResident("adapter" if p.requires_grad else "base weights", "", number, p)
            for number, layer in enumerate(self.layers)
            for p in layer.parameters()
        ]

    def prime(self) -> None:
        self.run(1)

    def run(self, num_micro_batches: int | None = None) -> object:
        for _ in range(num_micro_batches or 2):
            out = self.model(torch.empty(self.micro_batch_size, self.WIDTH, device="meta"))
            out.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def evaluate(self) -> object:
        raise AssertionError("profiles do not evaluate")


@dataclass
class ToyResident:
    category: str
    path: str
    layer: int | None
    tensor: torch.Tensor


class ToyLayer(torch.nn.Module):
    def __init__(self, width: int, rank: int, habit: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.base = torch.nn.Parameter(torch.empty(width, width), requires_grad=False)
        self.down = torch.nn.Parameter(torch.empty(width, rank))
        self.up = torch.nn.Parameter(torch.empty(rank, width))
        self.habit = habit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.habit(x @ self.base + x @ self.down @ self.up, self.down.shape[1])


def test_a_toy_is_counted_by_hand() -> None:
    """Weights, adapters and moments of a toy are resident; its gradients are its adapters once more."""
    profile = profile_step(lambda b, r: Toy(b, r, lambda x, _rank: x), tiny.target("t4"))

    found = costs.footprint([(profile, 10)], 4, 8, accumulates=True)

    weights, adapter = 4 * 256 * 256, 2 * 4 * 256 * 8
    workspaces = 2 * 8_519_680
    assert found.resident_bytes == 10 * (weights + 3 * adapter) + workspaces
    assert costs.gradient_bytes(profile, 10, 8) == 10 * adapter
    assert found.peak_allocated_bytes >= found.resident_bytes + 10 * adapter


def copies_large_batches(x: torch.Tensor, _rank: int) -> torch.Tensor:
    return x + 0 if x.shape[0] > 2 else x


def rounds_the_rank(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x + torch.empty(rank // 3, device=x.device).sum()


@pytest.mark.parametrize(
    ("habit", "reason"), [(copies_large_batches, "another order"), (rounds_the_rank, "no polynomial")]
)
def test_a_step_of_another_shape_is_misaligned(habit: Callable[[torch.Tensor, int], torch.Tensor], reason: str) -> None:
    """A step that does other things at another micro-batch, or has sizes that no polynomial gives, is refused."""
    with pytest.raises(Misaligned, match=reason):
        profile_step(lambda b, r: Toy(b, r, habit), tiny.target("t4"))


def test_a_step_whose_norms_need_more_chunks_at_a_higher_rank_is_profiled() -> None:
    """The table of chunks grows in steps, which an odd number of tensors, as DoRA has them, would not divide."""
    wide = {**tiny.LLAMA, "intermediate_size": 5000}
    session = Session(ModelSpec(name="wide", config=wide), load_gpu("t4"), adapter="dora")
    strategy = Strategy(weight_format="fp16", activations="save")

    (_, low), (_, high) = CORNERS[0], CORNERS[-1]
    assert -(-low * 5000 // NORM_CHUNK) < -(-high * 5000 // NORM_CHUNK)
    assert session.profile(strategy, 64).gradients.sum() > 0


def test_every_segment_of_a_step_is_profiled() -> None:
    """Each part of the step, from embedding to update, has events and operators."""
    profile = tiny.profiled("llama", "t4", Strategy(weight_format="nf4", activations="recompute"))

    release = {SEGMENTS.index("release")}  # runs nothing, and lets go of nothing where the first layer saved it
    step = set(range(SEGMENTS.index("deeper")))
    assert {*profile.event_segment} | release == {*profile.op_segment} | release == step


def test_a_profile_survives_the_disk(tmp_path: Path) -> None:
    """Compressed and read back without pickle, a traced profile is the same."""
    profile = tiny.profiled("llama", "t4", Strategy(weight_format="nf4", activations="recompute"))
    np.savez_compressed(tmp_path / "profile.npz", **profile.to_arrays())  # type: ignore[arg-type]

    with np.load(tmp_path / "profile.npz", allow_pickle=False) as arrays:
        back = StepProfile.from_arrays(arrays)

    assert same(profile, back)
