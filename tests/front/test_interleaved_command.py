"""Interleaved stages from the command line: what is shown, what is proved, and what a changed plan is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shallowflow.hub import find_model
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.serialize import from_json
from shallowflow.planning import make_plan
from shallowflow.profiles import load_gpu
from shallowflow.workloads import workload_of
from tests.front.shell import sfplan
from tests.runtime import tiny

TWO = ("--gpu", "t4", "--sequence-length", 32, "--global-batch-size", 8, "--rank", 8, "--tokens", 5000)
STAGED = (*TWO, "--gpus", 2, "--stages", 2, "--no-packing", "--quantization", "fp16")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of eight layers."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, "num_hidden_layers": 8}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def interleaved(eight: Path) -> str:
    """Its plan on two T4s that hold two parts each."""
    done = sfplan(eight, *STAGED, "--fix", "parts_per_stage=2", "--json")
    assert done.code == 0, done.errors
    return done.output


def verdict(tmp_path: Path, plan: Any) -> Any:
    """What verifying says."""
    file = tmp_path / "plan.json"
    file.write_text(plan if isinstance(plan, str) else json.dumps(plan), encoding="utf-8")
    return sfplan("verify", file)


def test_a_plan_shows_the_parts_of_its_stages(eight: Path, interleaved: str) -> None:
    """Which layers each holds, and what each takes."""
    plan = from_json(interleaved)

    shown = " ".join(sfplan(eight, *STAGED, "--fix", "parts_per_stage=2").output.split())

    assert plan.configuration.stages == (0, 2)
    assert [plan.configuration.layers_of(stage) for stage in (0, 1)] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert "1: layers 0-1, 4-5 after the embedding, " in shown
    assert "2: layers 2-3, 6-7, norm and head, " in shown
    assert "accumulated x 1 replica in 2 stages of 2 parts, interleaved = 8 sequences" in shown
    assert "interleaved 1F1B" in shown and "That is of 2 stages of 2 equal parts each, any strategies" in shown


def test_parts_are_weighed_where_nothing_is_said(eight: Path, interleaved: str) -> None:
    """No number of parts that may be asked for scores less than what is planned without."""
    free = sfplan(eight, *STAGED, "--json")
    scores = [from_json(interleaved).proof.score_picoseconds]
    for parts in (1, 4):
        asked = sfplan(eight, *STAGED, "--fix", f"parts_per_stage={parts}", "--json")
        scores.append(from_json(asked.output).proof.score_picoseconds)

    chosen = from_json(free.output)
    assert chosen.proof.score_picoseconds <= min(scores) * 1.005
    assert any("parts" in note for note in chosen.notes if note.startswith("Compared: "))


def test_the_proof_of_interleaved_stages_holds(interleaved: str, tmp_path: Path) -> None:
    """By the plan's own tables."""
    done = verdict(tmp_path, interleaved)

    assert done.code == 0, done.errors
    assert f"{len(from_json(interleaved).proof.staged)} cells" in done.output


def edits() -> list[Callable[[Any], None]]:
    """Ways to make such a plan say more than it shows."""

    def better(plan: Any) -> None:
        plan["proof"]["score_picoseconds"] //= 2

    def more_parts(plan: Any) -> None:
        for staged in plan["proof"]["staged"]:
            staged["num_parts"] = 4

    def fewer(plan: Any) -> None:
        del plan["proof"]["staged"][0]

    def asked_otherwise(plan: Any) -> None:
        plan["workload"]["parts_per_stage"] = 4

    return [better, more_parts, fewer, asked_otherwise]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_a_plan_that_says_more_is_doubted(edit: Callable[[Any], None], interleaved: str, tmp_path: Path) -> None:
    """One line for each doubt, and exit code 1."""
    plan = json.loads(interleaved)
    edit(plan)

    assert verdict(tmp_path, plan).code == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parts_per_stage": 3}, "3 parts in each of 2 stages, which 8 layers and"),
        ({"parts_per_stage": 17}, "parts_per_stage"),
        ({"parts_per_stage": 4}, "stages begin with layers [0, 2], in parts of 1 layers"),
        ({"stages": [0, 4]}, "stages begin with layers [0, 4], in parts of 2 layers"),
    ],
)
def test_parts_that_are_none_are_told(changes: dict[str, Any], told: str, interleaved: str, tmp_path: Path) -> None:
    """A plan file whose parts make no sense is none."""
    plan = json.loads(interleaved)
    plan["configuration"].update(changes)

    done = verdict(tmp_path, plan)

    assert done.code == 2
    assert told in done.error()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--adapter", "full"), "--adapter full is not planned for models in stages"),
        (("--sharding", "weights"), "--sharding weights is not planned for models in stages"),
    ],
)
def test_parts_of_what_is_not_cut_are_refused(words: tuple[Any, ...], told: str, eight: Path) -> None:
    """As stages are."""
    done = sfplan(eight, *TWO, "--gpus", 2, "--no-packing", "--fix", "parts_per_stage=2", *words)

    assert done.code == 2
    assert told in done.error() and "try --fix parts_per_stage=1" in done.error()


def test_what_fits_in_no_parts_is_told_with_what_parts_need(eight: Path) -> None:
    """The least is that of the parts that were asked for, with which a plan is then found."""
    work = workload_of(
        {
            "sequence_length": 32,
            "global_batch_size": 8,
            "rank": 8,
            "total_tokens": 5000,
            "num_gpus": 2,
            "num_stages": 2,
            "parts_per_stage": 2,
            "packing": False,
            "quantization": "fp16",
        }
    )

    with pytest.raises(Infeasible) as refused:
        make_plan(find_model(str(eight)), load_gpu("t4"), replace(work, max_process_bytes=2**27), with_remedies=False)

    least = math.ceil(refused.value.smallest_bytes / 2**30 * 100) / 100
    assert sfplan(eight, *STAGED, "--fix", "parts_per_stage=2", "--max-process-gib", least).code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--stages", 2, "--sharding", "weights"), "leave it out, or try --stages 1"),
        (("--stages", 2, "--global-batch-size", 6, "--gpus", 4), "2 stages of"),
        (("--gpus", 1), "one GPU holds the whole model; try --gpus 2"),
    ],
)
def test_what_stands_in_the_way_of_parts_is_named(words: tuple[Any, ...], told: str, eight: Path) -> None:
    """What is proposed instead is no other thing that is refused."""
    done = sfplan(eight, *TWO, "--gpus", 2, "--no-packing", "--fix", "parts_per_stage=4", *words)

    assert done.code == 2
    assert told in done.error()


@pytest.mark.parametrize("words", [(3,), (17,), (8,)])
def test_parts_that_no_stages_can_have_are_refused(words: tuple[int], eight: Path) -> None:
    """One line that names what would do."""
    done = sfplan(eight, *STAGED, "--fix", f"parts_per_stage={words[0]}")

    assert done.code == 2
    assert f"parts_per_stage is {words[0]}" in done.error()
    assert "try one of 1, 2, 4" in done.error()
