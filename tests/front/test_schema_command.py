"""What commands print as JSON is what their schemas say, and the schemas say it in words."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema.exceptions import ValidationError

from shallowflow.cli import cli
from shallowflow.describing import attributes, classes_of, in_json, summary
from shallowflow.planner.plan import Plan
from shallowflow.runtime.record import RunRecord
from shallowflow.schema_command import DOCUMENTS, MAY_BE_INFINITE
from tests.front.schemas import published, validator
from tests.front.shell import SMALL, sfplan
from tests.front.tree import ROOT
from tests.runtime import tiny

ON_A_T4 = ("--sequence-length", 32, "--global-batch-size", 4, "--rank", 8, "--tokens", 5000)
SAVED = ("--quantization", "fp16", "--fix", "activations=save")
ONE_WAY = (*ON_A_T4, *SAVED, "--instance", "g4dn.xlarge", "--gpus", 1)
CHECKED = {
    "adapter": "lora",
    "sequence_len": 64,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "lora_r": 4,
    "bf16": "auto",
}
HELD_ELSEWHERE = {"launch", "runs", "stop", "cost", "evaluate", "calibrate"}
"""By tests that have an AWS, a harness or a calibration."""


@pytest.fixture(scope="module")
def printed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Each document as commands print it."""
    folder = tmp_path_factory.mktemp("schema")
    data, plan, two, run = folder / "data.jsonl", folder / "plan.json", folder / "two.json", folder / "run"
    data.write_text('{"text": "the cat sat on the mat and looked at the dog"}\n' * 12, encoding="utf-8")
    config, own = folder / "axolotl.yaml", tiny.save(folder / "own")  # what is weighed changes a model's plans
    config.write_text(yaml.safe_dump({"base_model": str(tiny_folder), **CHECKED}), encoding="utf-8")
    small = (tiny_folder, *SMALL, "--global-batch-size", 4)
    on_data = ("--data", data, "--weights", tiny_folder)
    lines: list[tuple[str, tuple[object, ...]]] = [
        ("plan", (*small, "--output", plan)),
        ("refusal", (tiny_folder, *ON_A_T4, *SAVED, "--gpu", "t4", "--budget-usd", 1e-9)),
        ("refusal", ("whatif", tiny_folder, *ONE_WAY, "--budget-usd", 1e-9)),
        ("verify", ("verify", plan)),
        ("rehearsal", ("train", plan, *on_data, "--output", run, "--dry-run")),
        ("run", ("train", plan, *on_data, "--steps", 1, "--output", run)),
        ("merge", ("merge", run, "--weights", tiny_folder, "--output", folder / "merged")),
        ("plan", (*small, *SAVED, "--gpus", 2, "--output", two)),
        ("machines", ("train", two, "--data", data, "--output", run, "--nodes", 2)),
        ("memory", ("simulate", f"{ROOT / 'examples' / 'transformer_step.py'}:make_step")),
        ("profile", ("profile", tiny_folder, "--sequence-length", 32)),
        ("frontier", ("frontier", *small)),
        ("whatif", ("whatif", tiny_folder, *ONE_WAY)),
        ("whatif", ("whatif", tiny_folder, *ONE_WAY, "--interruptions", 240, "--setup-minutes", 1440)),
        ("check", ("check", config, "--gpu", "t4")),
        ("data", ("data", data)),
        ("prices", ("prices", "--region", "us-east-1")),
        ("prices", ("prices", "--reset")),
        ("weigh", ("weigh", own)),
        ("models", ("models",)),
        ("gpus", ("gpus",)),
    ]
    found: dict[str, list[Any]] = {}
    for document, line in lines:
        done = sfplan(*line, "--json")
        assert done.code == (1 if document == "refusal" else 0), (line, done.errors)
        found.setdefault(document, []).append(json.loads(done.output))
    return found


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name not in HELD_ELSEWHERE])
def test_what_is_printed_is_what_the_schema_says(document: str, printed: dict[str, list[Any]]) -> None:
    """And nothing passes in which a field is missing, or one is that nobody knows."""
    check = validator(document)

    for told in printed[document]:
        check.validate(told)
        one = told[0] if isinstance(told, list) else told
        for spoiled in (dict(list(one.items())[1:]), {**one, "unheard_of": 1}):
            with pytest.raises(ValidationError):
                check.validate([spoiled] if isinstance(told, list) else spoiled)


