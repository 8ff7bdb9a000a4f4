"""Read training text from JSONL, CSV or plain text files; needs no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHARACTERS_PER_TOKEN = 4
"""English text under today's tokenizers, roughly; used only where no tokenizer is at hand, and said so."""

UNREADABLE = (".parquet", ".arrow", ".xlsx", ".pdf", ".docx", ".gz", ".zip")
SUPPORTED = "a column 'text', or columns 'prompt' and 'completion'"


class DataError(ValueError):
    """A data file that cannot be trained on: which file and line, what is wrong, what would work."""


@dataclass(frozen=True, slots=True)
class Document:
    """One example: *prompt* is read, *text* is learned."""

    text: str
    prompt: str = ""


def read_documents(path: Path) -> list[Document]:
    """All documents of *path*: ``.jsonl`` and ``.csv`` by line, anything else as one plain text.

    Raises:
        DataError: the file is missing, empty, not text, or of the wrong columns.
    """
    try:
        if not path.is_file():
            raise DataError(f"data file {path} does not exist" if not path.exists() else f"{path} is not a file")
        if path.suffix.lower() in UNREADABLE:
            raise DataError(f"{path} is a {path.suffix.lower()} file; give JSONL, CSV or plain text")
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give JSONL, CSV or plain text") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in content:
        raise DataError(f"{path} is not text; give JSONL, CSV or plain text")
    if not content.strip():
        raise DataError(f"{path} is empty")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    documents = [Document(content)] if reader is None else [d for d in reader(path, content) if d.text.strip()]
    if not documents:
        raise DataError(f"{path} holds no text to learn; give {SUPPORTED}")
    return documents


def estimated_sequences(documents: list[Document], sequence_length: int) -> tuple[int, int]:
    """(sequences, tokens) that *documents* come to, at CHARACTERS_PER_TOKEN."""
    lengths = estimated_lengths(documents, sequence_length)
    return len(lengths), sum(lengths)


def estimated_lengths(documents: list[Document], sequence_length: int) -> list[int]:
    """Tokens of each window of at most *sequence_length* that *documents* come to, at CHARACTERS_PER_TOKEN."""
    tokens = [-(-(len(d.prompt) + len(d.text)) // CHARACTERS_PER_TOKEN) for d in documents]
    return [min(sequence_length, count - first) for count in tokens for first in range(0, count, sequence_length)]


def _jsonl(path: Path, content: str) -> Iterator[Document]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}; give one JSON object per line") from None
        except RecursionError:
            raise DataError(f"{path} line {number} is nested too deeply; give one flat JSON object per line") from None
        except ValueError as error:  # such as a number of thousands of digits
            raise DataError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is {type(row).__name__}, not an object with {SUPPORTED}")
        yield _document(path, number, row)


def _csv(path: Path, content: str) -> Iterator[Document]:
    limit = csv.field_size_limit(len(content) + 1)
    try:
        rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        for row in rows:
            if None in row:
                raise DataError(
                    f"{path} line {rows.line_num} has more fields than the header; quote fields with commas"
                )
            yield _document(path, rows.line_num, row)
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _document(path: Path, number: int, row: Mapping[str, Any]) -> Document:
    if "text" in row:
        return Document(_text(path, number, row, "text"))
    if "prompt" in row and "completion" in row:
        return Document(_text(path, number, row, "completion"), _text(path, number, row, "prompt"))
    columns = ", ".join(repr(str(column)) for column in list(row)[:8]) or "none"
    raise DataError(f"{path} line {number} has the columns {columns}; expected {SUPPORTED}")


def _text(path: Path, number: int, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        raise DataError(f"{path} line {number} has no {column}; give one, or leave the line out")
    if not isinstance(value, str):
        raise DataError(f"{path} line {number}: {column} is {type(value).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{path} line {number}: {column} holds half a surrogate pair, which is no character")
    return value
