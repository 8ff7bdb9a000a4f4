"""A plan's page: it opens on the answer, and what its sliders show is what the planner says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.planner.serialize import from_json
from shallowflow.planning import make_plan
from shallowflow.profiles import ModelSpec, load_gpu
from tests.front.browser import in_a_browser, opened
from tests.front.shell import sfplan
from tests.runtime import tiny

MODEL = ModelSpec(name="tiny", config=dict(tiny.CONFIG))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A plan of the tiny model, and its page."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG), encoding="utf-8")
    plan, page = folder / "plan.json", folder / "plan.html"
    done = sfplan(
        folder / "config.json", "--gpu", "t4", "--sequence-length", 64, "--global-batch-size", 4, "--rank", 8,
        "--quantization", "fp16", "--optimizer", "adamw", "--output", plan, "--report", page,
    )  # fmt: skip
    assert done.code == 0
    return from_json(plan.read_bytes()), page


def data(page: Path) -> dict[str, Any]:
    """What the sliders read."""
    found = re.search(
        r'<script id="variants" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


def test_the_answer_comes_first(written: tuple[Plan, Path]) -> None:
    """Memory, hours and dollars stand before any chart, and nothing is fetched from elsewhere."""
    plan, page = written
    text = page.read_text(encoding="utf-8")
    head = text[: text.index("<section")]

    for answer in (
        words.gib(plan.prediction.peak_process_bytes),
        words.duration(plan.wall.total_seconds),
        words.usd(plan.offers[0].on_demand_usd),
    ):
        assert answer in head
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', text)


def test_other_sizes_are_the_planners(written: tuple[Plan, Path]) -> None:
    """A variant has the step's time that a plan with these sizes and strategies has, and its memory but for gaps."""
    plan, page = written
    chosen = plan.configuration
    (strategy,) = set(chosen.strategies())
    sizes: dict[str, Any] = {"sequence_length": 128, "micro_batch_size": 2, "rank": 16}
    variant = next(v for v in data(page)["variants"] if all(v[name] == value for name, value in sizes.items()))
    pinned = replace(
        plan.workload,
        **sizes,
        activations=strategy.activations,
        loss_chunks=chosen.loss_chunks,
        packing=chosen.packing,
    )
    other = make_plan(MODEL, load_gpu("t4"), pinned)

    assert variant["step_seconds"] == pytest.approx(other.prediction.step_seconds)
    assert variant["tokens_per_second"] == pytest.approx(other.prediction.tokens_per_second)
    composed = variant["peak_process_bytes"] - load_gpu("t4").context_bytes
    assert composed == pytest.approx(other.prediction.peak_allocated_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "said"),
    [("plan.txt", "is no page; give a name that ends in .html"), ("nowhere/plan.html", "does not exist")],
)
def test_pages_that_cannot_be(name: str, said: str, tmp_path: Path) -> None:
    """A name that is no page's, or of no folder, is refused before anything is planned."""
    done = sfplan("SmolLM2-135M", "--gpu", "t4", "--report", tmp_path / name)

    assert done.code == 2 and said in done.error()


@in_a_browser
def test_in_a_browser(written: tuple[Plan, Path], width: int, scheme: Any) -> None:
    """Charts are drawn, nothing is wider than the window, no error is told, and sliders show their variant."""
    _, page = written
    with opened(width, scheme) as shown:
        shown.goto(page.as_uri())
        shown.wait_for_selector(".main-svg")
        assert shown.locator("section .plot-container").count() == 5
        for name in ("length", "size", "rank"):
            shown.focus(f"#{name}")
            shown.keyboard.press("Home")
        first = min(data(page)["variants"], key=lambda v: (v["sequence_length"], v["micro_batch_size"], v["rank"]))
        assert shown.inner_text("#peak") == words.gib(first["peak_process_bytes"])
        assert shown.inner_text("#seconds") == words.duration(first["step_seconds"])
        assert all(shown.locator("label").nth(n).inner_text() for n in range(4))
