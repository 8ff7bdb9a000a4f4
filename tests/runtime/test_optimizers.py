"""An optimizer does what its library's does, without waiting, and its state survives being saved."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from shallowflow.planner.strategies import Optimizer
from shallowflow.runtime import optimizers

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SIZES = ((64, 100), (7, 3))
"""Of a parameter whose state is kept in 8 bits, where the optimizer has them, and of one that is too small."""


def parameters() -> list[torch.nn.Parameter]:
    """Always the same."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in SIZES]


def take_steps(optimizer: torch.optim.Optimizer, learned: list[torch.nn.Parameter], first: int, last: int) -> None:
    """Updates with a gradient for each step."""
    for step in range(first, last):
        torch.manual_seed(step)
        for parameter in learned:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on(name: Optimizer, tmp_path: Path) -> None:
    """Three steps, the state to a file and back, and three more are six, to the last bit."""
    whole, cut = parameters(), parameters()
    take_steps(optimizers.make(name, whole, 0.01), whole, 0, 6)
    first = optimizers.make(name, cut, 0.01)
    take_steps(first, cut, 0, 3)
    save_file(optimizers.state(first), tmp_path / "state.safetensors")

    second = optimizers.make(name, cut, 0.01)
    optimizers.restore(second, load_file(tmp_path / "state.safetensors"))
    take_steps(second, cut, 3, 6)

    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizers_state_is_brought_over(name: Optimizer) -> None:
    """Going on with the other optimizer moves the parameters as going on with the same, but for 8 bits' rounding."""
    (other,) = set(OPTIMIZERS) - {name}
    moved = []
    for following in OPTIMIZERS:
        learned = parameters()
        first = optimizers.make(other, learned, 0.01)
        take_steps(first, learned, 0, 5)
        before = [parameter.detach().clone() for parameter in learned]
        second = optimizers.make(following, learned, 0.01)
        optimizers.restore(second, optimizers.state(first))
        take_steps(second, learned, 5, 6)
        moved.append([(p - b).detach() for p, b in zip(learned, before, strict=True)])

    (large, small), (expected, exact) = moved
    assert torch.allclose(small, exact, rtol=1e-4, atol=1e-8)
    assert float((large - expected).norm() / expected.norm()) < 0.1


def test_the_state_of_other_parameters_is_refused() -> None:
    """A state of more parameters than there are says so."""
    learned = parameters()
    saved = optimizers.make("adamw", learned, 0.01)
    take_steps(saved, learned, 0, 1)

    with pytest.raises(ValueError, match="more than 1 parameters"):
        optimizers.restore(optimizers.make("adamw", learned[:1], 0.01), optimizers.state(saved))


def test_8_bits_are_bitsandbytes_own_but_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update is bitsandbytes', which itself waits for the device after every parameter."""
    waits: list[torch.Tensor] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    ours, theirs = parameters(), parameters()

    take_steps(optimizers.make("adamw8bit", ours, 0.01), ours, 0, 4)
    assert not waits
    take_steps(bnb.optim.AdamW8bit(theirs, lr=0.01, weight_decay=0.0), theirs, 0, 4)

    assert len(waits) == 4 * len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_8_bits_are_kept_where_they_save() -> None:
    """The large parameter's state takes a quarter and its scales, the small one's stays in fp32."""
    learned = parameters()
    made = optimizers.make("adamw8bit", learned, 0.01)
    take_steps(made, learned, 0, 1)

    kept = optimizers.state(made)

    assert {name: kept[name].dtype for name in ("0.state1", "1.state1")} == {
        "0.state1": torch.uint8,
        "1.state1": torch.float32,
    }
    assert kept["0.absmax1"].numel() == 6400 // 256
