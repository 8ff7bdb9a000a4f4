"""What GPUs say to each other: laws of rings, pipelines and overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import communication
from shallowflow.planner.communication import Link

links = st.builds(Link, bytes_per_second=st.floats(1e6, 1e12), latency_seconds=st.floats(0, 1e-3))
sizes = st.integers(0, 10**12)
gpus = st.integers(1, 512)
stages = st.lists(st.floats(1e-3, 10), min_size=1, max_size=8)


@given(sizes, links)
def test_one_gpu_waits_for_nobody(num_bytes: int, link: Link) -> None:
    """Alone there is nothing to say."""
    assert communication.all_reduce_seconds(num_bytes, 1, link) == 0


@given(sizes, gpus, links)
def test_a_ring_sends_every_share_but_its_own_twice(num_bytes: int, num_gpus: int, link: Link) -> None:
    """Reduce-scatter and all-gather are n - 1 rounds each, of one n-th of the data and one latency; nothing is free."""
    one_round = num_bytes / num_gpus / link.bytes_per_second + link.latency_seconds if num_bytes else 0.0

    found = communication.all_reduce_seconds(num_bytes, num_gpus, link)

    assert found == pytest.approx(2 * (num_gpus - 1) * one_round, rel=1e-9, abs=1e-12)
    halves = (communication.reduce_scatter_seconds, communication.all_gather_seconds)
    assert found == pytest.approx(sum(half(num_bytes, num_gpus, link) for half in halves))


@given(st.integers(1, 10**12), gpus, st.floats(1e6, 1e12))
def test_more_gpus_wait_longer_and_never_twice_the_data(num_bytes: int, num_gpus: int, rate: float) -> None:
    """Without latency, time grows with the ring towards twice what the data alone would take."""
    link = Link(bytes_per_second=rate, latency_seconds=0)
    small, large = (communication.all_reduce_seconds(num_bytes, count, link) for count in (num_gpus, num_gpus + 1))

    assert small < large < 2 * num_bytes / rate


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1))
def test_overlap_hides_what_it_can(computing: float, communicating: float, share: float) -> None:
    """Never less than either side, never more than both in turn."""
    found = communication.overlapped_seconds(computing, communicating, share)

    assert max(computing, communicating) <= found + 1e-9
    assert found <= computing + communicating


def one_after_the_other(times: list[float], num_micro_batches: int) -> float:
    """A pipeline played: a micro-batch enters a stage when it left the one before, and the one before it left."""
    free = [0.0] * len(times)
    for _ in range(num_micro_batches):
        left = 0.0
        for stage, busy in enumerate(times):
            left = free[stage] = max(left, free[stage]) + busy
    return free[-1]


@given(stages, st.integers(1, 32))
def test_a_pipeline_takes_what_playing_it_takes(times: list[float], num_micro_batches: int) -> None:
    """The slowest stage's work and every other stage once."""
    found = communication.pipeline_seconds(times, num_micro_batches)

    assert found == pytest.approx(one_after_the_other(times, num_micro_batches))


@given(st.floats(0.01, 1), st.integers(1, 16), st.integers(1, 64), st.integers(1, 4))
def test_the_bubble_is_what_equal_stages_wait(seconds: float, count: int, num_micro_batches: int, chunks: int) -> None:
    """Its share of the step, with interleaving, too."""
    step = communication.pipeline_seconds([seconds] * count, num_micro_batches, interleaved=chunks)

    waiting = 1 - num_micro_batches * seconds / step

    assert communication.bubble_share(count, num_micro_batches, chunks) == pytest.approx(waiting, abs=1e-9)


def test_sending_counts_once_per_hop_and_direction() -> None:
    """Three stages have two hops, forward and back."""
    without = communication.pipeline_seconds([1.0, 1.0, 1.0], 4)

    assert communication.pipeline_seconds([1.0, 1.0, 1.0], 4, sending=0.25) == without + 4 * 0.25


@given(st.floats(0, 10), sizes, links)
def test_offloading_hides_behind_computing(computing: float, num_bytes: int, link: Link) -> None:
    """It takes the longer of both, and the window of bytes that cost nothing is rate times time."""
    found = communication.offload_seconds(computing, num_bytes, link)

    assert found == max(computing, num_bytes / link.bytes_per_second)


def test_links_have_the_rates_of_their_facts() -> None:
    """PCIe in bytes, networks in bits."""
    assert communication.pcie(6.7e9).bytes_per_second == 6.7e9
    assert communication.network(8e9).bytes_per_second == 1e9
    assert communication.network(8e9).latency_seconds > communication.pcie(1).latency_seconds
