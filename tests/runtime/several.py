"""Processes that train together on one machine: forks of one that has loaded everything, and what they come to.

What is asked for by a line of JSON, the name of a function and its arguments, ``troubled`` reads and answers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import cache
from shallowflow.runtime import joining
from shallowflow.runtime.batches import Group
from shallowflow.runtime.learner import Learner
from shallowflow.runtime.record import StepRecord
from shallowflow.runtime.run import RunRequest, train
from shallowflow.runtime.step import make_trainee
from shallowflow.runtime.train import train as training_steps
from tests.runtime import tiny

GLOBAL_BATCH_SIZE = 8
NUM_STEPS = 6
LEARNING_RATE = 5e-3


@functools.cache
def place() -> Path:
    """A folder with the tiny model, data and text that is held out."""
    folder = Path(tempfile.mkdtemp())
    tiny.save(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES))
    (folder / "held.txt").write_text(tiny.LINES[2][:60] + tiny.LINES[0])
    return folder


@functools.cache
def planned(
    num_gpus: int,
    quantization: str = "fp16",
    activations: str | None = None,
    sharding: str = "none",
    **changes: Any,
) -> Plan:
    """The tiny model's plan for so many CPUs, one sequence to a micro-batch; with ``full`` every weight learns."""
    learned: dict[str, Any] = {"quantization": quantization, "rank": 8}
    wanted = {
        **({"adapter": "full"} if quantization == "full" else learned),
        "num_gpus": num_gpus,
        "activations": activations,
        "micro_batch_size": 1,
        "loss_chunks": 1,
        "double_quantization": False if quantization == "nf4" else None,
        "sequence_length": 32,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "sharding": sharding if num_gpus > 1 else None,
    }
    return shallowflow.plan(str(place() / "model"), "cpu", **{**wanted, **changes})


def request(output: str, **changes: Any) -> RunRequest:
    """Learn the tiny data, into the folder *output*."""
    wanted = {
        "data": place() / "data.jsonl",
        "weights": place() / "model",
        "output": place() / output,
        "num_steps": NUM_STEPS,
        "learning_rate": LEARNING_RATE,
        **changes,
    }
    return RunRequest(**wanted)


def in_processes(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What *work* gives for each rank in a fork of its own, or how it ended: with an exception's words, or a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    children: list[int] = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            _work(work, rank, folder / str(rank))
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    return [
        f"signal {os.WTERMSIG(end)}" if os.WIFSIGNALED(end) else pickle.loads((folder / str(rank)).read_bytes())
        for rank, end in enumerate(ends)
    ]


def _work(work: Callable[[int], Any], rank: int, path: Path) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = work(rank)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        result = f"{type(error).__name__}: {error}"
        if not isinstance(error, (ValueError, RuntimeError)):
            traceback.print_exc()
    path.write_bytes(pickle.dumps(result))
    os._exit(0)


ADAPTER: list[torch.Tensor] = []
"""The one that this process trains."""


def trained(
    plan: Plan, wanted: RunRequest, strike: Callable[[Learner], None] = lambda _learner: None
) -> dict[str, Any]:
    """Train here, as one of several processes, and tell what does not depend on the clock.

    After each step *strike* may do harm. Only for a fork: what it changes is not changed back.
    """
    begin, hear = Learner.begin, Learner._hear

    def begun(*args: Any) -> Learner:
        made = begin(*args)
        ADAPTER[:] = [p.detach() for p in made.trainee.parameters]
        return made

    def heard(self: Learner, record: StepRecord) -> None:
        hear(self, record)
        strike(self)

    Learner.begin, Learner._hear = begun, heard  # type: ignore[method-assign,assignment]
    record = train(plan, wanted)
    adapter = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in ADAPTER))
    return {
        "outcome": record.outcome,
        "losses": [step.loss for step in record.steps],
        "tokens": [step.num_target_tokens for step in record.steps],
        "evaluations": [one.loss for one in record.evaluations],
        "samples": [one.after for one in record.samples],
        "peaks": [peak.peak_allocated_bytes for peak in record.peaks],
        "fallbacks": [[one.step, one.went_on_at, one.reason] for one in record.fallbacks],
        "notes": list(record.notes),
        "adapter": adapter.hexdigest(),
    }


# What may be asked for


def alike(
    quantization: str, activations: str | None, *sizes: int, sharding: str = "none", **changes: Any
) -> dict[str, Any]:
    """The same run in one process and in several, and what a step was predicted to take in each."""
    found: dict[str, Any] = {"predicted": {}}
    for size in (1, *sizes):
        plan = planned(size, quantization, activations, sharding, **changes)
        output = "".join(filter(str.isalnum, f"{quantization}{activations}{size}{sharding}{changes}"))
        prompt = "the cat" if sharding == "none" else "the cat number 1 sat on the m"  # a few passes are enough
        wanted = request(output, eval_data=place() / "held.txt", eval_every=4, samples=(prompt,))
        found[str(size)] = in_processes(size, functools.partial(_trained, plan, wanted))
        found["predicted"][str(size)] = plan.prediction.peak_allocated_bytes
    return found


