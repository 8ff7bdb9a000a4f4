"""What a CPU is held to, and a cell that is quick."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shallowflow.runtime import others, trial
from shallowflow.runtime.cells import Cell


def rules(**changes: Any) -> trial.Rules:
    """A CPU's, with time enough."""
    return replace(trial.rules_for(torch.device("cpu"), 60), **changes)


def small_cell() -> Cell:
    """As small as a shipped model gets."""
    return replace(others.COMPARED_SMALL[0], num_layers=1, sequence_length=16)
