"""Whatever becomes of a plan file, reading, training and verifying end in an answer or in one clear line."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shallowflow.planner.serialize import PlanError, from_json
from tests.front.shell import Done, sfplan

HUGE = (2**63, 2**64, 10**30, -(10**30), 10**9, -1, 0, 1e308, -1e308, float("nan"), float("inf"))
ODD: tuple[Any, ...] = (
    "",
    "\0",
    "\x1b[31m",
    "a\nb",
    "\u202e",
    "../../etc",
    "9" * 400,
    "€",
    True,
    None,
    [],
    {},
    [[]],
    {"": {}},
)
MOST_BYTES = 64 * 2**20
"""Far above what a refusal takes, far below what a plan of such numbers would."""


def found(content: Any, turns: Sequence[float]) -> tuple[Any, Any]:
    """An entry of *content*, as what holds it and its key: a turn at each level, as deep as there are turns."""
    for turn in turns:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[int(turn * len(keys))]
        held, content = content, content[key]
        if not (isinstance(content, (dict, list)) and content):
            break
    return held, key


@st.composite
def alterations(draw: st.DrawFn) -> Callable[[Any], str | bytes]:
    """One to three edits of a plan's entries, and perhaps one of its text."""
    turns = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5)
    kinds = st.sampled_from(("drop", "put", "swap", "nest", "copy"))
    edits = draw(st.lists(st.tuples(kinds, turns, turns), min_size=1, max_size=3))
    value = draw(st.sampled_from((*HUGE, *ODD)) | st.integers(-3, 10**12) | st.text(max_size=6))
    share = draw(st.floats(0, 1, exclude_max=True))
    text_edit = draw(st.sampled_from(("none", "none", "cut", "double", "byte")))

    def alter(plan: Any) -> str | bytes:
        content = copy.deepcopy(plan)
        for kind, place, other in edits:
            _edit(content, kind, place, other, value)
        text = json.dumps(content)
        where = int(share * len(text))
        if text_edit == "cut":
            return text[:where]
        if text_edit == "double":
            return text[:-1] + ', "format_version": 3}'
        if text_edit == "byte":
            return text[:where].encode() + b"\xff" + text[where + 1 :].encode()
        return text

    return alter


def _edit(content: Any, kind: str, place: Sequence[float], other: Sequence[float], value: Any) -> None:
    if not content:
        return
    held, key = found(content, place)
    if kind == "drop":
        del held[key]
    elif kind == "put":
        held[key] = copy.deepcopy(value)
    elif kind == "nest":
        held[key] = [held[key]]
    elif kind == "copy" and isinstance(held, list):
        held.insert(0, copy.deepcopy(held[key]))
    else:
        source, name = found(content, other)
        held[key] = copy.deepcopy(source[name])


def clear(done: Done, path: Path) -> None:
    """An answer, or one printable line; nothing else."""
    if done.code == 2:
        assert done.error().isprintable(), done.errors
        return
    assert (done.code, done.errors == "") in ((0, True), (1, False)), (path, done)
    assert "Traceback" not in done.errors


@pytest.fixture(scope="module", name="content")
def _content(tiny_plan: str) -> Any:
    return json.loads(tiny_plan)


@settings(max_examples=500, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(alter=alterations())
def test_an_altered_plan_gets_an_answer_or_one_line(
    alter: Callable[[Any], str | bytes], content: Any, tmp_path: Path
) -> None:
    """Deleted, doubled, swapped, nested, huge or broken: no traceback, no hang, nothing half-written.

    Training is asked with data that is not there, which is found out after the plan is believed and before it is begun.
    """
    text = alter(content)
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    clear(sfplan("verify", path), path)

    trained = sfplan("train", path, "--data", tmp_path / "missing.txt", "--output", tmp_path / "run")
    assert trained.code == 2
    clear(trained, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10_000, "hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 10_000}, "layers"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"vocab_size": 2**62}, "vocab_size"),
        ({"intermediate_size": 10**12}, "intermediate_size"),
    ],
)
def test_a_model_beyond_any_is_refused_before_it_is_built(
    changes: dict[str, int], told: str, content: Any, tmp_path: Path
) -> None:
    """Ten thousand layers of a billion: one line, and next to no memory."""
    plan = copy.deepcopy(content)
    plan["model_config"].update(changes)
    plan["alternatives"] = []
    if "num_hidden_layers" in changes:
        run = {**plan["configuration"]["layers"][0], "first": 0, "last": changes["num_hidden_layers"] - 1}
        plan["configuration"]["layers"] = [run]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")

    tracemalloc.start()
    done = sfplan("train", path, "--data", tmp_path / "missing.txt", "--output", tmp_path / "run")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert done.code == 2
    assert done.error().isprintable()
    assert told in done.error() or "missing.txt" in done.error()
    assert most < MOST_BYTES


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation"), [(1, 10**12), (10**12, 1), (2**16 + 1, 1)], ids=["steps", "rows", "one more"]
)
def test_work_beyond_any_is_refused_at_once(
    micro_batch_size: int, accumulation: int, content: Any, tmp_path: Path
) -> None:
    """A batch whose divisors would be looked for in vain, although the plan agrees with itself about it."""
    plan = copy.deepcopy(content)
    plan["workload"]["global_batch_size"] = micro_batch_size * accumulation
    cut = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": accumulation}
    plan["configuration"].update(cut)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")

    done = sfplan("verify", path)

    assert done.code == 2
    assert "$.workload.global_batch_size" in done.error()


@pytest.mark.parametrize("amount", [0, -1, 2**62])
def test_a_proof_of_impossible_numbers_does_not_hold(amount: int, content: Any, tmp_path: Path) -> None:
    """Steps that take nothing, less than nothing, or longer than the universe: exit code 1 and why."""
    plan = copy.deepcopy(content)
    for group in (group for table in plan["proof"]["tables"] for group in table):
        group["choices"] = [[row[0], *[amount] * (len(row) - 1)] for row in group["choices"]]
    for cell in plan["proof"]["cells"]:
        cell["outside"] = [amount] * len(cell["outside"])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")

    done = sfplan("verify", path)

    assert done.code == 1
    assert done.errors.startswith("The proof does not hold:\n  ")


def test_an_entry_given_twice_counts_once(content: Any) -> None:
    """Of an entry that stands twice in a file the last counts, and is checked."""
    text = json.dumps(content)
    assert from_json(text[:-1] + ', "gpu": "cpu"}') == from_json(text)

    with pytest.raises(PlanError, match="gpu"):
        from_json(text[:-1] + ', "gpu": 5}')
