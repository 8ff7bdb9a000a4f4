"""The loss scale that fp16 gradients need, and what it skipped."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    value: float
    dynamic: bool
    num_skipped: int = 0
    num_calm: int = 0

    @classmethod
    def for_dtype(cls, compute_dtype: str) -> LossScale:
        """The scale to start with: fp16 needs one, bf16 and fp32 do not."""
        if compute_dtype == "float16":
            return cls(INITIAL_FP16_SCALE, dynamic=True)
        return cls(1.0, dynamic=False)

    def update(self, *, overflowed: bool) -> None:
        """Learn from one update."""
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
