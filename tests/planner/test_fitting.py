"""Rates fitted to timed steps: what is put in comes out, and no group predicts itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shallowflow.planner.costs import OP_KINDS
from shallowflow.planner.fitting import TimedOperators, fit, fit_gpu, left_out
from shallowflow.profiles import GpuSpec, load_gpu

NAMES = ("fp32_flops_per_second", "dram_bytes_per_second", "kernel_gap_seconds")


def steps(gpu: GpuSpec) -> list[TimedOperators]:
    """Steps of three groups that take exactly what *gpu* says, each of another mix of products and copies."""
    random = np.random.default_rng(3)
    found: list[TimedOperators] = []
    for index in range(12):
        kinds = np.array([OP_KINDS.index(kind) for kind in ("float32", "memory", "memory")] * 50)
        scale = random.uniform(0.1, 5.0, 3)
        flops = np.tile([2e6, 0, 0] * scale, 50).astype(np.int64)
        moved = np.tile([1e3, 3e5, 1e3] * scale, 50).astype(np.int64)
        made = TimedOperators(kinds, flops, moved, 1.0, f"group {index % 3}")
        found.append(replace(made, seconds=made.predicted(gpu)))
    return found


def test_rates_are_found_again() -> None:
    """From steps without noise, within what the start still draws them."""
    start = load_gpu("cpu")
    truth = replace(start, fp32_flops_per_second=1e11, dram_bytes_per_second=1e10, kernel_gap_seconds=4e-5)

    found = fit_gpu(start, NAMES, steps(truth))

    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.08), name


def test_what_no_step_tells_stays() -> None:
    """A rate that nothing depends on is left where it was."""
    start = load_gpu("cpu")

    found = fit_gpu(start, (*NAMES, "dequantized_elements_per_second"), steps(start))

    assert found.dequantized_elements_per_second == pytest.approx(start.dequantized_elements_per_second, rel=1e-6)


def test_no_group_predicts_itself() -> None:
    """A group that is twice as slow as the others does not move what is predicted of it."""
    start = load_gpu("cpu")
    honest = steps(start)
    odd = [replace(s, seconds=2 * s.seconds) if s.group == "group 1" else s for s in honest]

    predicted = left_out(start, NAMES, odd)

    for step, seconds in zip(honest, predicted, strict=True):
        if step.group == "group 1":
            assert seconds == pytest.approx(step.seconds, rel=0.02)


def test_one_outlier_does_not_carry_the_fit_away() -> None:
    """Beyond the usual error a step counts less: one that was disturbed is outvoted."""

    def seconds(rates: object, size: float) -> float:
        assert isinstance(rates, dict)
        return size / float(rates["rate"])

    timed = [(size, size / 5.0) for size in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)] + [(8.0, 8.0)]

    assert fit({"rate": 4.0}, seconds, timed)["rate"] == pytest.approx(5.0, rel=0.06)
