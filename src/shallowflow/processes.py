"""A run in several processes as the command line meets it: who starts the others, and who speaks."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from shallowflow.planner import words
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.planner.plan import Plan

T = TypeVar("T")

PORT = 29500
"""torchrun's own, where the processes of several machines meet."""


def are_started() -> bool:
    """Whether a launcher, such as torchrun or accelerate, has started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def together(work: Callable[[], T]) -> T:
    """What *work* gives; where a launcher started several processes, what fails in one fails in all."""
    if not are_started():
        return work()
    from shallowflow.runtime import joining

    return joining.together(joining.join(), work)


def leads() -> bool:
    """Whether this is the process that tells of the run."""
    return not are_started() or os.environ["RANK"] == "0"


def start(plan: Plan, output: Path) -> NoReturn:
    """Start this command again in a process for each of the plan's GPUs, on this machine; and end.

    Raises:
        RunError, RunFailed: see there.
    """
    from shallowflow.runtime import launch

    sys.exit(launch.launch(plan, _words(click.get_current_context()), output))


def torchrun_line(plan: Plan, num_nodes: int) -> str:
    """What runs this command on each of *num_nodes* machines.

    Raises:
        RequestError: the plan's GPUs cannot be shared out evenly over so many.
    """
    number = plan.configuration.num_gpus
    if number % num_nodes:
        raise RequestError(
            f"{words.counted(number, 'GPU')} cannot be shared out over --nodes {num_nodes}; give a number that divides "
            f"{number}"
        )
    arguments = shlex.join(_words(click.get_current_context()))
    return (
        f"torchrun --nnodes {num_nodes} --nproc-per-node {number // num_nodes} --node-rank NUMBER "
        f"--master-addr ADDRESS --master-port {PORT} -m shallowflow {arguments}"
    )


def instructions(line: str, num_nodes: int, output: Path) -> str:
    """What to do with the *line* for *num_nodes* machines, and what they need."""
    return (
        f"Run this on each of the {num_nodes} machines, NUMBER being 0 to {num_nodes - 1}, ADDRESS that of 0:\n\n"
        f"{line}\n\n"
        f"Plan, data and weights must be on each of them; number 0 alone writes {output}.\n"
        "They must reach each other on every TCP port. Where a machine has several networks, GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME name the one to use."
    )


def _words(context: click.Context) -> list[str]:
    """This command and what it was given, but for ``--nodes``."""
    found = [str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        value: Any = context.params.get(name)
        if context.get_parameter_source(name) != ParameterSource.COMMANDLINE or name == "nodes":
            continue
        if not isinstance(parameter, click.Option):
            found.append(str(value))
        elif parameter.is_flag:
            found.append(parameter.opts[0])
        else:
            found += [f"{parameter.opts[0]}={each}" for each in (value if parameter.multiple else [value])]
    return found


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Around a run: SIGTERM ends it as Ctrl-C does; of several processes the first alone says how it ended.

    Where another process is lost, the launcher says so, which knows how; the first does under any other launcher.
    """
    from shallowflow.runtime import launch
    from shallowflow.runtime.request import RunLost

    signal.signal(signal.SIGTERM, _obey)  # a spot instance's end, or a job limit's
    try:
        yield
    except RunLost as lost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if leads() and not launch.is_ours():
            click.echo(f"Error: {lost}; go on with the same command and --resume", err=True)
        sys.exit(launch.LOST)
    except KeyboardInterrupt:
        if leads():
            raise
        sys.exit(launch.INTERRUPTED)


def _obey(_number: int, _frame: object) -> NoReturn:
    from shallowflow.runtime import launch

    if launch.is_ours():  # which stops all once one is lost, and says so
        sys.exit(launch.LOST)
    raise KeyboardInterrupt
