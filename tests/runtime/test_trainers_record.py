"""What our step came to beside other trainers on a CPU, as recorded: as fast with the whole loss, leaner in parts."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks import trainers

RECORD = trainers.load()
OTHERS = [name for name in trainers.TRAINERS if name != "shallowflow"]


def rows(*, whole: bool) -> list[dict[str, Any]]:
    """Those with the whole loss, or with it in parts."""
    return [row for row in RECORD["rows"] if (row["work"]["loss_chunks"] == 1) == whole]


def test_the_record_is_whole() -> None:
    """Every work was measured, with every trainer, as often as the benchmark says."""
    assert [trainers.Work(**row["work"]) for row in RECORD["rows"]] == list(trainers.WORKS)
    counts = {len(its["step_seconds"]) for row in RECORD["rows"] for its in row["trainers"].values()}
    assert counts == {trainers.NUM_ROUNDS}


@pytest.mark.parametrize("other", OTHERS)
def test_none_is_faster(other: str) -> None:
    """With the whole loss, by the median of paired rounds."""
    for row in rows(whole=True):
        assert statistics.median(trainers.speedups(row, other)) >= 1.0, row["work"]["name"]


@pytest.mark.parametrize("other", OTHERS)
def test_none_takes_less(other: str) -> None:
    """With the whole loss, by the allocator's peak."""
    for row in rows(whole=True):
        assert trainers.memory_ratio(row, other) <= 1.0, row["work"]["name"]


@pytest.mark.parametrize("other", OTHERS)
def test_none_is_leaner(other: str) -> None:
    """With the loss in parts, by the allocator's peak; and then it is no more than a tenth slower."""
    for row in rows(whole=False):
        assert trainers.memory_ratio(row, other) < 0.9, row["work"]["name"]
        assert statistics.median(trainers.speedups(row, other)) > 0.9, row["work"]["name"]
