"""``sfplan prices``: what is taken for the price of every instance, from when and where; and today's from AWS."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

import click

from shallowflow.amazon import needs_boto3
from shallowflow.planner import words
from shallowflow.printing import echo_json
from shallowflow.profiles import snapshot
from shallowflow.profiles.load import load_instances, load_storage, shipped_instances
from shallowflow.profiles.snapshot import Snapshot
from shallowflow.profiles.specs import StoragePrices
from shallowflow.runtime.files import write_text
from shallowflow.session import RequestError

Stored = Literal["volume", "bucket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRow:
    """What an instance costs in a region.

    Attributes:
        spot_usd_per_hour: the median over the region's zones; None where none is offered.
        interruption_bucket: the Spot Advisor's monthly frequency, such as ``5-10%``.
        date, source: of the price.
        shipped: whether it came with this program; if not, AWS was asked.
    """

    instance: str
    gpu: str
    num_gpus: int
    region: str
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float | None
    interruption_bucket: str | None
    date: str
    source: str
    shipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRow:
    """What storage costs in a region.

    Attributes:
        kind: an instance's own disk, or the bucket that keeps what outlives it.
        date, source: of the price.
    """

    kind: Stored
    name: str
    region: str
    usd_per_gb_month: float
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceList:
    """All prices that are in use.

    Attributes:
        file: that keeps what AWS said; there may be none yet.
        prices: of instances.
        storage: of disks and buckets.
    """

    file: str
    prices: tuple[PriceRow, ...]
    storage: tuple[StorageRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PricesReset:
    """That the shipped prices hold again.

    Attributes:
        file: that kept what AWS had said.
        removed: whether there was one.
    """

    file: str
    removed: bool


@click.command("prices")
@click.option("--update", is_flag=True, help="Ask AWS, and keep what it says for every plan from then on.")
@click.option("--reset", is_flag=True, help="Forget what AWS said: the shipped prices hold again.")
@click.option("--region", "regions", multiple=True, metavar="NAME", help="Only these.  [default: all that are known]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def prices_command(update: bool, reset: bool, regions: tuple[str, ...], as_json: bool) -> None:
    """Show the prices that plans and comparisons use, each with its date and source.

    --update takes today's from AWS: on demand, gp3 and S3 from its price list, spot from EC2's history, and with them
    what instances hold. They are kept in the user's data folder.

    \b
    sfplan prices --region us-east-1
    sfplan prices --update --region us-east-1 --region eu-west-1
    sfplan prices --reset
    """
    if update and reset:
        raise RequestError("--update and --reset contradict each other; give one of them")
    if reset:
        _reset(as_json)
        return
    wanted = regions or tuple(sorted({p.region for i in load_instances() for p in i.prices}))
    if update:
        _update(wanted)
    rows = [row for row in _rows() if row.region in wanted]
    if not rows:
        raise RequestError(
            f"no price in {', '.join(regions)} is known; ask AWS with --update, or see sfplan prices for the regions"
        )
    stored = [row for row in _stored() if row.region in wanted]
    if as_json:
        echo_json(PriceList(file=str(snapshot.path()), prices=tuple(rows), storage=tuple(stored)))
        return
    _show(rows, stored)


def _reset(as_json: bool) -> None:
    file = snapshot.path()
    was_there = file.is_file() or file.is_symlink()
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{file} cannot be removed: {error.strerror}") from None
    if as_json:
        echo_json(PricesReset(file=str(file), removed=was_there))
        return
    click.echo("the shipped prices hold again" if was_there else "the shipped prices hold, as before")


def _update(regions: tuple[str, ...]) -> None:
    """Take today's prices in the *regions* and keep them, and of what was taken before all else."""
    from shallowflow.terminal import status

    needs_boto3("sfplan prices --update")
    from shallowflow.runtime.aws.price_list import take

    before = snapshot.read()
    names = [instance.name for instance in shipped_instances()]
    with status("asking AWS") as tell:
        taken = take(names, regions, datetime.datetime.now(datetime.UTC).date(), tell)
    if not taken.prices:
        raise RequestError(f"AWS lists no price in {', '.join(regions)}; nothing was changed")
    _keep(snapshot.merged(before, taken))


def _keep(taken: Snapshot) -> None:
    file = snapshot.path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, snapshot.to_json(taken))
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}") from None


def _rows() -> list[PriceRow]:
    """Every price that is in use."""
    own = {(row.instance, row.region) for row in snapshot.read().prices}
    return [
        PriceRow(
            instance=instance.name,
            gpu=instance.gpu,
            num_gpus=instance.num_gpus,
            region=price.region,
            on_demand_usd_per_hour=price.on_demand_usd_per_hour,
            spot_usd_per_hour=price.spot_usd_per_hour,
            interruption_bucket=price.interruption_bucket,
            date=price.date,
            source=price.source,
            shipped=(instance.name, price.region) not in own,
        )
        for instance in load_instances()
        for price in instance.prices
    ]


def _stored() -> list[StorageRow]:
    """Every price of storage that is in use."""
    storage = load_storage()
    kinds: dict[Stored, StoragePrices] = {"volume": storage.volume, "bucket": storage.bucket}
    return [
        StorageRow(
            kind=kind, name=prices.name, region=region, usd_per_gb_month=usd, date=prices.date, source=prices.source
        )
        for kind, prices in kinds.items()
        for region, usd in prices.usd_per_gb_month.items()
    ]


def _show(rows: list[PriceRow], stored: list[StorageRow]) -> None:
    from rich.table import Table

    from shallowflow.terminal import show

    marks: dict[tuple[str, str], int] = {}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("instance", "region"):
        table.add_column(head, no_wrap=True)
    for head in ("on demand", "spot", "interrupted", "from"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        mark = marks.setdefault((row.date, row.source), len(marks) + 1)
        spot = row.spot_usd_per_hour
        table.add_row(
            row.instance,
            row.region,
            f"${row.on_demand_usd_per_hour:.4f}",
            "-" if spot is None else f"${spot:.4f}",
            row.interruption_bucket or "-",
            f"[{mark}]",
        )
    show(table)
    click.echo("dollars an hour; interrupted: the share of spot instances in a month")
    for (date, source), mark in marks.items():
        click.echo(f"[{mark}] {date}; {source}")
    for name in dict.fromkeys(row.name for row in stored):
        same = [row for row in stored if row.name == name]
        told = ", ".join(f"{row.region} {row.usd_per_gb_month:g}" for row in same)
        click.echo(f"{name}, dollars per GB and month: {told}")
        click.echo(f"  {same[0].date}; {same[0].source}")
    click.echo(f"today's prices: sfplan prices --update; {words.counted(len(rows), 'price')} shown")
