"""What to run a plan on, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from shallowflow.planner import words
from shallowflow.planner.plan import Plan

from .documents import Format
from .step import FULL_LEARNING_RATE, LEARNING_RATE
from .trackers import missing_package

MOST_STEPS = 10**9


class RunError(ValueError):
    """A run that cannot start here: one line that says why and what would work."""


class RunFailed(RuntimeError):
    """A run that had to end: one line that says why, and what of it was saved."""


class RunLost(RunFailed):
    """A run of which another process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to run a plan on.

    Attributes:
        num_steps: optimizer updates; None for one pass over the data.
        usd_per_hour: what the machine costs, for the meter; None shows no dollars.
        resume: go on from the newest good checkpoint in the output folder, where there is one.
        learning_rate: None takes the usual one of what learns.
        save_every: updates between two checkpoints; None saves one every ten minutes, or, where writing it takes more
            than a twentieth of that, as much less often.
        eval_every: updates between two evaluations; None evaluates before and after training.
        patience: evaluations without improvement after which training stops; the best one's is the result then.
        samples: prompts that are answered before and after training.
        track: Accelerate's trackers that hear of every step.
        store: where checkpoints and results go as well, such as ``s3://bucket/prefix``.
        budget_usd: what all sessions together may cost at most; needs the price.
        data_format: how the rows of both data files are read; None tells it from their columns.
    """

    data: Path
    output: Path
    eval_data: Path | None = None
    weights: Path | None = None
    num_steps: int | None = None
    learning_rate: float | None = None
    usd_per_hour: float | None = None
    seed: int = 0
    resume: bool = False
    save_every: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    samples: tuple[str, ...] = ()
    track: tuple[str, ...] = ()
    data_format: Format | None = None
    store: str | None = None
    budget_usd: float | None = None


def check_request(request: RunRequest) -> None:
    """Refuse numbers that are none, and options that lack others.

    Raises:
        RunError: which, and what would work.
    """
    if not 0 <= request.seed < 2**32:
        raise RunError(f"the seed is {request.seed}; give one from 0 to {2**32 - 1}")
    rate = request.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise RunError(f"the learning rate is {rate}; give a positive number, such as {LEARNING_RATE}")
    if request.num_steps is not None and not 1 <= request.num_steps <= MOST_STEPS:
        raise RunError(f"the number of steps is {request.num_steps}; give one from 1 to {MOST_STEPS:,}")
    _check_money_and_store(request)
    if not all(prompt.strip() for prompt in request.samples):
        raise RunError("a prompt to sample is empty; give some words with --sample")
    every = {"--save-every": request.save_every, "--eval-every": request.eval_every, "--patience": request.patience}
    for name, value in every.items():
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}; give a whole number from 1")
    if request.eval_every is not None and request.eval_data is None:
        raise RunError("--eval-every needs text to evaluate on; give it with --eval-data")
    if request.patience is not None and request.eval_every is None:
        raise RunError("--patience needs evaluations to judge by; give --eval-data and --eval-every")
    for name in request.track:
        missing = missing_package(name)
        if missing is not None:
            raise RunError(missing)


def learning_rate(plan: Plan, request: RunRequest) -> float:
    """That of the run: as asked for, or the usual one of what learns in *plan*."""
    usual = FULL_LEARNING_RATE if plan.configuration.is_full else LEARNING_RATE
    return usual if request.learning_rate is None else request.learning_rate


def _check_money_and_store(request: RunRequest) -> None:
    if request.usd_per_hour is not None and not (math.isfinite(request.usd_per_hour) and request.usd_per_hour >= 0):
        raise RunError(f"the price is {request.usd_per_hour} dollars an hour; give a number with --usd-per-hour")
    if request.budget_usd is not None:
        if not (math.isfinite(request.budget_usd) and request.budget_usd > 0):
            raise RunError(f"the budget is {request.budget_usd} dollars; give a positive number with --budget-usd")
        if request.usd_per_hour is None:
            raise RunError("--budget-usd needs the machine's price; give it with --usd-per-hour")
    if request.store is not None and importlib.util.find_spec("boto3") is None:
        raise RunError("--store needs the package boto3; install it with: pip install boto3")


def device_of(plan: Plan, local_rank: int = 0) -> torch.device:
    """The device of this machine that *plan* is for, for the process *local_rank* on it.

    Raises:
        RunError: there is none.
    """
    if plan.gpu == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError(f"the plan is for a {plan.gpu} and this machine has no CUDA device; plan with --gpu cpu")
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"there is no GPU for local rank {local_rank}: this machine has "
            f"{words.counted(torch.cuda.device_count(), 'CUDA device')}; start as many processes on it"
        )
    return torch.device("cuda", local_rank)


def check_processes(plan: Plan, num_processes: int) -> None:
    """Refuse to run *plan* in another number of processes than it has GPUs.

    Raises:
        RunError: how many there are, and how to start those that are wanted.
    """
    wanted = plan.configuration.num_gpus
    if wanted == num_processes:
        return
    found = "this is one process" if num_processes == 1 else f"{num_processes} processes were started"
    way = "sfplan train" if wanted == 1 else f"sfplan train or torchrun --nproc-per-node {wanted}"
    raise RunError(
        f"the plan is for {words.counted(wanted, 'GPU')} and {found}; start it with {way}, "
        f"or plan with --gpus {num_processes}"
    )
