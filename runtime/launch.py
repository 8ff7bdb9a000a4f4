"""Start the processes of a plan for several GPUs of this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shallowflow.planner import words
from shallowflow.planner.plan import Plan

from . import checkpoint
from .folder import CHECKPOINTS
from .request import RunError, RunFailed

LOST = 3
"""The exit code of a process that lost another: not the one to name."""
INTERRUPTED = 130
_OURS = "sfplan-"
"""How the launcher's runs are called, by which its processes know that it speaks for them."""
_SAVING_SECONDS = 600
"""How long an interrupted process may take to end its micro-batch and save."""


def is_ours() -> bool:
    """Whether this process was started here, and its launcher says why another one was lost."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_OURS)


def launch(plan: Plan, arguments: Sequence[str], output: Path) -> int:
    """Run the command line with *arguments* in as many processes as *plan* has GPUs, on this machine.

    They speak for themselves; returned is the exit code that they ended with.

    Raises:
        RunError: the machine has fewer GPUs.
        RunFailed: a process ended before the others; which one, and what of the run in *output* is saved.
    """
    number = plan.configuration.num_gpus
    _check_machine(plan, number)
    logging.disable(logging.CRITICAL)  # torch's own words on the same
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_SECONDS))
    here = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=f"{_OURS}{uuid.uuid4()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(here, sys.executable)("-m", "shallowflow", *arguments)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return _judged({rank: failure.exitcode for rank, failure in error.failures.items()}, output)
    return 0


def _check_machine(plan: Plan, number: int) -> None:
    found = torch.cuda.device_count()
    if plan.gpu != "cpu" and found < number:
        several = f"; --nodes {number // found} shows how to run it on several machines" if found else ""
        raise RunError(
            f"the plan is for {number} x {plan.gpu} and this machine has {words.counted(found, 'CUDA device')}{several}"
        )


def _judged(codes: Mapping[int, int], output: Path) -> int:
    """What the processes' exit *codes* come to.

    Raises:
        RunFailed: one of them ended otherwise than the first, which then could not say why.
    """
    stopped = (LOST, -signal.SIGTERM)  # because of another
    own = {rank: code for rank, code in codes.items() if code not in stopped}
    killed = [rank for rank, code in own.items() if code < 0]
    if 0 in own and not killed:
        return own[0]
    rank = next(iter([*killed, *own, *codes]))
    code = codes[rank]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    path, _ = checkpoint.latest(output / CHECKPOINTS)
    if path is None:
        raise RunFailed(f"rank {rank} {how}; nothing was saved; start again with the same command and --resume")
    steps = words.counted(len(checkpoint.read(path).steps), "step")
    raise RunFailed(f"rank {rank} {how}; {steps} saved in {path}; go on with the same command and --resume")
