"""How often a spot instance is interrupted, from what is known of it: a provider's bucket, a history, or a guess.

Interruptions are taken to be as likely at any moment that an instance runs as at any other.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Case = Literal["low", "middle", "high"]

HOURS_PER_MONTH = 365.25 * 24 / 12
MOST_PER_DAY = 240
"""One in six minutes; under more hardly anything would end."""
WORST_PER_HOUR = 74 / 135.7
"""Interruptions per hour of an instance in a published trace of g4dn spot nodes (AWS, 2020, 10.8 hours): 74 nodes lost
in 135.7 hours of nodes. The upper end of the bucket ``>20%``, which has none of its own."""

_OPEN = re.compile(r"\s*([<>])\s*(\d+(?:\.\d+)?)\s*%\s*")
_CLOSED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*%\s*")
_MILLISECONDS_PER_HOUR = 3.6e6
_TAIL = 0.1
"""Of ten such histories, one would have shown fewer interruptions at the high rate, one more at the low."""


class BadHistory(ValueError):
    """A history that tells no rate: one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazard:
    """Interruptions per hour that an instance runs, and where they are known from."""

    low: float
    middle: float
    high: float
    source: str

    def per_hour(self, case: Case) -> float:
        """The rate of one case."""
        return {"low": self.low, "middle": self.middle, "high": self.high}[case]


def of_own(per_day: float) -> Hazard:
    """The user's own figure, in interruptions per day that an instance runs."""
    rate = per_day / 24
    return Hazard(low=rate, middle=rate, high=rate, source=f"{per_day:g} interruptions per day, as asked")


def of_bucket(bucket: str, source: str) -> Hazard | None:
    """What a bucket of AWS's Spot Advisor says; None where it is no bucket.

    AWS defines it as the rate at which spot capacity was reclaimed in the trailing month. It is read as the share of
    instances lost by those that would run for the whole month, so that a share s means -ln(1 - s) interruptions per
    month. An instance that ran for less time was at risk for less: where most did, the rate is higher than this. The
    middle of a bucket is that of its shares; ``>20%`` ends at WORST_PER_HOUR, and its middle is the geometric one,
    because its ends lie orders of magnitude apart.
    """
    closed, opened = _CLOSED.fullmatch(bucket), _OPEN.fullmatch(bucket)
    told = f"Spot Advisor {bucket} a month ({source})"
    if closed is not None:
        least, most = (float(number) / 100 for number in closed.groups())
    elif opened is not None and opened[1] == "<":
        least, most = 0.0, float(opened[2]) / 100
    elif opened is not None and float(opened[2]) < 100:
        rate = _per_hour(float(opened[2]) / 100)
        return Hazard(low=rate, middle=math.sqrt(rate * WORST_PER_HOUR), high=WORST_PER_HOUR, source=told)
    else:
        return None
    if not least < most < 1:
        return None
    return Hazard(low=_per_hour(least), middle=_per_hour((least + most) / 2), high=_per_hour(most), source=told)


def of_history(lines: Iterable[str], name: str) -> Hazard:
    """The rate at which nodes left in a history of rows ``milliseconds,add|remove,node``, called *name*.

    The middle is the likeliest rate, removals over the hours of all nodes, those that were there at the end included;
    low and high are the rates under which one of ten such histories would show more, or fewer (Garwood, 1936). Every
    removal is taken for an interruption.

    Raises:
        BadHistory: rows are not of that form or order, or none was removed.
    """
    from scipy.special import gammaincinv

    removed, hours = _exposure(lines, name)
    if removed == 0 or hours <= 0:
        raise BadHistory(f"{name}: no node was removed in {hours:.1f} hours of nodes, which tells no rate; give one")
    return Hazard(
        low=float(gammaincinv(removed, _TAIL)) / hours,
        middle=removed / hours,
        high=float(gammaincinv(removed + 1, 1 - _TAIL)) / hours,
        source=f"{name}: {removed} nodes removed in {hours:.1f} hours of nodes",
    )


def _exposure(lines: Iterable[str], name: str) -> tuple[int, float]:
    """How many nodes were removed, and how many hours all nodes were there together."""
    since: dict[str, float] = {}
    removed, milliseconds, now = 0, 0.0, -math.inf
    for number, row in enumerate(csv.reader(lines), 1):
        try:
            at, event, node = row
            then, now = now, float(at)
            if not (math.isfinite(now) and now >= then):
                raise ValueError
            if event == "add" and node not in since:
                since[node] = now
            elif event == "remove":
                milliseconds += now - since.pop(node)
                removed += 1
            else:
                raise ValueError
        except (ValueError, KeyError):
            raise BadHistory(
                f"{name}, line {number}: {','.join(row)!r} does not follow; rows are milliseconds,add|remove,node in "
                "order of time, each node added before it is removed"
            ) from None
    milliseconds += sum(now - start for start in since.values())
    return removed, milliseconds / _MILLISECONDS_PER_HOUR


def _per_hour(share: float) -> float:
    """The rate at which so large a share is lost within a month."""
    return -math.log1p(-share) / HOURS_PER_MONTH
