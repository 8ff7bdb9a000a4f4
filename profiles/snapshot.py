"""Prices that a user took from AWS, each with the day on which it was taken; they go before those that are shipped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .check import BadFacts
from .specs import InstanceSpec, Price, StoragePrices, StorageSpec

MOST = 1e18
MAY_BE_ZERO = ("nvme_bytes",)
INTERRUPTIONS = "; interruptions: "
"""Before what tells, in a price's source, where its interruptions are known from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenPrice:
    """What an instance cost in one region; *spot_usd_per_hour* is None where none was offered."""

    instance: str
    region: str
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float | None
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenStorage:
    """What one kind of storage cost in one region, per GB of 2**30 bytes."""

    kind: Literal["volume", "bucket"]
    region: str
    usd_per_gb_month: float
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenShape:
    """What an instance type holds, in the units of InstanceSpec."""

    instance: str
    num_vcpus: int
    ram_bytes: int
    nvme_bytes: int
    network_bits_per_second: float
    disk_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that was taken."""

    format: Literal[1] = 1
    prices: tuple[TakenPrice, ...] = ()
    storage: tuple[TakenStorage, ...] = ()
    shapes: tuple[TakenShape, ...] = ()


def path() -> Path:
    """Where it lies: under ``SHALLOWFLOW_DATA``, or in the user's data folder."""
    named = os.environ.get("SHALLOWFLOW_DATA")
    if not named:
        import platformdirs

        named = platformdirs.user_data_dir("shallowflow")
    return Path(named) / "prices.json"


def stamp() -> tuple[str, int, int] | None:
    """What changes whenever the file does; None where there is none."""
    file = path()
    try:
        found = file.stat()
    except OSError:
        return None
    return str(file), found.st_mtime_ns, found.st_size


def read() -> Snapshot:
    """What was taken; empty where nothing was.

    Raises:
        BadFacts: the file is broken.
    """
    file = path()
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return Snapshot()
    except OSError as error:
        raise BadFacts(f"{file}: cannot be read: {error.strerror}; sfplan prices --reset removes it") from error
    import msgspec  # which a machine that measures and has taken no prices may lack

    try:
        found = msgspec.json.decode(content, type=Snapshot)
        rows: list[TakenPrice | TakenStorage | TakenShape] = [*found.prices, *found.storage, *found.shapes]
        for row in rows:
            _check(row)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFacts(f"{file} is not as it was written: {error}; sfplan prices --reset removes it") from error
    return found


def _check(row: TakenPrice | TakenStorage | TakenShape) -> None:
    """ValueError where a number is out of any range, or a text is none."""
    for name, value in asdict(row).items():
        if isinstance(value, str):
            right = bool(value) and value.isprintable()
        else:
            right = value is None or 0 < value < MOST or (value == 0 and name in MAY_BE_ZERO)
        if not right:
            raise ValueError(f"{name} is {value!r}")


def to_json(taken: Snapshot) -> str:
    """The file of *taken*."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(taken), indent=1).decode() + "\n"


def merged(old: Snapshot, new: Snapshot) -> Snapshot:
    """*new*, and of *old* what *new* says nothing of."""
    return Snapshot(
        prices=_newest([*old.prices, *new.prices], "instance", "region"),
        storage=_newest([*old.storage, *new.storage], "kind", "region"),
        shapes=_newest([*old.shapes, *new.shapes], "instance"),
    )


def _newest(rows: Iterable[Any], *keys: str) -> tuple[Any, ...]:
    found = {tuple(getattr(row, key) for key in keys): row for row in rows}
    return tuple(found[key] for key in sorted(found))


def instances_over(shipped: Sequence[InstanceSpec], taken: Snapshot) -> tuple[InstanceSpec, ...]:
    """The *shipped* instances with the shapes and prices that were taken, and those that were not as they are."""
    shapes = {shape.instance: shape for shape in taken.shapes}
    return tuple(_over(instance, shapes.get(instance.name), taken.prices) for instance in shipped)


def _over(instance: InstanceSpec, shape: TakenShape | None, taken: Sequence[TakenPrice]) -> InstanceSpec:
    prices = {price.region: price for price in instance.prices}
    for row in taken:
        if row.instance == instance.name:
            known = prices.get(row.region)
            bucket = None if known is None else known.interruption_bucket
            told = "" if known is None or bucket is None else known.source.partition(INTERRUPTIONS)[2] or known.source
            prices[row.region] = Price(
                region=row.region,
                on_demand_usd_per_hour=row.on_demand_usd_per_hour,
                spot_usd_per_hour=row.spot_usd_per_hour,
                interruption_bucket=bucket,
                date=row.date,
                source=row.source + (f"{INTERRUPTIONS}{told}" if told else ""),
            )
    held: dict[str, Any] = {}
    if shape is not None:
        names = ("num_vcpus", "ram_bytes", "nvme_bytes", "network_bits_per_second", "disk_bytes_per_second")
        held = {name: getattr(shape, name) for name in names}
    return replace(instance, prices=tuple(prices.values()), **held)


def storage_over(shipped: StorageSpec, taken: Snapshot) -> StorageSpec:
    """The *shipped* prices of storage with those that were taken."""
    volume = _stored_over(shipped.volume, [row for row in taken.storage if row.kind == "volume"])
    bucket = _stored_over(shipped.bucket, [row for row in taken.storage if row.kind == "bucket"])
    return replace(shipped, volume=volume, bucket=bucket)


def _stored_over(shipped: StoragePrices, rows: Sequence[TakenStorage]) -> StoragePrices:
    if not rows:
        return shipped
    own = {row.region: row.usd_per_gb_month for row in rows}
    left = sorted(set(shipped.usd_per_gb_month) - set(own))
    dates, sources = (dict.fromkeys(texts) for texts in ([r.date for r in rows], [r.source for r in rows]))
    beside = (f" (in {', '.join(left)}: {shipped.date})", f" ({shipped.source})") if left else ("", "")
    return replace(
        shipped,
        usd_per_gb_month={**shipped.usd_per_gb_month, **own},
        date=", ".join(dates) + beside[0],
        source=", ".join(sources) + beside[1],
    )
