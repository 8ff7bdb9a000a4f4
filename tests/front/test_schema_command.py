"""What commands print as JSON is what their schemas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from shallowflow.schema_command import DOCUMENTS
from tests.front.shell import SMALL, sfplan
from tests.front.tree import ROOT


def validator(document: str) -> Draft202012Validator:
    """What checks a document."""
    done = sfplan("schema", document)
    assert done.code == 0, done.errors
    found = json.loads(done.output)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


@pytest.fixture(scope="module")
def printed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each document as a command prints it."""
    folder = tmp_path_factory.mktemp("schema")
    data = folder / "data.jsonl"
    data.write_text('{"text": "the cat sat on the mat and looked at the dog"}\n' * 12, encoding="utf-8")
    plan = folder / "plan.json"
    words: dict[str, tuple[object, ...]] = {
        "plan": (tiny_folder, *SMALL, "--global-batch-size", 4, "--output", plan),
        "run": ("train", plan, "--data", data, "--weights", tiny_folder, "--steps", 1, "--output", folder / "run"),
        "memory": ("simulate", f"{ROOT / 'examples' / 'transformer_step.py'}:make_step"),
        "profile": ("profile", tiny_folder, "--sequence-length", 32),
        "frontier": ("frontier", tiny_folder, *SMALL, "--global-batch-size", 4),
        "gpus": ("gpus",),
    }
    found = {}
    for document, line in words.items():
        done = sfplan(*line, "--json")
        assert done.code == 0, done.errors
        found[document] = json.loads(done.output)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_printed_is_what_the_schema_says(document: str, printed: dict[str, Any]) -> None:
    """And nothing passes in which a field is missing."""
    check = validator(document)

    check.validate(printed[document])
    spoiled = json.loads(json.dumps(printed[document]))
    one = spoiled[0] if isinstance(spoiled, list) else spoiled
    del one[next(iter(one))]
    with pytest.raises(ValidationError):
        check.validate(spoiled)


def test_what_has_a_schema_is_listed() -> None:
    """With the commands that print it."""
    lines = sfplan("schema").output.splitlines()

    assert [line.split()[0] for line in lines] == list(DOCUMENTS)


def test_an_unknown_document_is_refused() -> None:
    """In one line that names those there are."""
    done = sfplan("schema", "plans")

    assert done.code == 2 and "'plan'" in done.error()
