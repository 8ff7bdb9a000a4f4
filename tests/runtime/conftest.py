"""What the tests of the runtime share."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.runtime.run import RunRequest
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
def plans(tiny_folder: Path) -> dict[str, Plan]:
    """The tiny model planned for this CPU in each weight format."""
    return {
        name: shallowflow.plan(
            str(tiny_folder), "cpu", quantization=name, sequence_length=32, global_batch_size=4, rank=8
        )
        for name in tiny.PLANNED_FORMATS
    }


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Text like the one that is learned, and not part of it."""
    path = tmp_path / "held.txt"
    path.write_text(tiny.LINES[2][: len(tiny.LINES[2]) // 2] + tiny.LINES[0], encoding="utf-8")
    return path


@pytest.fixture
def request_for(tiny_folder: Path, tmp_path: Path) -> Callable[..., RunRequest]:
    """Make a request to learn a few repetitive lines in three steps, with some changes."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES), encoding="utf-8")

    def make(**changes: Any) -> RunRequest:
        wanted = {"data": data, "weights": tiny_folder, "output": tmp_path / "run", "num_steps": 3, **changes}
        return RunRequest(**wanted)

    return make


Ask = Callable[..., Any]


@contextlib.contextmanager
def asking(program: str) -> Iterator[Ask]:
    """Ask the *program* of processes, a module, for something, and get what came of it."""
    command = [sys.executable, "-m", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as running:

        def asked(*words: Any) -> Any:
            assert running.stdin is not None and running.stdout is not None
            print(json.dumps(words), file=running.stdin, flush=True)
            return json.loads(running.stdout.readline())

        yield asked
        running.kill()


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the program of shared weights and replicas."""
    with asking("tests.runtime.troubled") as asked:
        yield asked
