"""What a terminal of 80 columns shows of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from shallowflow.planner.serialize import from_json
from shallowflow.runtime.meter import MeasuredPeak
from shallowflow.runtime.record import EvaluationRecord, StepRecord
from shallowflow.terminal import Figures, Watcher
from tests.front.shell import SMALL, sfplan

GIB = 2**30


def step(index: int, **changes: object) -> StepRecord:
    """A step of two seconds at 36 dollars an hour."""
    entries: dict[str, object] = {
        "index": index,
        "loss": 12.345,
        "gradient_norm": 1.0,
        "loss_scale": 65536.0,
        "skipped": False,
        "num_target_tokens": 20_000,
        "seconds": 2.0,
        "usd": 0.02,
        "memory_measured": False,
        **changes,
    }
    return StepRecord(**entries)  # type: ignore[arg-type]


def test_eighty_columns_are_enough(tiny_plan: str) -> None:
    """The longest figures fit on their lines: loss, speed, memory beside its prediction, money and evaluation."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, color_system=None)
    watcher = Watcher(from_json(tiny_plan), console)
    peak = MeasuredPeak(resident_bytes=GIB, peak_allocated_bytes=13 * GIB, peak_reserved_bytes=14 * GIB)
    watcher.stage("perplexity before training", 10_000)
    watcher.evaluated(EvaluationRecord(step=99_999, loss=11.5, perplexity=98_715.77, seconds=1.0, tokens=1))
    watcher.stage("training", 100_000)
    watcher.step(step(0, skipped=True), peak)

    console.print(watcher)

    lines = output.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    shown = "\n".join(lines)
    for figure in ("12.345", "10,000 tokens/s", "13.00 GiB of 0.01 GiB predicted", "scale 65536", "98715.77", "left"):
        assert figure in shown
    assert "$0.0200 so far, $2000.0000 at the end" in shown


def test_the_end_is_reckoned_from_the_pace() -> None:
    """What is left takes the recent steps' median, and costs so much for each of its seconds."""
    figures = Figures(GIB, left=4)
    for index, seconds in enumerate((9.0, 2.0, 2.0)):
        figures.step(step(index, seconds=seconds, usd=seconds / 100), None)

    assert figures.remaining() == "2.0 s left"
    assert figures.usd == pytest.approx(0.13)
    assert figures.money() == "$0.1300 so far, $0.1500 at the end"


def test_nothing_trails_where_there_is_no_terminal(tiny_plan: str, tiny_folder: Path) -> None:
    """Lines that are piped end with what they say."""
    done = sfplan(tiny_folder, *SMALL, "--global-batch-size", 4)

    lines = done.output.splitlines()
    assert len(lines) > 20
    assert [line for line in lines if line != line.rstrip()] == []
