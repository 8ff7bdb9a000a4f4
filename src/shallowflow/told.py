"""What commands print of comparisons and refusals: their types, with what is added when they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shallowflow.planner.comparison import Comparison, Ratio
from shallowflow.planner.outlook import Outlook
from shallowflow.planner.remedies import Remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedOutlook(Outlook):
    """One way to run a plan, what it comes to, and how far that is from the best.

    Attributes:
        over_cheapest: the share by which it is dearer than the cheapest.
        over_fastest: the share by which it takes longer than the fastest.
    """

    over_cheapest: Ratio
    over_fastest: Ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedComparison(Comparison):
    """Every way to run a work that was asked about, as ``sfplan whatif`` prints them."""

    outlooks: tuple[RankedOutlook, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlan:
    """No configuration fits.

    Attributes:
        reason: ``memory``, or what else it is that does not fit, in words.
        smallest_bytes: the lowest process peak among all configurations, headroom included.
        memory_bytes: the device's.
        remedies: changes to the request that were computed to fit.
    """

    error: Literal["infeasible"]
    reason: str
    smallest_bytes: int
    memory_bytes: int
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachable:
    """Limits that would leave a way.

    Attributes:
        option: the limits, as options of the command line.
        outlook: the way.
    """

    option: str
    outlook: Outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWay:
    """No way to run the work keeps the limits.

    Attributes:
        reason: in words.
        remedies: limits that were computed to leave one.
    """

    error: Literal["out of reach"]
    reason: str
    remedies: tuple[Reachable, ...]