def test_numbers_that_are_infinite_are_null(printed: dict[str, list[Any]]) -> None:
    """As of a machine that is taken away before it is set up; the schema says which may be."""
    ways = [way for told in printed["whatif"] for way in told["outlooks"]]
    optional = {"interval_steps", "interval_seconds", "hazard_source"}

    nulls = {name for way in ways for name, value in way.items() if value is None}

    assert {"hours", "usd", "over_fastest"} <= nulls
    assert nulls <= {*MAY_BE_INFINITE["Outlook"], *MAY_BE_INFINITE["RankedOutlook"], *optional}
    (run,) = printed["run"]
    validator("run").validate({**run, "steps": [{**run["steps"][0], "gradient_norm": None}]})
    with pytest.raises(ValidationError):
        validator("run").validate({**run, "steps": [{**run["steps"][0], "seconds": None}]})


@pytest.mark.parametrize(("document", "root"), [("plan", Plan), ("run", RunRecord)])
def test_what_a_docstring_says_of_a_property_its_schema_says(document: str, root: type) -> None:
    """Every line ``name, other: text`` of an Attributes section is a description; so is each type's first line."""
    definitions = published(document)["$defs"]
    classes = classes_of([root])

    assert definitions.keys() == classes.keys()
    for name, cls in classes.items():
        lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
        assert definitions[name]["description"].startswith(in_json(lines[0]))
        for line in lines[1:]:
            entry = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.+)", line)
            for attribute in entry[1].split(", ") if entry is not None else ():
                assert entry is not None
                assert definitions[name]["properties"][attribute]["description"].startswith(in_json(entry[2]))


def test_the_properties_of_a_plan_are_described() -> None:
    """Whole sentences of several lines, and the words of JSON."""
    definitions = published("plan")["$defs"]
    of_plan, of_work = (definitions[name]["properties"] for name in ("Plan", "Workload"))

    assert of_plan["budget_bytes"]["description"] == (
        "what the allocator may reserve: the memory less context and headroom."
    )
    assert of_plan["compute_dtype"]["description"] == (
        "of matrix products, and, unless every weight learns, of activations and of weights that are not quantized."
    )
    assert "description" in of_plan["wall"] and "$ref" in of_plan["wall"]
    assert of_work["rank"]["description"].endswith("null lets the planner choose one of at least *min_rank*.")
    assert of_work["activations"]["description"] == of_work["optimizer"]["description"]


class Base:
    """A base. None.

    With more.

    Attributes:
        one, two: said of both,
            on two lines: None.
        three: said before.

    Raises:
        four: nothing.
    """


class Derived(Base):
    """Derived over
    two lines.

    Attributes:
        three: said anew.
    """


class Bare(Base):
    pass


def test_docstrings_are_read() -> None:
    """Names that share a text, continued lines, sections that end, and what a base says."""
    shared = "said of both, on two lines: None."

    assert attributes(Base) == {"one": shared, "two": shared, "three": "said before."}
    assert attributes(Derived) == {"one": shared, "two": shared, "three": "said anew."}
    assert (summary(Base), summary(Derived), summary(Bare)) == ("A base. None.", "Derived over two lines.", "")


def test_every_command_with_json_has_a_schema() -> None:
    """One that names it, and every document is held against what is printed."""
    with_json = {
        name
        for name, command in cli.commands.items()
        if any(isinstance(one, click.Option) and "--json" in one.opts for one in command.params)
    }
    named = " ".join(document.printed_by for document in DOCUMENTS.values())

    assert len(with_json) > 20
    assert with_json == set(re.findall(r"sfplan ([a-z]+)", named))


def test_what_has_a_schema_is_listed() -> None:
    """With the commands that print it."""
    lines = sfplan("schema").output.splitlines()

    assert [line.split()[0] for line in lines] == list(DOCUMENTS)
    assert all(line.split(None, 1)[1].startswith("sfplan ") for line in lines)


def test_an_unknown_document_is_refused() -> None:
    """In one line that names those there are."""
    done = sfplan("schema", "plans")

    assert done.code == 2 and "'plan'" in done.error()
