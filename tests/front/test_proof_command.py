"""Proofs from the command line, decisions that are pinned, and limits beyond memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shallowflow.planner.serialize import from_json
from tests.front.schemas import held
from tests.front.shell import Done, sfplan

T4 = ("--gpu", "t4", "--sequence-length", 32, "--global-batch-size", 4, "--rank", 8, "--tokens", 5000)


@pytest.fixture(scope="module")
def proven(tiny_folder: Path) -> str:
    """A plan for the tiny model on a T4 of which most stays free, so that memory binds."""
    done = sfplan(tiny_folder, *T4, "--max-process-gib", 0.16, "--json")
    assert done.code == 0, done.errors
    return done.output


def verdict(tmp_path: Path, content: object) -> tuple[Done, dict[str, Any]]:
    """What ``sfplan verify`` says of *content*."""
    file = tmp_path / "plan.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    said = sfplan("verify", file)
    as_json = sfplan("verify", file, "--json")
    assert said.code == as_json.code
    return said, json.loads(as_json.output) if as_json.output else {}


def test_a_plans_proof_holds(proven: str, tmp_path: Path) -> None:
    """The verdict is in words and in JSON, and of a plan that is optimal or near it."""
    said, facts = verdict(tmp_path, proven)

    assert said.code == 0 and said.errors == ""
    proof = from_json(proven).proof
    assert said.output.startswith(f"The proof holds: {proof.status}")
    assert facts == {"holds": True, "status": proof.status, "gap": proof.gap, "doubts": []}
    assert proof.status in ("optimal", "within") and proof.gap < 0.01


def edits() -> list[Callable[[Any], None]]:
    """Ways to make a plan say more than it shows."""

    def better(plan: Any) -> None:
        plan["proof"]["score_picoseconds"] //= 2

    def fewer(plan: Any) -> None:
        del plan["proof"]["cells"][0]

    def hurried(plan: Any) -> None:
        plan["prediction"]["step_seconds"] /= 2

    def busier(plan: Any) -> None:
        plan["prediction"]["tokens_per_second"] *= 2

    def worse(plan: Any) -> None:
        plan["configuration"]["layers"] = [
            {
                "first": 0,
                "last": plan["configuration"]["layers"][-1]["last"],
                "strategy": {"weight_format": "nf4", "activations": "offload", "double_quantization": True},
            }
        ]

    def roomier(plan: Any) -> None:
        plan["proof"]["budget_bytes"] += 2**30

    def cheaper(plan: Any) -> None:
        for cell in plan["proof"]["cells"]:
            cell["nodes"] = [[2, 0]]

    def faster(plan: Any) -> None:
        for table in plan["proof"]["tables"]:
            for group in table:
                group["choices"] = [[*row[:7], row[7] // 2, row[8] // 2, *row[9:]] for row in group["choices"]]

    return [better, fewer, worse, roomier, cheaper, faster, hurried, busier]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_a_plan_that_says_more_than_it_shows_is_caught(
    edit: Callable[[Any], None], proven: str, tmp_path: Path
) -> None:
    """Exit code 1, and a reason; no traceback."""
    plan = json.loads(proven)
    edit(plan)

    said, facts = verdict(tmp_path, plan)

    assert said.code == 1
    assert said.errors.startswith("The proof does not hold:\n")
    assert not facts["holds"] and facts["doubts"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fix", "speed=9"), "pins nothing; give KEY=VALUE"),
        (("--fix", "rank"), "pins nothing; give KEY=VALUE"),
        (("--fix", "rank=big"), "not a whole number"),
        (("--fix", "activations=forget"), "not one of save, recompute attention"),
        (("--fix", "micro_batch_size=3"), "do not divide the 4 sequences .* try one of 1, 2, 4"),
        (("--max-weight-error", "nan"), "'--max-weight-error': nan is no number"),
        (("--max-weight-error", "1e200"), "not in the range"),
        (("--max-weight-error", "inf"), "not in the range"),
        (("--fix", "loss_chunks=5"), "do not divide a sequence of 32 tokens"),
    ],
)
def test_a_decision_that_cannot_be_pinned_is_refused(words: tuple[str, ...], said: str, tiny_folder: Path) -> None:
    """One line, exit code 2."""
    done = sfplan(tiny_folder, *T4, *words)

    assert done.code == 2 and done.output == ""
    assert len(done.errors.splitlines()) == 1
    assert re.search(said, done.errors)


def test_what_is_pinned_is_planned(tiny_folder: Path) -> None:
    """Every decision that is given is the plan's."""
    pins = ("micro_batch_size=2", "loss_chunks=4", "activations=recompute mlp", "quantization=int8", "rank=8")

    done = sfplan(tiny_folder, *T4, *(word for pin in pins for word in ("--fix", pin)), "--json")

    assert done.code == 0, done.errors
    chosen = from_json(done.output).configuration
    assert (chosen.micro_batch_size, chosen.loss_chunks, chosen.rank) == (2, 4, 8)
    assert {(s.weight_format, s.activations) for s in chosen.strategies()} == {("int8", "recompute mlp")}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--deadline-hours", "0.0001"), "no plan ends within"),
        (("--budget-usd", "0.0001"), "no plan ends within"),
        (("--quantization", "nf4", "--max-weight-error", "0.01"), "no plan keeps the weight error within 0.01"),
        (("--max-process-gib", "0.141"), "no plan fits in 0.14 GiB"),
    ],
)
def test_a_limit_that_nothing_meets_comes_with_one_that_something_does(
    words: tuple[str, ...], reason: str, tiny_folder: Path
) -> None:
    """Exit code 1; the remedies, given instead, make a plan."""
    done = sfplan(tiny_folder, *T4, *words, "--json")

    assert done.code == 1
    assert done.errors.startswith(f"Error: {reason}")
    remedy = held("refusal", done.output)["remedies"][0]["option"].split()
    changed = sfplan(tiny_folder, *T4, *words, *remedy, "--json")
    assert changed.code == 0, changed.errors


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_runs_record_is_told_from_a_plan(tmp_path: Path, has_plan: bool) -> None:
    """By every command that reads a plan, with exit code 2, and where the plan lies if it is beside the record."""
    record, plan = tmp_path / "run.json", tmp_path / "plan.json"
    record.write_text('{"outcome": "completed", "started": "2026-01-02", "comparisons": [], "steps": []}', "utf-8")
    if has_plan:
        plan.write_text("{}", "utf-8")

    told = {
        sfplan("verify", record).error(),
        sfplan("train", record, "--data", "data.jsonl", "--output", tmp_path / "again").error(),
    }

    its = f"its plan is {plan}" if has_plan else "give the plan that it was made from"
    assert told == {f"{record} is a run's record, not a plan; {its}"}
    assert sfplan("verify", record).code == 2


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_folder_is_told_from_a_plan(tmp_path: Path, has_plan: bool) -> None:
    """With the plan that lies in it, if one does."""
    plan = tmp_path / "plan.json"
    if has_plan:
        plan.write_text("{}", "utf-8")

    done = sfplan("verify", tmp_path)

    assert done.code == 2
    its = f"its plan is {plan}" if has_plan else "give the file that `sfplan MODEL --output FILE` wrote"
    assert done.error() == f"{tmp_path} is a folder, not a plan; {its}"
