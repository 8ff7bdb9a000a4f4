"""A run in several processes as the command line meets it: who starts the others, and who speaks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from shallowflow.planner.plan import Plan

T = TypeVar("T")


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


def start(plan: Plan, num_nodes: int, output: Path) -> NoReturn:
    """Start this command again in a process for each of the plan's GPUs, or say how to on several machines; and end.

    Raises:
        RunError, RunFailed: see there.
    """
    from shallowflow.runtime import launch

    arguments = _words(click.get_current_context())
    if num_nodes > 1:
        click.echo(launch.for_several_machines(plan, num_nodes, arguments, output))
        sys.exit(0)
    sys.exit(launch.launch(plan, arguments, output))


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
