"""The frontier keeps what nothing beats, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.frontier import FrontierPoint, frontier
from shallowflow.tradeoffs import gpu_counts
from tests.planner.tiny import configuration
from tests.strategies import T4

few = st.integers(0, 4)
points = st.builds(
    lambda memory, seconds, error: FrontierPoint(
        peak_process_bytes=memory,
        step_seconds=float(seconds),
        tokens_per_second=1.0,
        hours=float(seconds),
        usd=None,
        weight_error=float(error),
        configuration=configuration("nf4", "save"),
    ),
    few,
    few,
    few,
)


def beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    """At least as good in everything, and better in something."""
    no_worse = (
        one.peak_process_bytes <= other.peak_process_bytes
        and one.step_seconds <= other.step_seconds
        and one.weight_error <= other.weight_error
    )
    return no_worse and one != other


@given(st.lists(points, max_size=12))
def test_the_frontier_is_what_nothing_beats(all_of: list[FrontierPoint]) -> None:
    """Every point left out is beaten by one that stays; none that stays is beaten; the leanest comes first."""
    kept = frontier(all_of)

    assert len(set(kept)) == len(kept)
    assert set(kept) == {one for one in all_of if not any(beats(other, one) for other in all_of)}
    assert [one.peak_process_bytes for one in kept] == sorted(one.peak_process_bytes for one in kept)


def test_gpus_share_a_batch_in_whole_micro_batches() -> None:
    """Numbers of GPUs that a fixed micro-batch leaves no whole number of are not planned."""
    assert gpu_counts(T4, 4, 4) == (1,)
    assert gpu_counts(T4, 4, 2) == gpu_counts(T4, 4)[:2]
    assert gpu_counts(T4, 4)[0] == 1
