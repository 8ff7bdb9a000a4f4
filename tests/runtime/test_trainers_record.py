"""What our step came to beside other trainers on a CPU, as recorded: as fast with the whole loss, leaner in parts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks import trainers
from tests.front.tree import ROOT

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
    """With the loss in parts, by the allocator's peak."""
    for row in rows(whole=False):
        assert trainers.memory_ratio(row, other) < 0.9, row["work"]["name"]


def ranged(figures: Iterable[float]) -> str:
    """From the lowest to the highest, as the documentation has it."""
    low, *_, high = [f"{figure:.2f}" for figure in sorted(figures)]
    return low if low == high else f"{low} to {high}"


def test_what_is_published_was_measured() -> None:
    """Every figure in the documentation, speeds by the median of paired rounds."""
    trainer, trl = OTHERS

    def speed(other: str, *, whole: bool) -> str:
        return ranged(statistics.median(trainers.speedups(row, other)) for row in rows(whole=whole))

    def peak(other: str, *, whole: bool) -> str:
        return ranged(trainers.memory_ratio(row, other) for row in rows(whole=whole))

    said = (
        f"with the whole loss, {speed(trainer, whole=True)} times the tokens per second of Trainer and "
        f"{speed(trl, whole=True)} times TRL's, at {peak(trainer, whole=True)} and {peak(trl, whole=True)} of their "
        f"allocated peaks; with the loss in four parts, {peak(trainer, whole=False)} and {peak(trl, whole=False)} of "
        f"their peaks, at {speed(trainer, whole=False)} times Trainer's speed."
    )
    assert said in " ".join((ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").split())
