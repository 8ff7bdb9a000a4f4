"""Training text is read whole, and what cannot be read is told in one line."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shallowflow.runtime.documents import (
    CHARACTERS_PER_TOKEN,
    SUPPORTED,
    DataError,
    Document,
    read_documents,
)
from shallowflow.runtime.lengths import document_lengths

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))
LEARNABLE = TEXT.map(lambda text: text if text.strip() else f"{text}a")
EXAMPLES = st.lists(st.builds(Document, LEARNABLE, TEXT), min_size=1, max_size=6)
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def complaint(path: Path) -> str:
    """What read_documents says of a bad file, once it is seen to be one line that names it."""
    with pytest.raises(DataError) as caught:
        read_documents(path)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    assert str(path) in message
    return message


def as_json(document: Document, *, ascii_only: bool) -> str:
    """One line of JSONL; a prompt makes it a pair."""
    row = {"prompt": document.prompt, "completion": document.text} if document.prompt else {"text": document.text}
    return json.dumps(row, ensure_ascii=ascii_only)


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """A whole CSV file as Python writes it."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue()


# What is read


@ONE_FOLDER
@given(
    documents=EXAMPLES,
    blank=st.sampled_from(["\n", "\n\n", "\n  \n", "\r\n"]),
    bom=st.booleans(),
    ascii_only=st.booleans(),
)
def test_jsonl_is_read_as_written(
    tmp_path: Path, documents: list[Document], blank: str, bom: bool, ascii_only: bool
) -> None:
    """Every document comes back, whatever characters it holds, with a byte order mark or blank lines or without."""
    content = blank.join(as_json(d, ascii_only=ascii_only) for d in documents) + blank
    path = tmp_path / "data.jsonl"
    path.write_bytes(codecs.BOM_UTF8 * bom + content.encode())

    assert read_documents(path) == documents


@ONE_FOLDER
@given(documents=EXAMPLES, bom=st.booleans())
def test_csv_is_read_as_written(tmp_path: Path, documents: list[Document], bom: bool) -> None:
    """Every document comes back, with commas, quotes, line breaks of any kind and a byte order mark."""
    content = as_csv([("prompt", "completion", "note"), *((d.prompt, d.text, "left out") for d in documents)])
    path = tmp_path / "data.csv"
    path.write_bytes(codecs.BOM_UTF8 * bom + content.encode())

    assert read_documents(path) == documents


@ONE_FOLDER
@given(text=LEARNABLE, bom=st.booleans(), suffix=st.sampled_from([".txt", ".md", ""]))
def test_any_other_file_is_one_document(tmp_path: Path, text: str, bom: bool, suffix: str) -> None:
    """Plain text is learned as it stands, line breaks included, but for the byte order mark."""
    path = tmp_path / f"book{suffix}"
    path.write_bytes(codecs.BOM_UTF8 * bom + text.encode())

    assert read_documents(path) == [Document(text.removeprefix("\ufeff") if not bom else text)]


def test_a_long_document_may_be_in_a_csv(tmp_path: Path) -> None:
    """A book in one field is no reason to refuse a file."""
    path = tmp_path / "books.csv"
    path.write_text(as_csv([["text"], ["word " * 100_000]]), encoding="utf-8")

    assert read_documents(path) == [Document("word " * 100_000)]


def test_a_row_without_text_is_left_out(tmp_path: Path) -> None:
    """What holds nothing to learn is no document, with a prompt or without."""
    rows = [{"text": " \n"}, {"prompt": "why?", "completion": ""}, {"text": "because"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    assert read_documents(path) == [Document("because")]


# What is refused


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    """What does not exist, a folder, and a name that no file can have are told apart from bad content."""
    assert "does not exist" in complaint(tmp_path / "nowhere.jsonl")
    assert "is not a file" in complaint(tmp_path)
    assert complaint(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "is empty"),
        ("a.tsv", b"text\thello\n", "is a .tsv file"),
        ("a", b'{"text": "hello"}\n', "holds JSON objects; name it .jsonl"),
        ("a.jsonl", codecs.BOM_UTF8 + b" \n\t\n", "is empty"),
        ("a.txt", "Grüße".encode("latin-1"), "is not UTF-8 text"),
        ("a.jsonl", "text".encode("utf-16"), "is not UTF-8 text"),
        ("a.parquet", b"PAR1\x15\x04\x15\xfe\xff", "cannot be read as Parquet"),
        ("a.pdf", b"%PDF", "is a .pdf file; give JSONL, JSON, CSV, Parquet or plain text"),
        ("a.csv", b"prompt,completion\nask,answer\nask\n", "line 3 has no completion"),
        ("a.jsonl", b'{"text": null}\n', "line 1 has no text"),
        ("a.txt", b"plain\0text", "is not text"),
        ("a.csv", b"text\nfo\0o\n", "is not text"),
        ("a.jsonl", b'{"text": " "}\n', f"holds no text to learn; give {SUPPORTED}"),
        ("a.csv", b"text\n", f"holds no text to learn; give {SUPPORTED}"),
        ("a.csv", b'text\n"never closed', "is not CSV"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n', "line 2 is not JSON"),
        ("a.json", b'[\n  {"text": "a"},\n  {"text": 5}\n]\n', "row 2: text is int"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "number": ' + b"1" * 5_000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[{"text": "b"}]\n', "line 2 is list, not an object with columns"),
        ("a.jsonl", b'"a"\n', "line 1 is str"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "title": 1}\n', "line 2 has the columns 'body', 'title'"),
        ("a.jsonl", b'{"prompt": "b"}\n', "line 1 has the columns 'prompt'"),
        ("a.jsonl", b"{}\n", "line 1 has the columns none"),
        ("a.csv", b"Text,label\nfoo,1\n", "line 2 has the columns 'Text', 'label'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: text is int"),
        ("a.jsonl", b'{"prompt": ["a"], "completion": "b"}\n', "line 1: prompt is list"),
        ("a.csv", b"prompt,completion\nwhy\n", "line 2 has no completion"),
        ("a.csv", b"text\nHello, world\n", "line 2"),
        ("a.jsonl", b'{"text": "half a pair: \\ud800"}\n', "line 1"),
    ],
)
def test_bad_content_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    """The message names the file, the line where there is one, and what is wrong there."""
    path = tmp_path / name
    path.write_bytes(content)

    assert told in complaint(path)


@ONE_FOLDER
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".csv", ".txt"]))
def test_any_file_is_answered(tmp_path: Path, content: bytes, suffix: str) -> None:
    """Whatever a file holds, the answer is text to learn or one line."""
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        documents = read_documents(path)
    except DataError:
        complaint(path)
        return

    assert documents and all(isinstance(d, Document) and d.text.strip() for d in documents)


# What is estimated


@given(documents=EXAMPLES, length=st.integers(2, 40))
def test_the_estimate_follows_the_characters(documents: list[Document], length: int) -> None:
    """No character is left out, each document rounds up once to tokens and once to sequences, and documents add up."""
    found = document_lengths(documents, None)
    sequences, tokens = found.num_sequences(length), found.num_tokens
    characters = sum(len(d.prompt + d.text) for d in documents)

    assert not found.exact
    assert characters <= tokens * CHARACTERS_PER_TOKEN < characters + CHARACTERS_PER_TOKEN * len(documents)
    assert tokens <= sequences * length < tokens + length * len(documents)
    assert found.documents == tuple(length for d in documents for length in document_lengths([d], None).documents)
