"""Rows of data files (JSONL, JSON, CSV, Parquet, plain text) and of the Hub's datasets; each is read once."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

UNREADABLE = (".tsv", ".arrow", ".xlsx", ".pdf", ".docx", ".gz", ".zip")
GIVE = "give JSONL, JSON, CSV, Parquet or plain text"
ROWS_AT_ONCE = 1000
"""Of a Parquet file, as Python objects."""

DATASET = re.compile(r"(hf:)?(?P<name>[A-Za-z0-9][\w-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::(?P<split>[\w\[\]:%+-]+))?")
"""A dataset's name: ``org/name``, with ``hf:`` before it or not, and its split, as in ``hf:org/name:train[:90%]``."""
OLDEST_DATASETS = 4
"""The first major version of ``datasets`` that cannot run code of a dataset's own."""
REACH_SECONDS = 3.0


class DataError(ValueError):
    """Data that cannot be trained on: which file and row, what is wrong, what would work."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: where it stands, as messages say it, and what its columns hold."""

    place: str
    columns: Mapping[str, Any]


def kind_of(path: Path) -> str:
    """What *path* is read as: the name of a kind of file, or ``dataset``."""
    if _dataset_name(path):
        return "dataset"
    kinds = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
    return kinds.get(path.suffix.lower(), "plain text")


def read_rows(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    """The rows of *path*, one after another; a plain text is one row with the column ``text``.

    Args:
        path: a file, or the name of a dataset, such as ``hf:org/name``.
        wanted: the columns that are of use; of others their names may be all that is read.

    Raises:
        DataError: there is no such file, package or dataset, or it cannot be read.
    """
    name = _dataset_name(path)
    if name:
        yield from _dataset(path, name["name"], name["split"] or "train", wanted)
        return
    try:
        if not path.is_file():
            raise DataError(f"data file {path} does not exist" if not path.exists() else f"{path} is not a file")
        if path.suffix.lower() in UNREADABLE:
            raise DataError(f"{path} is a {path.suffix.lower()} file; {GIVE}")
        if kind_of(path) == "Parquet":
            yield from _parquet(path, wanted)
        else:
            readers: dict[str, Callable[[Path], Iterator[Row]]] = {"JSONL": _jsonl, "JSON": _json, "CSV": _csv}
            yield from readers.get(kind_of(path), _plain)(path)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or _first_line(error)}") from None


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a text, without the byte order mark, ended as *newline* says to ``open``."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        for line in file:
            if "\0" in line:
                raise DataError(f"{path} is not text; {GIVE}")
            yield line


def _plain(path: Path) -> Iterator[Row]:
    content = "".join(_lines(path, ""))
    if not content.strip():
        raise DataError(f"{path} is empty; give it some text")
    if _is_object(content.strip().split("\n", 1)[0]):
        raise DataError(f"{path} holds JSON objects; name it .jsonl, or it would be learned as it stands")
    yield Row(str(path), {"text": content})


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _jsonl(path: Path) -> Iterator[Row]:
    return _json_lines(path, _lines(path, "\n"))


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    empty = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield Row(place, _object(place, _parsed(place, line, "give one JSON object per line")))
            empty = False
    if empty:
        raise DataError(f"{path} is empty; give it one JSON object per line")


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object per line, whatever the name says."""
    lines = list(_lines(path, "\n"))
    if next((line for line in lines if line.strip()), "").lstrip()[:1] != "[":
        yield from _json_lines(path, iter(lines))
        return
    for number, row in enumerate(_parsed(str(path), "".join(lines), "give an array of objects"), start=1):
        place = f"{path} row {number}"
        yield Row(place, _object(place, row))


def _parsed(place: str, text: str, instead: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} (character {error.pos + 1}); {instead}") from None
    except RecursionError:
        raise DataError(f"{place} is nested too deeply; {instead}") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise DataError(f"{place} is not JSON: {_first_line(error)}") from None


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place} is {type(row).__name__}, not an object with columns")
    return row


def _csv(path: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(path.stat().st_size + 1)
    try:
        rows = csv.DictReader(_lines(path, ""), strict=True)
        if not any(name.strip() for name in rows.fieldnames or ()):
            raise DataError(f"{path} is empty; give it a header and rows")
        for row in rows:
            if None in row:
                raise DataError(
                    f"{path} line {rows.line_num} has more fields than the header; quote fields with commas"
                )
            yield Row(f"{path} line {rows.line_num}", row)
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is a Parquet file, which takes the package pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            useful = [name for name in names if name in wanted]
            if not useful:
                yield Row(f"{path} row 1", dict.fromkeys(names))
                return
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=useful):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", dict.fromkeys(names) | row)
    except Exception as error:  # its reader raises a dozen kinds
        reason = _first_line(error).removesuffix(".")
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {reason}; write it anew, or give JSONL"
        ) from error


def _dataset_name(path: Path) -> re.Match[str] | None:
    """*path* taken apart as a dataset's name, if it is one: no file, and nothing that looks like one."""
    text = str(path)
    found = DATASET.fullmatch(text)
    if found is None or (not found[1] and (path.suffix or os.path.exists(text))):
        return None
    return found


def _dataset(path: Path, name: str, split: str, wanted: Collection[str]) -> Iterator[Row]:
    if os.path.exists(name):
        raise DataError(f"{name} is a file or folder here, and {path} would be a dataset; give its file by its path")
    found = _loaded(path, name, split)
    useful = [column for column in found.column_names if column in wanted]
    if not useful:
        yield Row(f"{path} row 1", dict.fromkeys(found.column_names))
        return
    for number, row in enumerate(found.select_columns(useful), start=1):
        yield Row(f"{path} row {number}", dict.fromkeys(found.column_names) | row)


def _loaded(path: Path, name: str, split: str) -> Any:
    """The dataset, in a version of the library that runs no code of a dataset's own."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"there is no data file {path}, and a dataset of that name takes the package datasets: pip install datasets"
        ) from None
    if int(datasets.__version__.split(".")[0]) < OLDEST_DATASETS:
        raise DataError(
            f"datasets {datasets.__version__} may run a dataset's own code; "
            f"upgrade it: pip install 'datasets>={OLDEST_DATASETS}'"
        )
    if not (datasets.config.HF_HUB_OFFLINE or _reachable()):
        raise DataError(
            f"there is no data file {path}, and the Hub cannot be reached for a dataset of that name; "
            "HF_HUB_OFFLINE=1 takes one that was loaded before"
        )
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # its readers raise a dozen kinds
        raise DataError(f"dataset {path} cannot be loaded: {_first_line(error)}") from error


def _reachable() -> bool:
    """Whether the Hub answers; its own client would try for half a minute to find out."""
    from huggingface_hub.constants import ENDPOINT

    hub = urlsplit(ENDPOINT)
    port = hub.port or (443 if hub.scheme == "https" else 80)
    try:
        with socket.create_connection((hub.hostname or "", port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
