"""What a run learns from, and with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from shallowflow.planner.plan import Plan

from .batches import Window
from .guard import Guard
from .ranks import ALONE, Ranks
from .request import RunRequest
from .storage import Vault
from .watch import Watcher
from .weights import WeightsSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run learns from, and with what, whatever its configuration.

    Attributes:
        prompts: tokens of the prompts to answer.
        total: updates to make.
        ranks: the processes that share it; the first one alone writes and tells.
        guard: what may end it before its time.
        vault: its store, where it has one, in the process that writes.
    """

    plan: Plan
    request: RunRequest
    watcher: Watcher
    device: torch.device
    source: WeightsSource
    tokenizer: Any
    windows: list[Window]
    eval_windows: list[Window]
    prompts: list[list[int]]
    total: int
    ranks: Ranks = ALONE
    guard: Guard = field(default_factory=Guard)
    vault: Vault | None = None
