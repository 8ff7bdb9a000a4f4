"""Processes that train together on one machine: forks of one that has loaded everything, and what they come to.

Reads a line of JSON for each thing to do, the name of a function here and its arguments, and answers with another.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import cache
from shallowflow.runtime import attempts, build, fallback, joining, quantized, sample, trainees
from shallowflow.runtime.batches import Group
from shallowflow.runtime.learner import Learner
from shallowflow.runtime.promise import Promise
from shallowflow.runtime.record import StepRecord
from shallowflow.runtime.request import RunError
from shallowflow.runtime.run import RunRequest, train
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee
from shallowflow.runtime.train import train as training_steps
from shallowflow.runtime.watch import Watcher
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


def struck(rank: int, number: int, after: int, sharding: str = "none") -> dict[str, Any]:
    """A run of two processes, one of which gets a signal after some steps; and the same run resumed."""
    wanted = request(f"struck{rank}{number}{sharding}")
    plan = planned(2, sharding=sharding)

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) == after and learner.work.ranks.rank == rank:
            os.kill(os.getpid(), number)

    first = in_processes(2, lambda _rank: trained(plan, wanted, strike))
    saved = sorted(path.name for path in (wanted.output / "checkpoints").glob("step-*"))
    again = in_processes(2, lambda _rank: trained(plan, replace(wanted, resume=True)))
    return {"first": first, "saved": saved, "again": again}


def short_of_memory(rank: int, where: str, after: int = 3) -> list[Any]:
    """A run of two processes, one of which finds no memory after some steps: in its passes, or in its update."""

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) != after or learner.work.ranks.rank != rank or learner.progress.fallbacks:
            return
        if where == "passes":
            learner.trainee.loss_chunks = 0  # which nothing divides
        else:
            learner.trainee.optimizer.register_step_pre_hook(_no_memory)

    loss = Trainee.loss

    def lossy(self: Trainee, batch: MicroBatch) -> torch.Tensor:
        return loss(self, batch) if self.loss_chunks else _no_memory()

    Trainee.loss = lossy  # type: ignore[method-assign]
    return in_processes(
        2, lambda _rank: trained(planned(2), request(f"short{rank}{where}{after}", save_every=2), strike)
    )


def short_while_sharing(*short: int) -> list[Any]:
    """A run of two processes that share the weights, some of which find no memory in the middle of a pass."""
    plan = planned(2, sharding="weights")

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) == 3 and learner.work.ranks.rank in short and not learner.progress.fallbacks:
            learner.trainee.layers[1].forward = _no_memory

    def work(_rank: int) -> Any:
        attempts.SHORT_PATIENCE = datetime.timedelta(seconds=2)
        return trained(plan, request(f"sharing{short}", save_every=2), strike)

    return in_processes(2, work)


def killed_in_a_pass(rank: int) -> list[Any]:
    """A run of two processes that share the weights, one of which is killed while the other waits for its part."""
    plan = planned(2, sharding="weights")

    def die(*_args: Any, **_kwargs: Any) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) == 3 and learner.work.ranks.rank == rank:
            learner.trainee.layers[1].forward = die

    return in_processes(2, lambda _rank: trained(plan, request(f"killed{rank}"), strike))


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


def short_before_training(rank: int, where: str) -> list[Any]:
    """A run of two processes, one of which finds no memory at first: for the model, or for an answer to a prompt."""
    left = [True]

    def once(real: Callable[..., Any], *args: Any) -> Any:
        if os.environ["RANK"] == str(rank) and left and left.pop():
            _no_memory()
        return real(*args)

    def work(_rank: int) -> Any:
        if where == "model":
            trainees.make_trainee = functools.partial(once, make_trainee)  # type: ignore[attr-defined]
        else:
            sample._next = functools.partial(once, sample._next)
        return trained(planned(2), request(f"before{rank}{where}", samples=("the cat",)))

    return in_processes(2, work)


def short_and_doubtful() -> list[Any]:
    """A run of two processes short of memory, the second of which doubts the first alternative."""
    plan, real = planned(2), attempts.promised
    first = fallback.following(plan, fallback.candidate(plan, None))

    def promised(plan: Plan, alternative: int | None, watcher: Watcher, rank: int = 0) -> Promise:
        if alternative is not None and alternative == first and os.environ["RANK"] == "1":
            raise RunError("it is another")
        return real(plan, alternative, watcher, rank)

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) == 3 and not learner.progress.fallbacks:
            _no_memory()

    def work(_rank: int) -> Any:
        attempts.promised = promised
        return trained(plan, request("doubtful"), strike)

    return in_processes(2, work)


def asked_and_short(asked: int, short: int) -> dict[str, Any]:
    """A run of two processes, one of which is told to end in the step for which another has no memory; and resumed."""
    wanted = request(f"asked{asked}short{short}")

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) != 3:
            return
        if learner.work.ranks.rank == asked:
            os.kill(os.getpid(), signal.SIGTERM)
        if learner.work.ranks.rank == short:
            _no_memory()

    first = in_processes(2, lambda _rank: trained(planned(2), wanted, strike))
    again = in_processes(2, lambda _rank: trained(planned(2), replace(wanted, resume=True)))
    return {"first": first, "again": again}


def _no_memory(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory.")


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


def main() -> None:
    """Answer each line on standard input."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    joining.PATIENCE = datetime.timedelta(seconds=60)  # after which a test that waits for ever fails
    quantized.bitsandbytes()  # here, and not in every fork; peft likewise
    build.add_adapters(tiny.base(), rank=1, alpha=1)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
