"""Predictions against recorded truth: what a real T4 measured of real steps."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shallowflow.planner.problem import HEADROOM

EVERY = 7
"""One in so many recorded steps is traced here; `make accuracy` traces them all."""


@cache
def benchmark() -> Any:
    """The program behind `make accuracy`, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("shallowflow_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def rows() -> list[Any]:
    """Predicted and measured, of every model and kind of weights that was recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the program does: the recorded steps use what libraries now call old
        return list(benchmark().rows(every=EVERY))


def test_the_sample_is_spread() -> None:
    """The rows that are traced here cover every recorded model, both attentions and both weight formats."""
    runs, found = benchmark().recorded_steps(), rows()

    assert {row.model for row in found} == {run["model_id"].split("/")[-1] for run in runs}
    assert {row.attention for row in found} == {"SDPA", "eager"}
    assert {row.weights for row in found} == {"nf4", "fp16"}
    assert len(found) == -(-len(runs) // EVERY)


@pytest.mark.parametrize("attention", ["SDPA", "eager"])
def test_allocated_peaks_are_met(attention: str) -> None:
    """The median error of the allocated peak is below 0.1 %, and no error reaches 0.3 %."""
    errors = [abs(row.allocated_error) for row in rows() if row.attention == attention]

    assert statistics.median(errors) < 0.001
    assert max(errors) < 0.003


def test_unquantized_steps_are_met_to_the_mebibyte() -> None:
    """Without quantized weights, every allocated peak is within 1 MiB and every reserved one within 0.7 %."""
    plain = [row for row in rows() if row.weights == "fp16"]

    assert plain
    for row in plain:
        assert abs(row.predicted_allocated_bytes - row.measured_allocated_bytes) < 2**20
        assert abs(row.reserved_error) < 0.007


def test_reserved_peaks_are_within_a_tenth() -> None:
    """The allocator's simulator stays within 10 % of what a real one reserved, and within 2 % by the median."""
    errors = [abs(row.reserved_error) for row in rows()]

    assert max(errors) < 0.10
    assert statistics.median(errors) < 0.02


def test_reserved_peaks_miss_no_more_than_the_headroom_on_the_low_side() -> None:
    """What a plan leaves free covers what the simulator missed of the recorded peaks."""
    assert min(row.reserved_error for row in rows()) > -HEADROOM
