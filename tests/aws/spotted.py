"""Train with checkpoints in S3, be told that the machine is taken, be killed, and go on from an empty disk.

python -m tests.aws.spotted SCENARIO...

AWS is where the environment says. Runs in a process of its own, whose forks start with one thread and nothing else;
each fork is a machine. Prints JSON: for each scenario what came of it, and whether the run ended as one in one go does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import torch

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.runtime import folder as folder_of_a_run
from shallowflow.runtime import storage
from shallowflow.runtime.aws import notices
from shallowflow.runtime.record import RunRecord
from shallowflow.runtime.request import RunFailed
from shallowflow.runtime.run import RunRequest, Silent, train
from shallowflow.runtime.step import MicroBatch, Trainee
from tests.aws import metadata
from tests.runtime import tiny

NUM_STEPS, SAVE_EVERY, NUM_MICRO_BATCHES = 12, 2, 4
MICRO_BATCH_SECONDS = 0.03
BUCKET = "spotted"
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


@functools.cache
def _client() -> Any:
    return boto3.client("s3")


def stored_steps(prefix: str) -> list[int]:
    """The steps of the checkpoints that the store names, newest first."""
    client = _client()
    try:
        body = client.get_object(Bucket=BUCKET, Key=f"{prefix}/LATEST")["Body"].read()
    except client.exceptions.NoSuchKey:
        return []
    return [entry["num_steps"] for entry in json.loads(body)["checkpoints"]]


def damage(prefix: str) -> None:
    """Change a bit of the newest stored checkpoint."""
    client = _client()
    entry = json.loads(client.get_object(Bucket=BUCKET, Key=f"{prefix}/LATEST")["Body"].read())["checkpoints"][0]
    key = f"{prefix}/{entry['prefix']}optimizer.safetensors"
    body = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; two minutes at most."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.03)


# Scenarios


@dataclass
class Stage:
    """A plan, and what to ask of each machine."""

    plan: Plan
    whole: RunRequest
    folder: Path
    count: int = 0

    def request(self, scenario: str, **changes: Any) -> RunRequest:
        """For a machine with an empty disk."""
        self.count += 1
        output = self.folder / f"disk{self.count}"
        wanted = {"output": output, "resume": True, "store": f"s3://{BUCKET}/{scenario}", **changes}
        return replace(self.whole, **wanted)

    def go_on(self, scenario: str) -> tuple[int, dict[str, Any]]:
        """Resume on an empty disk: after which step, and what comes of it."""
        done = start(self.plan, self.request(scenario)).wait()
        words = [note for note in done.get("notes", ()) if note.startswith("resumed after step")]
        return (int(words[0].split()[-1]) if words else 0), done


def told_in_time(stage: Stage) -> dict[str, Any]:
    """A notice mid-step with two minutes left: saved at once, trained on, then killed from one moment to the other."""
    machine = start(stage.plan, stage.request("notice", resume=False, save_every=100), noticed(14, 120))
    wait_for(lambda: bool(stored_steps("notice")))
    at_notice = stored_steps("notice")[0]
    wait_for(lambda: machine.noting.num_steps() > at_notice + 1)
    os.kill(machine.process, signal.SIGKILL)
    first = machine.wait()
    resumed, last = stage.go_on("notice")
    return {"first": first["outcome"], "at": [at_notice], "resumed": resumed, "last": last}


def told_late(stage: Stage) -> dict[str, Any]:
    """A notice with six seconds left: the run ends by itself before them, and goes on from its last step."""
    machine = start(stage.plan, stage.request("late", resume=False, save_every=100), noticed(14, 6))
    first = machine.wait()
    resumed, last = stage.go_on("late")
    return {
        "first": first["outcome"],
        "at": [len(first["losses"])],
        "notes": first["notes"],
        "resumed": resumed,
        "last": last,
    }


def killed_in_an_upload(stage: Stage) -> dict[str, Any]:
    """The kill comes before the upload finished: the one before comes back."""
    chance = random.Random(os.environ.get("SHALLOWFLOW_SEED", "0"))
    number, requests = chance.randint(2, 4), chance.randint(0, 7)
    machine = start(stage.plan, stage.request("killed", resume=False), dying_in_an_upload(number, requests))
    first = machine.wait()
    at = stored_steps("killed")
    resumed, last = stage.go_on("killed")
    done = machine.noting.num_steps()
    return {"first": first["outcome"], "at": at, "done": done, "resumed": resumed, "last": last}


def damaged(stage: Stage) -> dict[str, Any]:
    """The newest stored checkpoint was changed: it is passed over, and said."""
    machine = start(stage.plan, stage.request("damaged", resume=False), slowly())
    wait_for(lambda: len(stored_steps("damaged")) > 1)
    os.kill(machine.process, signal.SIGKILL)
    first = machine.wait()
    at = stored_steps("damaged")
    damage("damaged")
    resumed, last = stage.go_on("damaged")
    return {"first": first["outcome"], "at": at, "resumed": resumed, "last": last}


def two_at_once(stage: Stage) -> dict[str, Any]:
    """An older machine that was only frozen goes on beside its successor: it ends, and harms nothing."""
    machine = start(stage.plan, stage.request("two", resume=False), slowly())
    wait_for(lambda: bool(stored_steps("two")))
    os.kill(machine.process, signal.SIGSTOP)
    at = stored_steps("two")
    second = start(stage.plan, stage.request("two", num_steps=NUM_STEPS), slowly())
    wait_for(lambda: second.noting.num_steps() > 1)
    os.kill(machine.process, signal.SIGCONT)
    first = machine.wait()
    resumed, _ = 0, second.wait()
    resumed, last = stage.go_on("two")
    return {"first": first["outcome"], "error": first.get("error"), "at": at, "resumed": resumed, "last": last}


def one_after_another(stage: Stage) -> dict[str, Any]:
    """All of it in one run, whose machines each begin with an empty disk: five of them until it is done."""
    name = "chain"
    found: dict[str, Any] = {}
    told = start(stage.plan, stage.request(name, resume=False, save_every=100), noticed(14, 120))
    wait_for(lambda: bool(stored_steps(name)))
    found["told at"] = stored_steps(name)[0]
    wait_for(lambda: told.noting.num_steps() > found["told at"] + 1)
    os.kill(told.process, signal.SIGKILL)
    told.wait()
    dying = start(stage.plan, stage.request(name), dying_in_an_upload(2, 3))
    found["dying"] = dying.wait()["outcome"]
    found["died after"], found["stored before"] = dying.noting.num_steps(), stored_steps(name)
    damage(name)
    frozen = start(stage.plan, stage.request(name), slowly())
    wait_for(lambda: stored_steps(name)[0] > found["told at"] and frozen.noting.num_steps() > 1)
    os.kill(frozen.process, signal.SIGSTOP)
    found["frozen"] = frozen.noting.path.read_text(encoding="utf-8").splitlines()
    late = start(stage.plan, stage.request(name), noticed(18, 6))
    wait_for(lambda: late.noting.num_steps() > 1)
    os.kill(frozen.process, signal.SIGCONT)
    found["zombie"], found["late"] = frozen.wait(), late.wait()
    resumed, last = stage.go_on(name)
    return {**found, "resumed": resumed, "last": last}


SCENARIOS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    scene.__name__: scene
    for scene in (one_after_another, told_in_time, told_late, killed_in_an_upload, damaged, two_at_once)
}


def main(names: list[str]) -> None:
    """Run the scenarios and print what came of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(os.environ.get("SPOTTED_FOLDER") or tempfile.mkdtemp())
    weights = tiny.save(folder / "model")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES), encoding="utf-8")
    fixed: dict[str, Any] = {"sequence_length": 32, "global_batch_size": NUM_MICRO_BATCHES, "rank": 8}
    plan = shallowflow.plan(str(weights), "cpu", micro_batch_size=1, **fixed)
    whole = RunRequest(
        data=data,
        weights=weights,
        output=folder / "whole",
        num_steps=NUM_STEPS,
        save_every=SAVE_EVERY,
        usd_per_hour=3.6,
    )
    _client().create_bucket(Bucket=BUCKET)
    replace_in(folder_of_a_run, "step_timeline", lambda _plan: None)  # a page is none of this test's affairs
    expected = start(plan, whole).wait()
    found = {}
    for name in names:
        stage = Stage(plan, whole, folder / name)
        stage.folder.mkdir()
        told = SCENARIOS[name](stage)
        last = told["last"]
        told["same"] = all(last.get(part) == expected[part] for part in ("outcome", "losses", "adapter"))
        found[name] = told
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
