"""Machines of a test, each a fork that trains on a disk of its own, and what befalls them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shallowflow.planner.plan import Plan
from shallowflow.runtime import storage
from shallowflow.runtime.aws import notices
from shallowflow.runtime.record import RunRecord
from shallowflow.runtime.request import RunFailed
from shallowflow.runtime.run import RunRequest, Silent, train
from shallowflow.runtime.step import MicroBatch, Trainee
from tests.aws import metadata

MICRO_BATCH_SECONDS = 0.03
_FOR_EVER = contextlib.ExitStack()
"""What lives as long as its process."""


class Noting(Silent):
    """Writes every note and step to a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self, record: Any, peak: Any) -> None:
        """Note one step."""
        self._write(f"step {record.index}")

    def note(self, message: str) -> None:
        """Note a note."""
        self._write(message)

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def num_steps(self) -> int:
        """How many steps were made."""
        return sum(line.startswith("step ") for line in self.path.read_text(encoding="utf-8").splitlines())


@dataclass
class Machine:
    """A fork that trains on a disk of its own."""

    request: RunRequest
    process: int
    noting: Noting

    @property
    def result(self) -> Path:
        """Where it says how it ended."""
        return self.request.output.with_suffix(".json")

    def wait(self) -> dict[str, Any]:
        """How it ended: its record, an error, or nothing where it was killed."""
        os.waitpid(self.process, 0)
        if not self.result.exists():
            return {"outcome": "killed"}
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found


def start(plan: Plan, request: RunRequest, prepare: Callable[[], None] = lambda: None) -> Machine:
    """Train in a fork, after having *prepared* it."""
    noting = Noting(request.output.with_suffix(".txt"))
    noting.path.touch()
    process = os.fork()
    made = Machine(request, process, noting)
    if process == 0:
        try:
            prepare()
            told = outcome(train(plan, request, noting), request.output)
        except RunFailed as error:
            told = {"outcome": "failed", "error": str(error)}
        except BaseException:  # noqa: BLE001
            told = {"outcome": "error", "error": traceback.format_exc()}
        made.result.write_text(json.dumps(told), encoding="utf-8")
        os._exit(0)
    return made


def outcome(record: RunRecord, output: Path) -> dict[str, Any]:
    """What an interruption must not change, to the last bit, and what tells of it."""
    adapter = output / "adapter" / "adapter_model.safetensors"
    return {
        "outcome": record.outcome,
        "notes": record.notes,
        "interruptions": record.interruptions,
        "usd": record.usd,
        "losses": [step.loss for step in record.steps],
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest(),
    }


# What befalls a machine


def replace_in(owner: object, name: str, value: object) -> None:
    """Give *owner* another attribute, for as long as this process lives."""
    setattr(owner, name, value)


def slowly(act: Callable[[int], None] = lambda _number: None) -> Callable[[], None]:
    """Make micro-batches take a while, so that something can happen beside them; *act* is told the number of each."""

    def prepare() -> None:
        real, count = Trainee.loss, [0]

        def loss(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
            if not batch.input_ids.is_meta:
                count[0] += 1
                act(count[0])
                time.sleep(MICRO_BATCH_SECONDS)
            return real(trainee, batch)

        replace_in(Trainee, "loss", loss)

    return prepare


def noticed(at: int, seconds: float) -> Callable[[], None]:
    """A notice at that micro-batch; its service lives in the machine, which asks it often."""

    def prepare() -> None:
        service = _FOR_EVER.enter_context(metadata.serving())
        os.environ |= {
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint,
        }
        real = notices.Listener.start

        def start_often(listener: notices.Listener) -> None:
            listener.poll_seconds = 0.01
            real(listener)

        replace_in(notices.Listener, "start", start_often)

        def act(number: int) -> None:
            if number == at:
                service.notice(seconds)

        slowly(act)()

    return prepare


def dying_in_an_upload(number: int, requests: int) -> Callable[[], None]:
    """Killed in the upload of that many-th checkpoint, after so many requests."""

    def prepare() -> None:
        slowly()()
        real, count = storage.Vault.save, [0]

        def save(vault: storage.Vault, folder: Path, num_steps: int) -> None:
            count[0] += 1
            if count[0] == number:
                vault.objects = Dying(vault.objects, requests)
            real(vault, folder, num_steps)

        replace_in(storage.Vault, "save", save)

    return prepare


class Dying:
    """Kills its process at a request."""

    def __init__(self, objects: Any, left: int) -> None:
        self._objects, self._left = objects, left

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self._objects, name)
