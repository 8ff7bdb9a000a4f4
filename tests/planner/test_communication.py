"""Data-parallel GPUs exchange gradients in a ring."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.communication import all_reduce_seconds


@given(st.integers(0, 10**12), st.floats(1e6, 1e12))
def test_one_gpu_waits_for_nobody(num_bytes: int, rate: float) -> None:
    """Alone there is nothing to say."""
    assert all_reduce_seconds(num_bytes, 1, rate) == 0


@given(st.integers(0, 10**12), st.integers(1, 512), st.floats(1e6, 1e12))
def test_a_ring_sends_every_share_but_its_own_twice(num_bytes: int, num_gpus: int, rate: float) -> None:
    """Reduce-scatter and all-gather are n - 1 rounds each, of one n-th of the data."""
    rounds = [num_bytes / num_gpus / rate for _ in range(num_gpus - 1)]

    found = all_reduce_seconds(num_bytes, num_gpus, rate)

    assert found == pytest.approx(2 * sum(rounds), rel=1e-9, abs=1e-12)


@given(st.integers(1, 10**12), st.integers(1, 512), st.floats(1e6, 1e12))
def test_more_gpus_wait_longer_and_never_twice_the_data(num_bytes: int, num_gpus: int, rate: float) -> None:
    """The time grows with the ring towards twice what the data alone would take."""
    small, large = (all_reduce_seconds(num_bytes, count, rate) for count in (num_gpus, num_gpus + 1))

    assert small < large < 2 * num_bytes / rate
