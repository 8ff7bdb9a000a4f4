"""Processes that train together, of which some are told to end, are killed or find no memory; asked line by line."""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch

from shallowflow.planner.plan import Plan
from shallowflow.runtime import attempts, build, fallback, joining, quantized, sample, trainees
from shallowflow.runtime.learner import Learner
from shallowflow.runtime.promise import Promise
from shallowflow.runtime.request import RunError
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee
from shallowflow.runtime.watch import Watcher
from tests.runtime import several, tiny
from tests.runtime.several import in_processes, planned, request, trained


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


def main() -> None:
    """Answer each line on standard input."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    joining.PATIENCE = datetime.timedelta(seconds=60)  # after which a test that waits for ever fails
    quantized.bitsandbytes()  # here, and not in every fork; peft likewise
    build.add_adapters(tiny.base(), rank=1, alpha=1)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        asked = globals().get(name) or getattr(several, name)
        print(json.dumps(asked(*arguments)), flush=True)


if __name__ == "__main__":
    main()
