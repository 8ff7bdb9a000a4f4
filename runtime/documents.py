"""Data as documents: which format its rows have, and what of them is learned; needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from . import conversations
from .conversations import Conversation, text_in
from .data_files import DataError, Row, kind_of, read_rows

__all__ = ["DataError", "Document", "Example", "read_data", "read_documents"]

CHARACTERS_PER_TOKEN = 4
"""English text under today's tokenizers, roughly; used only where no tokenizer is at hand, and said so."""

MOST_SHOWN = 40
"""Characters of a column's name."""

Format = Literal["messages", "sharegpt", "alpaca", "text", "prompt-completion"]
FORMATS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
}
"""What decides a row's format: it is the first of these whose columns the row fills, other columns or not.

All rows of a file have one format, but for text, which may stand among prompts and completions."""
BESIDE: Mapping[Format, tuple[str, ...]] = {"sharegpt": ("system",), "alpaca": ("input", "history", "system")}
"""Columns that a format's rows may have as well."""
USEFUL = {column for table in (FORMATS, BESIDE) for columns in table.values() for column in columns}
PLAIN: set[Format] = {"text", "prompt-completion"}
"""Formats that may mix: both are read as they stand, without a chat template."""

SUPPORTED = (
    "a column 'text', columns 'prompt' and 'completion' or 'instruction' and 'output', "
    "or a column 'messages' or 'conversations'"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One example of plain text: *prompt* is read, *text* is learned."""

    text: str
    prompt: str = ""


Example: TypeAlias = Document | Conversation


@dataclass(frozen=True, slots=True)
class Data:
    """What a data file comes to.

    Attributes:
        kind: of file, such as ``JSONL``.
        formats: of its rows; two only where text and prompts mix.
        documents: those with something to learn.
        num_rows: with those that have nothing.
        ignored: columns that the rows have and their format does not.
    """

    kind: str
    formats: tuple[Format, ...]
    documents: list[Example]
    num_rows: int
    ignored: tuple[str, ...] = ()


def read_documents(path: Path, data_format: Format | None = None) -> list[Example]:
    """All documents of *path*, in the format given or the one that its columns tell.

    Raises:
        DataError: the file is missing, empty, unreadable, of unknown columns, or its rows disagree.
    """
    return read_data(path, data_format).documents


def read_data(path: Path, data_format: Format | None = None) -> Data:
    """All documents of *path*, and what was found on the way.

    Raises:
        DataError: as ``read_documents``.
    """
    documents: list[Example] = []
    formats: dict[Format, None] = {}
    columns: dict[str, None] = {}
    num_rows = 0
    for row in read_rows(path, USEFUL):
        found = data_format or _format_of(row)
        first = next(iter(formats), found)
        if found != first and not {found, first} <= PLAIN:
            raise DataError(f"{row.place} is {found}, and the rows before it are {first}; give one format per file")
        formats[found] = None
        columns |= dict.fromkeys(row.columns)
        document = _document(row, found)
        num_rows += 1
        if _learns(document):
            documents.append(document)
    if not documents and not PLAIN.issuperset(formats):
        raise DataError(f"{path} holds no answer to learn; give conversations a message from the assistant")
    if not documents:
        raise DataError(f"{path} holds no text to learn; give {SUPPORTED}")
    used = {column for name in formats for column in (*FORMATS[name], *BESIDE.get(name, ()))}
    ignored = tuple(str(column)[:MOST_SHOWN] for column in columns if column not in used)
    return Data(kind_of(path), tuple(formats), documents, num_rows, ignored)


def digest(documents: Iterable[Example]) -> bytes:
    """A fingerprint of what is learned, wherever it was read."""
    found = hashlib.sha256()
    for document in documents:
        found.update(repr(document).encode())
    return found.digest()


def _format_of(row: Row) -> Format:
    """The first format whose columns are filled, or at least there."""
    filled = {name for name, value in row.columns.items() if value is not None}
    for there in (filled, set(row.columns)):
        for name, columns in FORMATS.items():
            if there.issuperset(columns):
                return name
    raise DataError(f"{row.place} has the columns {_columns(row)}; expected {SUPPORTED}")


def _document(row: Row, data_format: Format) -> Example:
    if not set(row.columns).issuperset(FORMATS[data_format]):
        wanted = " and ".join(repr(column) for column in FORMATS[data_format])
        raise DataError(f"{row.place} has the columns {_columns(row)}; expected {wanted} for {data_format}")
    if data_format == "messages":
        return conversations.conversation(row, "messages")
    if data_format == "sharegpt":
        return conversations.conversation(row, "conversations")
    if data_format == "alpaca":
        return conversations.instruction(row)
    if data_format == "text":
        return Document(text_in(row, "text"))
    if isinstance(row.columns["completion"], list):
        return conversations.prompted(row)
    return Document(text_in(row, "completion"), text_in(row, "prompt"))


def _columns(row: Row) -> str:
    return ", ".join(repr(str(column)[:MOST_SHOWN]) for column in list(row.columns)[:8]) or "none"


def _learns(document: Example) -> bool:
    if isinstance(document, Conversation):
        return any(message.learned for message in document.messages)
    return bool(document.text.strip())
