"""Join the processes that a launcher has started for one run, fail together, and part."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from .interrupts import SIGNALS
from .ranks import ALONE, WELL, Ranks
from .request import RunError

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)
"""For a process that says nothing; one that has ended is noticed at once."""


@dataclass(slots=True)
class _Process:
    """What this process knows of itself.

    Attributes:
        agreed: whether all processes end now, and know it of each other.
    """

    ranks: Ranks = ALONE
    agreed: bool = False


_HERE = _Process()


def join() -> Ranks:
    """This process among those that a launcher has started with it; alone where none has.

    Raises:
        RunError: the launcher's environment makes no sense, or the others do not come.
    """
    if _HERE.ranks.talks or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _HERE.ranks
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        if size == 1:
            return ALONE
        if not dist.is_initialized():
            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            if gpus and local_rank < torch.cuda.device_count():
                torch.cuda.set_device(local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"cannot join the other processes: {reason}; start them by torchrun, or by sfplan train"
        ) from error
    _HERE.ranks = Ranks(rank, size, local_rank, talks=True)
    atexit.register(_leave)
    return _HERE.ranks


def end_together() -> None:
    """Let this process wait for the others when it ends, so that the first can say why; all call this, or none."""
    _HERE.agreed = True


def is_silent() -> bool:
    """Whether another process says what this one ends with."""
    return _HERE.agreed and not _HERE.ranks.leads


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """What *work* gives, once all processes have done theirs.

    Raises:
        ValueError, OSError: *work* does, here.
        RunError: it does elsewhere; which process, and what it says.
    """
    failure: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    told = ranks.gathered(None if failure is None else str(failure))
    if any(message is not None for message in told):
        end_together()
    if failure is not None:
        raise failure
    for rank, message in enumerate(told):
        if message is not None:
            raise RunError(f"rank {rank}: {message}")
    return result


def _leave() -> None:
    """Part from the others, where all end together once all have said what they had to say."""
    for number in SIGNALS:  # of a launcher that sees another process end first
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        if _HERE.agreed:
            _HERE.ranks.vote(WELL)
        dist.destroy_process_group()
