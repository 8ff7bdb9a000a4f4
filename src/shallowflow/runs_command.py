"""``sfplan runs`` and ``sfplan stop``: the instances that were launched, what they have cost, and their end."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from shallowflow.amazon import echo_json, masked, needs_boto3
from shallowflow.planner import words
from shallowflow.planner.outlook import Market
from shallowflow.profiles.load import load_instances
from shallowflow.profiles.specs import Price
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.aws.instances import Rented
    from shallowflow.runtime.storage import Latest

NUM_THREADS = 8
"""That ask regions at the same time."""
HEADS = ("run", "state", "age", "dollars", "in the store")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An instance, what it has cost so far, and what is in its run's store.

    Attributes:
        run: whose it is.
        instance: its type.
        state: EC2's word, or ``interrupted`` where AWS took it.
        hours: since it was launched, until now or until it ended; None where nobody says when that was.
        store: where the run keeps everything.
        usd: by a price of *price_date*, without its disk; None where no price is known.
        num_steps: in the newest checkpoint; None where there is none, or nobody says.
        has_results: whether results are stored.
        trouble: why the store says nothing.
    """

    run: str
    instance_id: str
    instance: str
    region: str
    market: Market
    state: str
    launched: datetime.datetime
    hours: float | None
    store: str | None
    usd: float | None
    price_date: str | None
    num_steps: int | None
    has_results: bool
    trouble: str | None

    def cells(self) -> tuple[str, ...]:
        """What stands under HEADS."""
        stored = "nothing yet" if self.num_steps is None else f"step {self.num_steps:,}"
        return (
            self.run,
            self.state,
            "-" if self.hours is None else words.duration(self.hours * 3600),
            words.usd(self.usd),
            self.trouble or stored + (", results" if self.has_results else ""),
        )

    def where(self) -> str:
        """Which instance it is."""
        return f"  {self.instance_id}, {self.instance} in {self.region}, {self.market}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An instance that was ended."""

    instance_id: str
    region: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A run whose instances were ended.

    Attributes:
        run: its name.
        stopped: the instances.
    """

    run: str
    stopped: tuple[Ended, ...]


_region_option: Callable[..., Any] = click.option(
    "--region", "regions", multiple=True, metavar="NAME", help="Only these.  [default: all with known prices]"
)


@click.command("runs")
@_region_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def runs_command(regions: tuple[str, ...], as_json: bool) -> None:
    """List the instances that were launched: state, age, dollars so far, and the newest checkpoint in the store.

    Dollars are by the prices that sfplan prices shows. Those that ended stay for about an hour.

    \b
    sfplan runs
    sfplan runs --region us-east-1 --json
    """
    needs_boto3("sfplan runs")
    now = datetime.datetime.now(datetime.UTC)
    found = _told(_rented(regions, now))
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo(f"no instance was launched in {words.counted(len(_regions(regions)), 'region')}")
        return
    rows = [HEADS, *(one.cells() for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    below = ["", *(one.where() for one in found)]
    click.echo(masked("\n".join(line for pair in zip(lines, below, strict=True) for line in pair if line)))
    dates = sorted({one.price_date for one in found if one.price_date is not None})
    if dates:
        click.echo(f"dollars by prices of: {'; '.join(dates)}; without the disks")


@click.command("stop")
@click.argument("run")
@_region_option
@click.option("--yes", is_flag=True, help="Stop it: without this nothing is.")
@click.option("--json", "as_json", is_flag=True, help="Print what was stopped as JSON.")
def stop_command(run: str, regions: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """End the instances of RUN, for good.

    Each shuts down in order, which asks the run to end: it finishes its micro-batch, saves and stores what it has
    learned, and has two minutes for that. The same sfplan launch with --resume goes on from there.

    \b
    sfplan stop my-run --yes
    """
    from shallowflow.terminal import status

    needs_boto3("sfplan stop")
    now = datetime.datetime.now(datetime.UTC)
    found = [one for one in _rented(regions, now) if one.run == run and one.is_alive]
    names = ", ".join(f"{one.instance_id} in {one.region}" for one in found)
    if not found:
        raise RequestError(f"run {run!r} has no instance; sfplan runs lists those there are")
    if not yes:
        raise RequestError(f"nothing was stopped: this ends {names}; --yes does it")
    from shallowflow.runtime.aws.clients import Live
    from shallowflow.runtime.aws.instances import terminate

    with status(f"stopping {run}"):
        for region in dict.fromkeys(one.region for one in found):
            terminate(Live(region), [one.instance_id for one in found if one.region == region])
    if as_json:
        ended = tuple(Ended(instance_id=one.instance_id, region=one.region) for one in found)
        echo_json(Stopped(run=run, stopped=ended))
        return
    click.echo(f"{run}: {names} saves, stores and ends, within about two minutes")


def _regions(given: tuple[str, ...]) -> list[str]:
    """Those *given*, or all of which a price is known."""
    return list(given) or sorted({price.region for instance in load_instances() for price in instance.prices})


def _rented(regions: tuple[str, ...], now: datetime.datetime) -> list[Rented]:
    """Every instance with the tag."""
    from shallowflow.runtime.aws.clients import Live
    from shallowflow.runtime.aws.instances import rented
    from shallowflow.terminal import status

    with status("asking AWS"), ThreadPoolExecutor(NUM_THREADS) as pool:
        first, *others = _regions(regions)
        lives = [Live(first)]
        lives += [lives[0].elsewhere(region) for region in others]
        for aws in lives:
            aws.client("ec2")  # made here, as threads may not make them at the same time
        return [one for several in pool.map(lambda aws: rented(aws, now), lives) for one in several]


def _told(found: list[Rented]) -> list[Told]:
    """What is known of each."""
    stores = {one.store: _stored(one.store) for one in found}
    prices = {(i.name, price.region): price for i in load_instances() for price in i.prices}
    told = []
    for one in found:
        price = prices.get((one.instance, one.region))
        latest, trouble = stores[one.store]
        steps = latest.checkpoints[0].num_steps if latest is not None and latest.checkpoints else None
        told.append(
            Told(
                **asdict(one),
                usd=_usd(one, price),
                price_date=None if price is None else price.date,
                num_steps=steps,
                has_results=latest is not None and latest.results is not None,
                trouble=trouble,
            )
        )
    return told


def _usd(one: Rented, price: Price | None) -> float | None:
    """What it has cost, by *price*, where that is known; AWS's own first hour for nothing is left out."""
    rate = None
    if price is not None:
        rate = price.spot_usd_per_hour if one.market == "spot" else price.on_demand_usd_per_hour
    return None if rate is None or one.hours is None else rate * one.hours


def _stored(store: str | None) -> tuple[Latest | None, str | None]:
    """What a store holds, and why it does not say."""
    from shallowflow.runtime.aws.s3 import S3Objects, place
    from shallowflow.runtime.storage import StoreError, Vault

    if store is None:
        return None, "no store"
    try:
        return Vault.look(S3Objects(place(store))).latest, None
    except StoreError as error:
        return None, str(error)
