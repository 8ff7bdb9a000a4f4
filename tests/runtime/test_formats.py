"""Rows of every format come to the same documents, told apart by their columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow
import pytest
from pyarrow import parquet

from shallowflow import data_command
from shallowflow.runtime import data_files
from shallowflow.runtime.conversations import Conversation, Message
from shallowflow.runtime.data_files import DataError
from shallowflow.runtime.documents import FORMATS, Document, Format, digest, read_data, read_documents

ASKED = Conversation((Message("user", "q"), Message("assistant", "a", True)))
ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
    "alpaca": ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, ASKED),
    "text": ({"text": "t"}, Document("t")),
    "prompt-completion": ({"prompt": "p", "completion": "c"}, Document("c", "p")),
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """*rows* in a file of the kind that its name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, data_format: Format | None = None) -> str:
    """The one line that says why *path* cannot be learned."""
    with pytest.raises(DataError) as caught:
        read_documents(path, data_format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_format_has_a_name_on_the_command_line() -> None:
    """The formats that are read, those that are typed and those that can be asked for are the same."""
    assert set(get_args(Format)) == set(FORMATS) == set(data_command.FORMAT_NAMES) == set(ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_formats_are_told_apart(tmp_path: Path, name: str, suffix: str) -> None:
    """In every kind of file the columns tell the format, and naming it changes nothing."""
    row, document = ROWS[name]
    path = written(tmp_path / f"data{suffix}", [row, row])

    found = read_data(path)

    assert (found.formats, found.documents) == ((name,), [document] * 2)
    assert read_documents(path, name) == found.documents  # type: ignore[arg-type]


def test_a_format_can_be_named(tmp_path: Path) -> None:
    """A row of two formats is read as asked."""
    path = written(tmp_path / "a.jsonl", [ROWS["alpaca"][0]])

    assert read_documents(path, "text") == [Document("q a")]
    assert "expected 'messages' for messages" in refusal(path, "messages")


def test_rows_that_disagree_are_told_by_their_number(tmp_path: Path) -> None:
    """A file of two formats is refused at the first row of the second."""
    rows = [ROWS["messages"][0], ROWS["messages"][0], ROWS["alpaca"][0]]

    assert "line 3 is alpaca, and the rows before it are messages" in refusal(written(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "alien", "content": "x"}], "message 1 of messages is from 'alien'"),
        ([{"role": "user"}], "has 'role', expected 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type image_url; only text is learned"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "has tool_calls"),
        ([{"role": "assistant", "content": "x", "weight": 3}], "weight of message 1 of messages is 3"),
        ([], "holds no answer to learn"),
        ("not JSON", "is text that is no JSON list"),
        (None, "has no messages"),
    ],
)
def test_a_message_that_cannot_be_learned_is_told(tmp_path: Path, messages: Any, told: str) -> None:
    """One line with the row and the message."""
    assert told in refusal(written(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_only_completions_and_weighed_answers_are_learned(tmp_path: Path) -> None:
    """An answer in a prompt, or of weight 0, is read and not learned."""
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    asked = written(tmp_path / "a.jsonl", [{"prompt": turn, "completion": turn}])
    weighed = written(tmp_path / "b.jsonl", [{"messages": [{**turn[1], "weight": 0}, *turn]}])

    (prompted,), (first,) = read_documents(asked), read_documents(weighed)
    assert isinstance(prompted, Conversation) and isinstance(first, Conversation)
    assert [m.learned for m in prompted.messages] == [False, False, False, True]
    assert [m.learned for m in first.messages] == [False, False, True]


def test_the_digest_is_of_what_is_learned(tmp_path: Path) -> None:
    """The same documents from elsewhere have the same digest, others another."""
    same = [read_documents(written(tmp_path / f"a{suffix}", [ROWS["messages"][0]])) for suffix in (".json", ".parquet")]

    assert digest(same[0]) == digest(same[1]) != digest([Document("t")])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow or datasets the line says what to install."""
    path = written(tmp_path / "a.parquet", [{"text": "t"}])
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)

    assert refusal(path).endswith("pip install pyarrow")
    assert refusal(Path("hf:org/name")).endswith("pip install datasets")
    assert "does not exist" in refusal(Path("nowhere.jsonl"))


def test_a_dataset_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name and split reach the library, which runs no code of the dataset's; without a network that is said at once."""
    asked: list[tuple[str, str]] = []

    class Found(list[dict[str, str]]):
        column_names = ("text", "image")

        def select_columns(self, names: list[str]) -> list[dict[str, str]]:
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(name: str, split: str) -> Found:
        asked.append((name, split))
        return Found([{"text": "t", "image": "?"}])

    library = SimpleNamespace(
        __version__="4.0.0", config=SimpleNamespace(HF_HUB_OFFLINE=True), load_dataset=load_dataset
    )
    monkeypatch.setitem(sys.modules, "datasets", library)

    assert read_documents(Path("hf:org/name:train[:9%]")) == read_documents(Path("org/name")) == [Document("t")]
    assert asked == [("org/name", "train[:9%]"), ("org/name", "train")]
    library.config.HF_HUB_OFFLINE = False
    monkeypatch.setattr(data_files, "_reachable", lambda: False)
    assert "the Hub cannot be reached" in refusal(Path("hf:org/name"))
    library.__version__ = "3.6.0"
    assert "upgrade it" in refusal(Path("hf:org/name"))


def test_rounds_before_an_instruction_are_learned(tmp_path: Path) -> None:
    """Alpaca's history comes before the question, in JSON and as the text that CSV holds, and its answers count."""
    rounds = [["q1", "a1"], ["q2", ""]]
    row = {"instruction": "q3", "output": "a3", "system": "s", "history": rounds}
    learned = [("system", "s", False), ("user", "q1", False), ("assistant", "a1", True), ("user", "q2", False)]
    learned += [("assistant", "", False), ("user", "q3", False), ("assistant", "a3", True)]

    for value in (rounds, json.dumps(rounds)):
        (found,) = read_documents(written(tmp_path / "a.jsonl", [{**row, "history": value}]))

        assert isinstance(found, Conversation)
        assert [(m.role, m.content, m.learned) for m in found.messages] == learned


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ({"q": "a"}, "history is dict, expected a list of pairs"),
        ("q", "history is text that is no JSON list of pairs"),
        ([["q"]], "round 1 of history is no pair of a question and an answer"),
        ([["q", "a"], ["q", 3]], "round 2 of history is int, expected text"),
    ],
)
def test_rounds_that_cannot_be_learned_are_told(tmp_path: Path, history: Any, told: str) -> None:
    """One line with the row and the round."""
    row = {"instruction": "q", "output": "a", "history": history}
    assert told in refusal(written(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_that_say_nothing_are_told(tmp_path: Path, suffix: str) -> None:
    """What a row has beside its format's columns is listed, in every kind of file, and a column of the format never."""
    rows = [{**ROWS["alpaca"][0], "reasoning": "because"}, {**ROWS["alpaca"][0], "reasoning": None}]

    assert read_data(written(tmp_path / f"a{suffix}", rows)).ignored == ("text", "reasoning")
