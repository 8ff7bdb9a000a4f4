"""Fit a device's rates to timed steps, and say how far off they are for steps that they were not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from shallowflow.profiles.specs import GpuSpec

from . import latency
from .costs import Ints

Step = TypeVar("Step")
Rates = Mapping[str, float]

PRIOR_WEIGHT = 0.14
"""What a rate that is off its start by a factor of e counts, beside the steps' errors."""

NOISE = 0.08
"""A step's usual error, beyond which it counts less (soft L1)."""


def fit(start: Rates, predict: Callable[[Rates, Step], float], steps: Sequence[tuple[Step, float]]) -> dict[str, float]:
    """The rates that predict the seconds of *steps* best, each drawn weakly to its value in *start*.

    Least squares over the logarithms of predicted over measured (scipy, trust region), so that rates stay positive and
    short steps count as much as long ones.

    Args:
        start: rates by name, all positive.
        predict: seconds of a step by some rates.
        steps: what ``predict`` takes, and the seconds measured.
    """
    from scipy.optimize import least_squares

    first = np.log(list(start.values()))

    def named(logarithms: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, float]:
        return dict(zip(start, np.exp(logarithms).tolist(), strict=True))

    def residuals(logarithms: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
        rates = named(logarithms)
        errors = [math.log(predict(rates, step) / seconds) for step, seconds in steps]
        return [*errors, *(PRIOR_WEIGHT * (logarithms - first))]

    return named(least_squares(residuals, first, loss="soft_l1", f_scale=NOISE).x)


@dataclass(frozen=True, slots=True, eq=False)
class TimedOperators:
    """A step's operators, as ``latency.operator_seconds`` takes them, and its measured time.

    Attributes:
        kinds, flops, num_bytes: (operators,).
        group: steps of one group are left out together.
    """

    kinds: Ints
    flops: Ints
    num_bytes: Ints
    seconds: float
    group: str

    def predicted(self, gpu: GpuSpec) -> float:
        """Seconds by the rates of *gpu*."""
        return latency.stretch_seconds(self.kinds, self.flops, self.num_bytes, gpu)


def fit_gpu(gpu: GpuSpec, names: Sequence[str], steps: Sequence[TimedOperators]) -> GpuSpec:
    """*gpu* with the rates called *names* fitted to *steps*; those that no step depends on stay as they are."""

    def predict(rates: Rates, step: TimedOperators) -> float:
        return step.predicted(_with(gpu, rates))

    return _with(gpu, fit({name: getattr(gpu, name) for name in names}, predict, [(s, s.seconds) for s in steps]))


def left_out(gpu: GpuSpec, names: Sequence[str], steps: Sequence[TimedOperators]) -> list[float]:
    """Each step's seconds, by rates fitted to the steps of the other groups."""
    fits = {group: fit_gpu(gpu, names, [s for s in steps if s.group != group]) for group in {s.group for s in steps}}
    return [step.predicted(fits[step.group]) for step in steps]


def _with(gpu: GpuSpec, rates: Rates) -> GpuSpec:
    changes: dict[str, Any] = dict(rates)
    return replace(gpu, **changes)
