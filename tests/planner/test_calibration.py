"""Fitting rates to timed steps: what is put in comes out, and no step predicts itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks.calibration import MICROBENCHMARKS, TimedStep
from benchmarks.recorded import StepOperators
from shallowflow.planner.costs import OP_KINDS
from shallowflow.profiles import GpuSpec, load_gpu

KINDS = ("float16", "float32", "attention float16", "attention float32", "dequantize", "memory")


def steps(gpu: GpuSpec, second_card: float = 1.0) -> list[TimedStep]:
    """Steps of three models that take exactly what *gpu* and a second card say, each of another mix."""
    random = np.random.default_rng(5)
    found: list[TimedStep] = []
    for index in range(24):
        kinds = np.array([OP_KINDS.index(kind) for kind in (*KINDS, "float32")] * 40)
        scale = random.uniform(0.1, 4.0, len(KINDS) + 1)
        flops = (np.tile([4e10, 4e9, 3e10, 7e9, 6e7, 0, 1e5] * scale, 40)).astype(np.int64)
        moved = (np.tile([1e5, 1e5, 1e5, 1e5, 1e5, 4e8, 2e8] * scale, 40)).astype(np.int64)
        operators = StepOperators(kinds, flops, moved)
        seconds = operators.seconds(gpu) * (second_card if index % 2 else 1.0)
        found.append(TimedStep(f"model {index % 3}", "nf4", "SDPA", "1x1", bool(index % 2), seconds, operators))
    return found


def test_rates_are_found_again() -> None:
    """From steps without noise all rates come out, within the 5 % that the microbenchmarks still draw them."""
    wanted: dict[str, Any] = {name: value * 0.8 for name, value in MICROBENCHMARKS.items()}
    truth = replace(load_gpu("t4"), **wanted)

    found = calibration.fit(steps(truth, second_card=0.9))

    for name, value in wanted.items():
        assert getattr(found.gpu, name) == pytest.approx(value, rel=0.05), name
    assert found.second_card == pytest.approx(0.9, rel=0.01)


def test_where_the_host_is_never_the_bound_its_constants_come_from_elsewhere() -> None:
    """A fit says nothing of what it cannot see."""
    found = calibration.fit(steps(load_gpu("t4")))

    assert {name: getattr(found.gpu, name) for name in calibration.HOST} == calibration.HOST_ELSEWHERE


def test_no_step_predicts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model's steps are predicted by a fit that saw none of them."""
    seen: list[set[str]] = []
    t4 = load_gpu("t4")

    def note(training: list[TimedStep]) -> calibration.Fit:
        seen.append({step.model for step in training})
        return calibration.Fit(t4, 1.0)

    monkeypatch.setattr(calibration, "fit", note)

    predicted = calibration.cross_validated(steps(t4))

    assert len(predicted) == 24
    assert sorted(map(sorted, seen)) == [["model 0", "model 1"], ["model 0", "model 2"], ["model 1", "model 2"]]


def test_shipped_rates_are_those_of_a_card_between_the_two() -> None:
    """A step on it takes the geometric mean of its times on the two."""
    fit = calibration.Fit(load_gpu("t4"), 0.81)

    middle = fit.between_cards()

    for name in MICROBENCHMARKS:
        assert getattr(middle, name) == pytest.approx(getattr(fit.gpu, name) / 0.9)
