"""Plans in stages from the command line: what is shown, what is proved, and what a changed plan is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shallowflow.planner.serialize import from_json
from tests.front.shell import sfplan

TWO = ("--gpu", "t4", "--sequence-length", 32, "--global-batch-size", 8, "--rank", 8, "--tokens", 5000)
STAGED = (*TWO, "--gpus", 2, "--stages", 2, "--no-packing")


@pytest.fixture(scope="module")
def staged(tiny_folder: Path) -> str:
    """A plan for the tiny model on two T4s that hold a stage each."""
    done = sfplan(tiny_folder, *STAGED, "--json")
    assert done.code == 0, done.errors
    return done.output


def test_a_plan_shows_its_stages(tiny_folder: Path, staged: str) -> None:
    """Which layers each holds, with what it takes, and what is proven of which cuts."""
    plan = from_json(staged)
    first, second = plan.configuration.stages
    last = plan.configuration.num_layers - 1

    shown = sfplan(tiny_folder, *STAGED).output

    assert first == 0 and 0 < second <= last
    assert len(plan.prediction.stages) == 2
    ends = [f"0-{second - 1}" if second > 1 else "0", f"{second}-{last}" if second < last else f"{last}"]
    assert f"1: layers {ends[0]} after the embedding, " in shown
    assert f"2: layers {ends[1]}, norm and head, " in shown
    assert "accumulated x 1 replica in 2 stages = 8 sequences" in shown
    assert "of all cuts into 2 stages" in " ".join(shown.split())


def test_what_was_found_once_is_found_again(tiny_folder: Path, staged: str) -> None:
    """The same plan to the last byte, from what is remembered of the first search."""
    assert sfplan(tiny_folder, *STAGED, "--json").output == staged


def test_the_proof_of_a_plan_in_stages_holds(staged: str, tmp_path: Path) -> None:
    """By the plan's own tables."""
    file = tmp_path / "plan.json"
    file.write_text(staged, encoding="utf-8")

    done = sfplan("verify", file)

    assert done.code == 0, done.errors
    assert done.output.startswith(f"The proof holds: {from_json(staged).proof.status}")


def edits() -> list[Callable[[Any], None]]:
    """Ways to make a plan in stages say more than it shows."""

    def better(plan: Any) -> None:
        plan["proof"]["score_picoseconds"] //= 2

    def fewer(plan: Any) -> None:
        del plan["proof"]["staged"][0]

    def hurried(plan: Any) -> None:
        plan["prediction"]["step_seconds"] /= 2

    def lighter(plan: Any) -> None:
        for table in plan["proof"]["tables"]:
            for group in table:
                for row in group["choices"]:
                    row[7:9] = [3 * row[7], 3 * row[8]]  # the device's time, and the host's, which is the longer one

    def elsewhere(plan: Any) -> None:
        plan["configuration"]["stages"] = [0, 3 - plan["configuration"]["stages"][1]]

    return [better, fewer, hurried, lighter, elsewhere]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_a_plan_in_stages_that_says_more_is_doubted(edit: Callable[[Any], None], staged: str, tmp_path: Path) -> None:
    """One line for each doubt, and exit code 1."""
    plan = json.loads(staged)
    edit(plan)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")

    assert sfplan("verify", file).code == 1


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([0, 0], "stages begin with layers [0, 0]"),
        ([1, 2], "stages begin with layers [1, 2]"),
        ([0, 99], "stages begin with layers [0, 99]"),
        ([0, 1, 2], "3 stages, which 2 GPUs cannot share"),
        ([0], "prediction.stages tells of 2 stages, the configuration has 1"),
    ],
)
def test_stages_that_are_none_are_told(stages: list[int], told: str, staged: str, tmp_path: Path) -> None:
    """A plan file whose stages make no sense is none."""
    plan = json.loads(staged)
    plan["configuration"]["stages"] = stages
    if len(stages) == 1:
        plan["configuration"]["gradient_accumulation_steps"] //= 2  # so that the batch is the same
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")

    done = sfplan("verify", file)

    assert done.code == 2
    assert told in done.error()


def test_a_deadline_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Where the best ends in time it is the plan, whose proof speaks of the limit and is doubted with another."""
    file = tmp_path / "plan.json"

    done = sfplan(tiny_folder, *STAGED, "--deadline-hours", 1, "--max-weight-error", 0.05, "--output", file)

    assert done.code == 0, done.errors
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["proof"]["step_picoseconds"] > 0 and plan["proof"]["harm"] > 0
    assert sfplan("verify", file).code == 0
    plan["proof"]["step_picoseconds"] = 1
    file.write_text(json.dumps(plan), encoding="utf-8")
    assert "the plan's step is" in sfplan("verify", file).errors


@pytest.mark.parametrize(
    ("limit", "reason", "option"),
    [
        (
            ("--deadline-hours", 0.001),
            "no plan ends within 3.6 s: the best without that limit takes",
            "--deadline-hours",
        ),
        (("--budget-usd", 0.0001), "no plan ends within", "--budget-usd"),
        (
            ("--max-weight-error", 0.05, "--quantization", "nf4"),
            "no plan keeps the weight error within 0.05: the finest that fits has 0.0910",
            "--max-weight-error",
        ),
    ],
)
def test_a_limit_that_no_stages_keep_comes_with_one_that_some_do(
    limit: tuple[Any, ...], reason: str, option: str, tiny_folder: Path
) -> None:
    """Exit code 1, and a limit with which a plan is then found."""
    done = sfplan(tiny_folder, *STAGED, *limit)

    assert done.code == 1
    assert reason in done.errors
    (found,) = re.findall(rf"{option} ([0-9.]+)", done.errors)
    others = limit[2:]
    assert sfplan(tiny_folder, *STAGED, *others, option, found).code == 0
