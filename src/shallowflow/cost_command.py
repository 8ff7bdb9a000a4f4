"""``sfplan cost``: what AWS billed for a run, beside what the run reckoned."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shallowflow.planner import words
from shallowflow.printing import echo_json
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.aws.bills import Day


class _Run(msgspec.Struct):
    """What is needed of ``run.json``."""

    outcome: str
    started: datetime.datetime
    seconds: float
    usd: float | None
    interruptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BilledDay:
    """What was billed for one day.

    Attributes:
        date: in UTC.
        estimated: whether AWS may still change it.
    """

    date: str
    usd: float
    estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What AWS billed for a run, and what the run reckoned.

    Attributes:
        tag: that what is billed carries: its key, and its value.
        reckoned_usd: what the run's own meter came to; None where no price was given.
        billed_usd: the sum of *days*.
        days: from the run's first to today.
        interruptions: times that the run was ended before its end.
    """

    tag: dict[str, str]
    reckoned_usd: float | None
    billed_usd: float
    days: tuple[BilledDay, ...]
    interruptions: int


@click.command("cost")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--tag", metavar="KEY=VALUE", help="What the run's instances carry.  [default: shallowflow-run=NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print both as JSON.")
def cost_command(run: Path, tag: str | None, as_json: bool) -> None:
    """What AWS billed for the run in the folder RUN, beside what it reckoned while it ran.

    The bill is Cost Explorer's (which takes a cent a question) for all that carries a tag, whose key must be activated
    as a cost allocation tag; NAME is the folder's. It is a day late.

    \b
    sfplan cost run --tag shallowflow-run=run
    """
    record = _read(run)
    key, value = _tag(tag, run)
    bill = _bill(key, value, record.started)
    billed = sum(day.usd for day in bill)
    if as_json:
        cost = Cost(
            tag={key: value},
            reckoned_usd=record.usd,
            billed_usd=billed,
            days=tuple(BilledDay(**asdict(day)) for day in bill),
            interruptions=record.interruptions,
        )
        echo_json(cost)
        return
    interrupted = f", {words.counted(record.interruptions, 'interruption')}" if record.interruptions else ""
    reckoned = "no price was given" if record.usd is None else f"${record.usd:.4f}"
    click.echo(f"{run}: {record.outcome}, {words.duration(record.seconds)}{interrupted}")
    click.echo(f"reckoned  {reckoned}")
    click.echo(f"billed    ${billed:.4f} for {key}={value}{_beside(billed, record.usd)}")
    for day in bill:
        if day.usd:
            click.echo(f"  {day.date}  ${day.usd:.4f}{'  estimated' if day.estimated else ''}")
    if not billed:
        click.echo("nothing is billed under this tag: it is not activated, nothing carries it, or the bill is to come")


def _beside(billed: float, reckoned: float | None) -> str:
    return f", {billed / reckoned - 1:+.1%} of what was reckoned" if billed and reckoned else ""


def _read(run: Path) -> _Run:
    path = run / "run.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Run)
    except FileNotFoundError:
        raise RequestError(
            f"{run} holds no finished run: there is no {path}; give the --output of sfplan train"
        ) from None
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError:
        raise RequestError(f"{path} is not what a run writes; give the --output of sfplan train") from None


def _tag(tag: str | None, run: Path) -> tuple[str, str]:
    try:
        from shallowflow.runtime.aws.bills import TAG
    except ImportError:
        raise RequestError("a bill needs the package boto3; install it with: pip install boto3") from None
    if tag is None:
        return TAG, run.resolve().name
    key, separator, value = tag.partition("=")
    if not (key and separator and value):
        raise RequestError(f"--tag is {tag!r}; give one such as {TAG}=my-run")
    return key, value


def _bill(key: str, value: str, started: datetime.datetime) -> tuple[Day, ...]:
    from shallowflow.runtime.aws.bills import billed

    return billed(key, value, started.astimezone(datetime.UTC).date(), datetime.datetime.now(datetime.UTC).date())
