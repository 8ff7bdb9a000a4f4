"""A step's time, taken apart, is the step's time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import breakdown, latency
from shallowflow.planner.costs import LayerRuns, StepProfile
from shallowflow.profiles import GpuSpec, load_gpu
from tests.profile_strategies import step_profiles

T4 = load_gpu("t4")
GPUS = st.sampled_from([T4, load_gpu("cpu"), replace(T4, kernel_launch_seconds=0.01)])


def of(first: StepProfile, second: StepProfile) -> LayerRuns:
    """Five layers of two kinds."""
    return [(first, 3), (second, 2)]


@given(step_profiles(), step_profiles(), GPUS, st.integers(1, 8), st.integers(1, 64), st.integers(1, 4))
def test_kinds_sum_to_the_device_and_the_longer_side_to_the_step(
    first: StepProfile, second: StepProfile, gpu: GpuSpec, micro_batch_size: int, rank: int, accumulation: int
) -> None:
    """Each kind with a share of the roofline between nothing and all; the bound is the side that takes longer."""
    runs = of(first, second)

    found = breakdown.step_time(runs, micro_batch_size, rank, gpu, accumulation)

    step = latency.step_seconds(runs, micro_batch_size, rank, gpu)
    assert sum(part.seconds for part in found.kinds) == pytest.approx(found.device_seconds, abs=1e-12)
    assert all(0 <= part.roofline_share <= 1 for part in found.kinds)
    assert [part.seconds for part in found.kinds] == sorted((p.seconds for p in found.kinds), reverse=True)
    whole = step.step(accumulation)
    assert max(found.device_seconds, found.host_seconds) <= whole * (1 + 1e-9) + 1e-12
    if found.update_seconds == 0:
        assert max(found.device_seconds, found.host_seconds) == pytest.approx(whole)
    assert [(layer.first, layer.last) for layer in found.layers] == [(0, 2), (3, 4)]


@given(step_profiles(), GPUS, st.integers(1, 8))
def test_a_forward_pass_is_a_part_of_the_micro_batch(profile: StepProfile, gpu: GpuSpec, micro_batch_size: int) -> None:
    """Never longer than forward and backward together, and longer with more layers."""
    few, many = [(profile, 3)], [(profile, 7)]

    forward = breakdown.forward_seconds(few, micro_batch_size, 8, gpu)

    assert 0 <= forward <= latency.step_seconds(few, micro_batch_size, 8, gpu).micro_batch_seconds * (1 + 1e-9)
    assert forward <= breakdown.forward_seconds(many, micro_batch_size, 8, gpu)
