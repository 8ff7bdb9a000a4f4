"""The meter on a CPU counts exact bytes."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.runtime.meter import MeasuredPeak, Stopwatch, allocator_levels, measure_peak
from tests.runtime import tiny

KB = 1000


def allocate(num_bytes: int) -> torch.Tensor:
    """A tensor of so many bytes."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def test_the_peak_is_the_most_that_lives_at_once() -> None:
    """Of a known pattern of allocations and frees, resident and peak are the exact bytes."""
    resident = allocate(300 * KB)

    def run() -> str:
        first = allocate(1000 * KB)
        second = allocate(2000 * KB)
        del first
        third = allocate(500 * KB)
        del second, third
        return "done"

    result, peak = measure_peak(run, [resident], tiny.CPU)

    assert result == "done"
    assert peak == MeasuredPeak(resident_bytes=300 * KB, peak_allocated_bytes=3300 * KB, peak_reserved_bytes=3300 * KB)


@settings(max_examples=15, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.just("allocate"), st.integers(1, 10**6)) | st.tuples(st.just("free"), st.integers(0, 5)),
        min_size=1,
        max_size=20,
    )
)
def test_any_pattern_is_counted(turns: list[tuple[str, int]]) -> None:
    """The peak is the highest running sum of what was asked for less what was freed."""
    living: list[int] = []
    highest = 0
    for turn, number in turns:
        if turn == "allocate":
            living.append(number)
        elif living:
            del living[number % len(living)]
        highest = max(highest, sum(living))

    def run() -> None:
        held: list[torch.Tensor] = []
        for turn, number in turns:
            if turn == "allocate":
                held.append(allocate(number))
            elif held:
                del held[number % len(held)]

    _, peak = measure_peak(run, [], tiny.CPU)
    assert peak.peak_allocated_bytes == highest


def test_a_shared_storage_counts_once() -> None:
    """A tensor, its view and its transpose are resident as one storage, and an empty tensor as nothing."""
    whole = torch.zeros(10, 100)

    _, peak = measure_peak(lambda: None, [whole, whole[3:], whole.T, torch.empty(0)], tiny.CPU)

    assert peak.resident_bytes == peak.peak_allocated_bytes == 4000


def test_what_lived_before_counts_only_where_it_is_resident() -> None:
    """A block of an earlier profile, freed now, lowers no level but its own."""
    held: list[torch.Tensor] = []
    for _ in range(2):
        measure_peak(lambda: held.append(allocate(1000 * KB)), [], tiny.CPU)

    def run() -> torch.Tensor:
        held.clear()
        return allocate(700 * KB)

    _, peak = measure_peak(run, iter(held[:1]), tiny.CPU)
    measure_peak(lambda: held.append(allocate(1000 * KB)), [], tiny.CPU)
    levels = allocator_levels([run])

    assert peak.resident_bytes == 1000 * KB
    assert peak.peak_allocated_bytes == 1000 * KB
    assert levels == [[0, 700 * KB, 0]]


@pytest.mark.parametrize("fails", [False, True])
def test_standard_error_is_given_back(fails: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """What is said below Python meanwhile is not seen, and whatever happens, standard error is given back."""

    def run() -> None:
        os.write(2, b"from below")
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure_peak(run, [], tiny.CPU)
    else:
        measure_peak(run, [], tiny.CPU)
    os.write(2, b"afterwards")
    sys.stderr.write(", in Python too")

    assert capfd.readouterr().err == "afterwards, in Python too"


def test_a_stopwatch_tells_the_time_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by the clock that only rises, from the moment it was made."""
    clock = iter([100.0, 101.5, 107.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    watch = Stopwatch(tiny.CPU)

    assert [watch.seconds(), watch.seconds()] == [1.5, 7.25]
