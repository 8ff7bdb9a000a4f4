"""Whatever a data file holds, in whichever format, the answer is documents or one line, and nothing is written."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from shallowflow.runtime.data_files import DataError
from shallowflow.runtime.documents import read_data

NUM_FILES = 600
ROLES = ("user", "assistant", "system", "human", "gpt", "tool", "alien", "", 7, None)
ODD: tuple[Any, ...] = (
    None,
    "",
    " ",
    5,
    1e999,
    True,
    [],
    {},
    [[]],
    [None],
    "\ud800",
    "\0",
    "é" * 50,
    10**400,
    [{"role": 1}],
)


def value(maker: random.Random) -> Any:
    """Mostly text, sometimes something odd."""
    return maker.choice(ODD) if maker.random() < 0.1 else " ".join(["word"] * maker.randint(0, 5))


def turns(maker: random.Random) -> Any:
    """Mostly messages, in either spelling, of roles that may be unknown."""
    if maker.random() < 0.1:
        return maker.choice(ODD)
    who, said = maker.choice([("role", "content"), ("from", "value")])
    known = 2 if maker.random() < 0.8 else len(ROLES)
    return [{who: maker.choice(ROLES[:known]), said: value(maker)} for _ in range(maker.randint(0, 4))]


def row(maker: random.Random) -> Any:
    """A row of one of the formats, or of none."""
    rows: list[Callable[[], Any]] = [
        lambda: {"text": value(maker)},
        lambda: {"prompt": value(maker), "completion": value(maker)},
        lambda: {"prompt": turns(maker), "completion": turns(maker)},
        lambda: {"instruction": value(maker), "input": value(maker), "output": value(maker)},
        lambda: {"messages": turns(maker)},
        lambda: {"conversations": turns(maker), "system": value(maker)},
        lambda: maker.choice(ODD),
    ]
    return maker.choice(rows)()


def content(maker: random.Random, suffix: str) -> bytes:
    """A file of some rows, well formed for the most part."""
    kind = row(maker)
    rows = [kind if maker.random() < 0.5 else row(maker) for _ in range(maker.randint(0, 4))]
    if suffix == ".parquet":
        texts = [{"text": str(value(maker)).encode("utf-8", "ignore").decode()} for _ in range(3)]
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(texts), file)
        return file.getvalue()
    if suffix == ".csv":
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator=maker.choice(["\n", "\r\n"])).writerows(
            [list(kind), *([str(cell) for cell in r.values()] for r in rows if isinstance(r, dict))]
            if isinstance(kind, dict)
            else [["text"], ["a", "b"], []]
        )
        return out.getvalue().encode("utf-8", "surrogatepass")
    lines = [json.dumps(r, ensure_ascii=maker.random() < 0.7) for r in rows]
    text = "[" + ",".join(lines) + "]" if suffix == ".json" and maker.random() < 0.8 else "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def damaged(maker: random.Random, whole: bytes) -> bytes:
    """Cut short, with bytes changed, a byte order mark before, or nested without end."""
    ways: list[Callable[[], bytes]] = [
        lambda: whole,
        lambda: whole,
        lambda: whole[: maker.randint(0, len(whole))],
        lambda: b"\xef\xbb\xbf" + whole,
        lambda: whole + b"\n" + b"[" * 5000,
        lambda: whole.replace(b"e", bytes([maker.randrange(256)]), 2),
        lambda: bytes(b if maker.random() > 0.02 else maker.randrange(256) for b in whole),
    ]
    return maker.choice(ways)()


def answered(folder: Path, seed: int) -> str:
    """What reading one made-up file came to."""
    maker = random.Random(seed)
    suffix = maker.choice([".jsonl", ".json", ".csv", ".parquet", ".txt"])
    path = folder / f"data{suffix}"
    path.write_bytes(damaged(maker, content(maker, suffix)))
    data_format: Any = maker.choice([None, None, None, "text", "messages", "sharegpt", "alpaca", "prompt-completion"])
    refusal = ""
    try:
        read = read_data(path, data_format)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) == 1 and str(path) in refusal, refusal
        assert list(folder.iterdir()) == [path]
        return "refused"
    assert read.documents and len(read.documents) <= read.num_rows
    assert list(folder.iterdir()) == [path]
    path.unlink()
    return "read"


@pytest.mark.parametrize("first", range(0, NUM_FILES, 100))
def test_any_data_is_answered(tmp_path: Path, first: int) -> None:
    """A hundred files at a time: some are read, some refused, and none raises anything else."""
    results = []
    for seed in range(first, first + 100):
        results.append(answered(tmp_path, seed))
        for left in tmp_path.iterdir():
            left.unlink()

    assert {"read", "refused"} == set(results)
