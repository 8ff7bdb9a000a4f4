"""``sfplan frontier``: the same from everywhere, over memory and over sequence lengths, with its charts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import shallowflow
from shallowflow.planner.charts import LETTERS
from shallowflow.planner.plan import Workload
from shallowflow.planner.remedies import Infeasible
from tests.front.shell import sfplan

T4 = ("--gpu", "t4", "--sequence-length", 32, "--global-batch-size", 4, "--rank", 8, "--tokens", 5000)
SAVED = (*T4[:2], "--sequence-length", 64, *T4[4:], "--quantization", "fp16", "--fix", "activations=save")
ASKED: dict[str, Any] = {"global_batch_size": 4, "rank": 8, "total_tokens": 5000}
ASKED_SAVED: dict[str, Any] = {**ASKED, "quantization": "fp16", "activations": "save"}


def rows(output: str) -> list[list[str]]:
    """The table's cells, by what is told of each plan."""
    return [line.split() for line in output.splitlines() if re.match(r"[a-z]  ", line)]


def test_the_frontier_is_the_same_from_everywhere(tiny_folder: Path) -> None:
    """More memory is never slower by the same weights; JSON, words and Python say the same, every letter is drawn."""
    words = ("frontier", tiny_folder, *T4)
    as_json, said = sfplan(*words, "--json"), sfplan(*words)

    assert as_json.code == said.code == 0, as_json.errors
    points = json.loads(as_json.output)
    made = shallowflow.trade_offs(str(tiny_folder), "t4", sequence_length=32, **ASKED)
    assert [point["step_seconds"] for point in points] == [point.step_seconds for point in made]
    assert [row[0] for row in rows(said.output)] == list(LETTERS[: len(points)])
    assert said == sfplan(*words)
    assert "s/step over memory" in said.output and "s/step over dollars" in said.output
    for leaner, roomier in itertools.pairwise(made):
        assert leaner.peak_process_bytes <= roomier.peak_process_bytes


def test_other_lengths_cost_what_their_own_plans_say(tiny_folder: Path) -> None:
    """A quarter is too short for anyone; half, once and twice the length take what planning them alone gives."""
    words = ("frontier", tiny_folder, *SAVED, "--over", "sequence_length")

    as_json, said = sfplan(*words, "--json"), sfplan(*words)

    assert as_json.code == said.code == 0, as_json.errors
    made = shallowflow.trade_offs(str(tiny_folder), "t4", over="sequence_length", sequence_length=64, **ASKED_SAVED)
    found = json.loads(as_json.output)
    assert [point["configuration"]["sequence_length"] for point in found] == [64, 128]
    for point, row, same in zip(found, rows(said.output), made, strict=True):
        length = point["configuration"]["sequence_length"]
        alone = shallowflow.plan(str(tiny_folder), "t4", sequence_length=length, **ASKED_SAVED)
        assert point["step_seconds"] == same.step_seconds == alone.prediction.step_seconds
        assert point["tokens_per_second"] == alone.prediction.tokens_per_second
        assert row[1] == f"{length}" and f"{alone.prediction.tokens_per_second:,.0f}" in row
    gain = found[1]["tokens_per_second"] / found[0]["tokens_per_second"] - 1
    assert f"{gain:+.1%}" in rows(said.output)[1]


def test_documents_are_counted_anew_at_each_length(tiny_folder: Path, data: Path) -> None:
    """With data, the hours of every length are those of the windows that its documents make there."""
    words = [word for word in SAVED if word not in ("--tokens", 5000)]

    done = sfplan("frontier", tiny_folder, *words, "--data", data, "--over", "sequence_length", "--json")

    assert done.code == 0, done.errors
    for point in json.loads(done.output):
        length = point["configuration"]["sequence_length"]
        alone = sfplan(tiny_folder, *words, "--sequence-length", length, "--data", data, "--json")
        wall = json.loads(alone.output)["wall"]
        assert point["hours"] * 3600 == pytest.approx(sum(wall.values()))


