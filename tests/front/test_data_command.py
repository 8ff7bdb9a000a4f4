"""``sfplan data`` says what a file holds, in 80 columns or JSON."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from shallowflow.data_command import WIDTH, histogram
from tests.front.shell import sfplan


def test_every_command_of_the_help_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that its help shows work as they stand, and tell exact counts from estimates."""
    data.rename(data.with_name("train.jsonl"))
    monkeypatch.chdir(data.parent)
    shown = re.findall(r"^ +sfplan (data train.*)$", sfplan("data", "--help").output, re.MULTILINE)
    assert len(shown) == 3

    plain, counted, as_json = (sfplan(*shlex.split(words)) for words in shown)

    assert (plain.code, counted.code, as_json.code) == (0, 0, 0)
    assert plain.output.startswith("train.jsonl: JSONL, text\ndocuments  12\ntokens     about ")
    assert "counted by the model's tokenizer" in counted.output
    facts = json.loads(as_json.output)
    assert facts["num_documents"] == len(facts["document_tokens"]) == 12
    assert facts["num_tokens"] == sum(facts["document_tokens"]) and not facts["exact"]


@pytest.mark.parametrize("sizes", [[0], [1], [1, 2, 3], [5] * 1000, [1, 10**9], list(range(1, 5000))])
def test_the_histogram_counts_every_document(sizes: list[int]) -> None:
    """Each document is in one row, the shares end at all of them, and no line is wider than a terminal."""
    head, *rows = histogram(sizes)

    assert max(map(len, [head, *rows])) <= WIDTH
    assert sum(int(row.split()[1].replace(",", "")) for row in rows) == len(sizes)
    assert rows[-1].split()[2] == "100.0%"


def test_bad_data_is_told_in_one_line(tmp_path: Path) -> None:
    """Exit code 2, and the file's name."""
    done = sfplan("data", tmp_path / "missing.jsonl")

    assert done.code == 2
    assert str(tmp_path / "missing.jsonl") in done.error()
