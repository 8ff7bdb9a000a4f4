"""What products in 16 bits need: weights that learn in fp32, rounded where they multiply, and a scale for the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

INITIAL_FP16_SCALE = 1024.0
"""Low enough that the first updates run: at PyTorch's 65536 the first ones overflow and are skipped."""
GROWTH_INTERVAL = 500
MAX_SCALE = 65536.0
LEAST_SCALE = 1.0


@dataclass(slots=True)
class LossScale:
    """A number that the loss is multiplied by, halved when gradients overflow and doubled after calm.

    Attributes:
        value: the present scale; 1 where none is needed.
        dynamic: False for dtypes with the range of fp32.
        num_skipped: updates lost to overflow so far.
        num_calm: updates since the last change.
        is_helpless: whether the last update overflowed at the lowest scale there is.
    """

    value: float
    dynamic: bool
    num_skipped: int = 0
    num_calm: int = 0
    is_helpless: bool = False

    @classmethod
    def for_dtype(cls, compute_dtype: str) -> LossScale:
        """The scale to start with: fp16 needs one, bf16 and fp32 do not."""
        if compute_dtype == "float16":
            return cls(INITIAL_FP16_SCALE, dynamic=True)
        return cls(1.0, dynamic=False)

    def update(self, *, overflowed: bool) -> None:
        """Learn from one update."""
        self.is_helpless = overflowed and self.value <= LEAST_SCALE
        if overflowed:
            self.num_skipped += 1
            self.num_calm = 0
            if self.dynamic:
                self.value = max(LEAST_SCALE, self.value / 2)
            return
        self.num_calm += 1
        if self.dynamic and self.num_calm >= GROWTH_INTERVAL:
            self.value = min(MAX_SCALE, self.value * 2)
            self.num_calm = 0


def multiply_in(model: Any, dtype: torch.dtype) -> None:
    """Let *model*, whose weights are fp32, multiply in *dtype* by PyTorch's autocast, also where its decoder is called.

    Casts of weights are not kept: a pass needs each once, and what is kept would outlive a layer that is recomputed.
    """
    for module in (model, model.get_decoder()):
        module.forward = functools.partial(_casting, module.forward, dtype)


def _casting(forward: Callable[..., Any], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    with torch.autocast(device.type, dtype, cache_enabled=False):
        return forward(*args, **kwargs)
