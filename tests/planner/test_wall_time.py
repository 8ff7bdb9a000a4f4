"""Hours on the wall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.wall_time import DISK_BYTES_PER_SECOND, START_SECONDS, wall_time

seconds = st.floats(0, 1e6)


@given(st.integers(1, 10**11), st.integers(1, 10**10), seconds, seconds, st.integers(0, 10**10), st.floats(1e7, 1e10))
def test_a_run_takes_its_parts(
    num_parameters: int, total_tokens: int, training: float, evaluation: float, saved_bytes: int, disk: float
) -> None:
    """All parts count once; reading 16-bit weights goes through the disk and then the link."""
    found = wall_time(
        num_parameters=num_parameters,
        total_tokens=total_tokens,
        training_seconds=training,
        evaluation_seconds=evaluation,
        saved_bytes=saved_bytes,
        checkpoint_bytes=0,
        host_to_device_bytes_per_second=1e10,
        disk_bytes_per_second=disk,
    )

    assert found.load_seconds == pytest.approx(2 * num_parameters * (1 / disk + 1e-10))
    parts = (found.load_seconds, found.tokenize_seconds, training, evaluation, saved_bytes / disk)
    assert found.total_seconds == pytest.approx(START_SECONDS + sum(parts))


def test_an_8b_model_loads_in_minutes_from_a_usual_disk() -> None:
    """16 GB at 131 MB/s: two minutes."""
    found = wall_time(
        num_parameters=8_000_000_000,
        total_tokens=1,
        training_seconds=0,
        evaluation_seconds=0,
        saved_bytes=0,
        checkpoint_bytes=0,
        host_to_device_bytes_per_second=6.7e9,
    )

    assert 120 < found.load_seconds < 130


@pytest.mark.parametrize(("writing", "expected"), [(1.0, 12), (30.0, 12), (60.0, 6), (7200.0, 1)])
def test_checkpoints_are_at_least_ten_minutes_apart(writing: float, expected: int) -> None:
    """Of two hours' training, the last when it ends; those that take long to write come less often."""
    found = wall_time(
        num_parameters=1,
        total_tokens=1,
        training_seconds=2 * 3600 - 1,
        evaluation_seconds=0,
        saved_bytes=0,
        checkpoint_bytes=int(writing * DISK_BYTES_PER_SECOND),
        host_to_device_bytes_per_second=6.7e9,
    )

    assert found.save_seconds == pytest.approx(expected * writing)
