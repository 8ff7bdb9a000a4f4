"""A step's time by category, in the small: predicted and measured tell of the same things."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import step_time
from benchmarks.step_time import HOST, Work
from shallowflow.planner import latency
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.user_step import steady_operators
from shallowflow.planner.strategies import WeightFormat
from shallowflow.profiles import load_gpu

TINY = Work(num_layers=1, sequence_length=16)
GPU = load_gpu("cpu")


@pytest.mark.parametrize("weight_format", ["fp32", "nf4"])
def test_both_sides_find_the_same_categories(weight_format: WeightFormat) -> None:
    """Each takes time on one side where it does on the other; dequantizing only where something is quantized."""
    work = replace(TINY, weight_format=weight_format)

    expected, (alone, found) = step_time.predicted(work, GPU), step_time.measured(work)

    assert alone > 0
    assert list(expected) == list(found) == list(step_time.CATEGORIES)
    for name in step_time.CATEGORIES:
        is_there = name != "dequantizing" or weight_format == "nf4"
        assert (expected[name] > 0, found[name] > 0) == (is_there, is_there), name


def test_predicted_categories_sum_to_the_step() -> None:
    """Nothing is counted twice or left out, and the host's part is a gap for each operator."""
    kinds, flops, num_bytes = steady_operators(step_time.make_step(TINY), Target.of(GPU))

    expected = step_time.predicted(TINY, GPU)

    assert sum(expected.values()) == pytest.approx(latency.stretch_seconds(kinds, flops, num_bytes, GPU))
    assert expected[HOST] == pytest.approx(len(kinds) * GPU.kernel_gap_seconds)


def test_a_pass_takes_documents_once() -> None:
    """Packed or not, a document is learned at most once, and packed ones need fewer micro-batches."""
    every = step_time.documents(64, 20)
    work = Work(sequence_length=64)

    apart, together = (step_time.passes(replace(work, packing=packing), every) for packing in (False, True))

    learned = [
        sum(w.num_targets for step in steps for group in step for w in group.windows) for steps in (apart, together)
    ]
    assert len(every) == 20 and max(learned) <= sum(window.num_targets for window in every)
    assert sum(map(len, together)) < sum(map(len, apart)) == 20


def test_both_tables_are_shown() -> None:
    """The gain of packing is told beside the prediction, below each step's categories."""
    shown = io.StringIO()
    console = Console(file=shown, width=100)

    console.print(step_time.breakdown_table([TINY], GPU))
    console.print(step_time.packing_table(replace(TINY, sequence_length=32), step_time.documents(32, 8), GPU))

    assert all(name in shown.getvalue() for name in (*step_time.CATEGORIES, "packed", "gain"))