def alike_sharded(quantization: str, activations: str | None, changes: dict[str, Any], *sizes: int) -> dict[str, Any]:
    """``alike``, several processes sharing the weights."""
    return alike(quantization, activations, *sizes, sharding="weights", **changes)


def _trained(plan: Plan, wanted: RunRequest, _rank: int) -> dict[str, Any]:
    return trained(plan, wanted)


def moved() -> list[Any]:
    """A run in two processes that goes on in four and ends in one."""
    wanted = request("moved")
    for size, num_steps in ((2, 2), (4, 4), (1, NUM_STEPS)):
        now = replace(wanted, num_steps=num_steps, resume=True)
        found = in_processes(size, functools.partial(_trained, planned(size), now))
    return found


def moved_in_and_out() -> list[Any]:
    """A run that begins with whole weights in two processes, goes on with them shared by two and four, ends alone."""
    wanted = request("in and out")
    turns = ((2, "none", 1), (2, "weights", 3), (4, "weights", 4), (2, "none", 5), (1, "none", NUM_STEPS))
    for size, sharding, num_steps in turns:
        now = replace(wanted, num_steps=num_steps, resume=True)
        found = in_processes(size, functools.partial(_trained, planned(size, sharding=sharding), now))
    return found


def beside_fsdp(size: int) -> list[Any]:
    """One step's loss and gradients under PyTorch's own ``fully_shard``, and with the weights shared as here."""
    from torch.distributed.fsdp import fully_shard

    def work(rank: int) -> Any:
        ranks = joining.join()
        batch = tiny.random_batch([16, 16], seed=rank)
        found = []
        for ours in (False, True):
            torch.manual_seed(0)
            chosen = replace(tiny.configuration(), num_gpus=size, sharding="weights" if ours else "none")
            trainee = make_trainee(tiny.base(), chosen, "float32", tiny.CPU, ranks=ranks)
            torch.manual_seed(1)
            for parameter in trainee.parameters:
                torch.nn.init.normal_(parameter, std=0.05)
            if not ours:
                for layer in trainee.layers:
                    fully_shard(layer, reshard_after_forward=True, ignored_params=set(trainee.parameters))
                fully_shard(trainee.model, ignored_params=set(trainee.parameters))
            loss = trainee.loss(batch)
            loss.backward()
            found.append(
                [float(loss.detach()), *(float(p.grad.norm()) for p in trainee.parameters if p.grad is not None)]
            )
        return found

    return in_processes(size, work)


def unlike(what: str) -> list[Any]:
    """Two processes of which the second was given other data, has none, or other options or libraries.

    Or that the plan wants more of.
    """
    plan, versions = planned(4 if what == "number" else 2), cache.versions()
    other = place() / f"{what}.jsonl"
    if what == "other":
        other.write_text((place() / "data.jsonl").read_text() * 2)

    def work(rank: int) -> Any:
        changes: dict[str, Any] = {}
        if rank == 1 and what in ("other", "missing"):
            changes["data"] = other
        elif rank == 1 and what in ("num_steps", "resume"):
            changes[what] = {"num_steps": 7, "resume": True}[what]
        elif rank == 1 and what == "version":
            cache.versions = lambda: {**versions, "torch": "0"}  # type: ignore[assignment]
        return trained(plan, request(f"unlike {what}", **changes))

    return in_processes(2, work)


def overflowing() -> list[Any]:
    """Two fp16 trainees, the second of which has an infinite gradient in the first of two steps."""

    def work(rank: int) -> Any:
        ranks = joining.join()
        trainee = tiny.trainee(compute_dtype="float16")
        trainee.ranks = ranks
        first = next(iter(trainee.parameters))
        if rank == 1:
            hook = first.register_hook(lambda gradient: gradient + math.inf)
        outcomes = [trainee.step([tiny.random_batch([16, 16], seed=rank)], 64)]
        if rank == 1:
            hook.remove()
        outcomes.append(trainee.step([tiny.random_batch([16, 16], seed=rank)], 64))
        return [[one.skipped, one.loss, trainee.loss_scale.value] for one in outcomes]

    return in_processes(2, work)


def with_dropout(rate: float) -> list[Any]:
    """The loss of one step of four micro-batches of a model that drops activations, in one process and in two."""

    def work(_rank: int) -> Any:
        trainee = make_trainee(tiny.base(attention_dropout=rate), tiny.configuration(), "float32", tiny.CPU)
        trainee.ranks = joining.join()
        group = Group((tiny.window(list(range(17))),), 16, is_whole=False)
        (record,) = training_steps(trainee, [[group] * 4], tiny.CPU, on_peak=lambda _peak: None)
        return record.loss

    return [found for size in (1, 2) for found in in_processes(size, work)]
