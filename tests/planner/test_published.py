"""The errors that are published, ours and other tools', are what the code gives of the recorded steps."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import accuracy, comparison, recorded, rivals
from tests.front.tree import ROOT

PAGE, ACCURACY, README = "docs/comparison.md", "docs/accuracy.md", "README.md"
FILES = (recorded.RECORDS, recorded.HELD_OUT)


def text(name: str) -> str:
    """A document, as it stands."""
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_step_was_predicted(path: Path) -> None:
    """In every quantity of bytes that was measured; how right the predictions still are, test_accuracy asks."""
    for run in recorded.runs(path):
        kept = comparison.load()[path.stem][run["id"]]
        assert set(kept) == set(accuracy.measured(run)) & set(comparison.QUANTITIES)


def test_the_tools_tables_are_what_the_code_gives() -> None:
    """Other tools', and other trainers', on the page of their own."""
    assert comparison.tools_table() in text(PAGE)
    assert comparison.trainers_table() in text(PAGE)


@pytest.mark.parametrize("name", [ACCURACY, README])
def test_the_errors_are_what_the_code_gives(name: str) -> None:
    """Those of bytes; seconds are by another program."""
    assert comparison.errors_table() in text(name)


@pytest.mark.parametrize("name", [ACCURACY, README])
def test_the_later_sessions_errors_are_what_the_code_gives(name: str) -> None:
    """Of the steps to which nothing was fitted."""
    steps = comparison.steps(recorded.HELD_OUT)

    def sizes(quantity: str) -> list[float]:
        return [abs(step.error(quantity)) for step in steps]

    allocated, reserved = sizes("allocated"), sizes("reserved")
    said = " ".join(text(name).split())
    assert (
        f"peak allocated to {statistics.median(allocated):.2%} (worst {max(allocated):.2%})".replace("%", " %") in said
    )
    assert f"reserved to {statistics.median(reserved):.1%} ({max(reserved):.1%}".replace("%", " %") in said


def test_the_versions_are_those_that_are_asked() -> None:
    """The page names, of every other tool that is installed, the version that `make setup` installs."""
    pinned = dict(line.split("==") for line in text("constraints.txt").splitlines() if "==" in line)
    named = dict(re.findall(r"([a-z][a-z-]+)\W* (\d+\.\d+\.\d+)", text(PAGE)))

    assert {"fitcheck-llm", "accelerate", "transformers", "trl"} <= set(named)
    assert {name: pinned[name] for name in named if name in pinned} == {n: v for n, v in named.items() if n in pinned}


def test_every_tool_is_shown() -> None:
    """None that is asked is left out of the page."""
    assert set(comparison.TOOLS) == set(rivals.NAMES)


@given(st.lists(st.floats(min_value=-1, max_value=20), min_size=1))
def test_no_worst_error_is_shown_below_its_median(errors: list[float]) -> None:
    """And both have the same number of decimals."""
    median, worst = accuracy.summary(errors).replace(" %", "").split(", ")

    assert float(median) <= float(worst)
    assert _decimals(median) == _decimals(worst) <= 3


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ((0.000012, 0.00004), "0.003 %, 0.004 %"),
        ((0.0, 0.0, 0.00003), "0.000 %, 0.003 %"),
        ((0.004, 0.004, -0.119), "0.40 %, 11.90 %"),
        ((-0.064, 0.02, 0.379), "6.4 %, 37.9 %"),
        ((0.7, 0.7, 2.858), "70 %, 286 %"),
        ((), ""),
    ],
)
def test_two_digits_of_the_smaller_are_shown(errors: Iterable[float], shown: str) -> None:
    """As far as three decimals show them."""
    assert accuracy.summary(errors) == shown
