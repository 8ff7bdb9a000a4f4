"""What the tests of the front door share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.front.shell import SMALL, sfplan
from tests.runtime import tiny


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: for tiny models more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, as a user keeps one: nobody may write into it."""
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_plan(tiny_folder: Path) -> str:
    """A plan for the tiny model on this CPU, in JSON."""
    done = sfplan(tiny_folder, *SMALL, "--global-batch-size", 4, "--json")
    assert done.code == 0, done.errors
    return done.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some lines to learn."""
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"the cat number {i} sat on the mat and looked at the dog"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a model's folder with a changed config.json."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "mine"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({**tiny.CONFIG, **changes}), encoding="utf-8")
        return path

    return write