def test_lengths_that_do_not_fit_are_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer sequence that fits in no way has a line and no plan; where none fits, the shortest one is refused."""
    words = ("frontier", tiny_folder, *SAVED, "--over", "sequence_length")
    monkeypatch.setattr(
        "shallowflow.tradeoffs.smallest_process_bytes", lambda _session, work: 2**60 * (work.sequence_length > 64)
    )

    done = sfplan(*words)

    assert done.code == 0, done.errors
    assert [row[1] for row in rows(done.output)] == ["64"]
    assert "No plan fits with sequences of 128 tokens." in done.output

    def refuse(_model: object, _gpu: object, work: Workload, **_rest: object) -> None:
        raise Infeasible(2**30 * work.sequence_length, 2**30, ())

    monkeypatch.setattr("shallowflow.tradeoffs.make_plan", refuse)
    refused = sfplan(*words)
    assert refused.code == 1
    assert refused.errors == "Error: no plan fits in 1.00 GiB: the smallest needs 64.00 GiB, 63.00 GiB too much.\n"


def test_what_is_no_axis_is_told(tiny_folder: Path) -> None:
    """In Python too, what plans may differ in is named."""
    with pytest.raises(shallowflow.RequestError, match="over is 'rank'; give one of memory, sequence_length"):
        shallowflow.trade_offs(str(tiny_folder), "t4", over="rank", **ASKED)


@pytest.mark.parametrize("over", ["memory", "sequence_length"])
def test_the_charts_are_written_as_one_page(over: str, tiny_folder: Path, tmp_path: Path) -> None:
    """The page is the same every time, loads nothing, and holds every chart and every row of the table."""
    words = ("frontier", tiny_folder, *SAVED, "--over", over, "--chart")

    done, again = (sfplan(*words, tmp_path / name) for name in ("one.html", "two.html"))

    assert done.code == 0, done.errors
    assert done == again
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8")
    assert not re.findall(r'src="https?:|<link[^>]*href="https?:', page)
    titles = re.findall(r'<section aria-label="([^"]*)">', page)
    assert len(titles) == 3
    assert all(title in done.output for title in titles)
    for row in rows(done.output):
        for cell in row:
            assert f">{cell}<" in page or cell in ("GiB", "x", "1", "2", "4") or f">{cell} GiB<" in page


@pytest.mark.parametrize("name", ["frontier.svg", "nowhere/frontier.html"])
def test_a_chart_that_cannot_be_written_is_told_at_once(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Exit code 2 before anything is planned."""
    done = sfplan("frontier", tiny_folder, *T4, "--chart", tmp_path / name)

    assert done.code == 2
    assert name.rpartition("/")[0] in done.error()
    assert "--chart" in done.error()


def test_more_gpus_take_what_their_own_plans_say(tiny_folder: Path) -> None:
    """Every number that divides the batch, up to a machine's, takes and costs what planning it alone says."""
    words = ("frontier", tiny_folder, *SAVED, "--over", "gpus")

    as_json, said = sfplan(*words, "--json"), sfplan(*words)

    assert as_json.code == said.code == 0, as_json.errors
    made = shallowflow.trade_offs(str(tiny_folder), "t4", over="gpus", sequence_length=64, **ASKED_SAVED)
    found = json.loads(as_json.output)
    assert [point["configuration"]["num_gpus"] for point in found] == [1, 2, 4]  # a batch of 4 on up to 8
    for point, row, same in zip(found, rows(said.output), made, strict=True):
        count = point["configuration"]["num_gpus"]
        alone = shallowflow.plan(str(tiny_folder), "t4", sequence_length=64, num_gpus=count, **ASKED_SAVED)
        assert point["step_seconds"] == same.step_seconds == alone.prediction.step_seconds
        assert point["usd"] == alone.offers[0].on_demand_usd
        assert row[1] == f"{count}"
    assert "hours over GPUs" in said.output and "$ per M tokens over GPUs" in said.output


def test_the_number_of_gpus_is_asked_for_once(tiny_folder: Path) -> None:
    """Several GPUs and a plan over their number contradict each other."""
    done = sfplan("frontier", tiny_folder, *SAVED, "--over", "gpus", "--gpus", 2)

    assert done.code == 2
    assert "2 GPUs are asked for" in done.error()
