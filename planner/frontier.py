"""What memory and quality buy: plans along both, none of which is better than another in everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from .bounds import Meta
from .plan import Bytes, Plan, Seconds, Usd
from .strategies import Configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One plan, traced whole.

    Attributes:
        usd: of the whole run on the cheapest instance, on demand; None without a price.
    """

    peak_process_bytes: Bytes
    step_seconds: Seconds
    tokens_per_second: Seconds
    hours: Seconds
    usd: Usd | None
    weight_error: Annotated[float, Meta(ge=0)]
    configuration: Configuration


def point(plan: Plan) -> FrontierPoint:
    """Where *plan* lies."""
    return FrontierPoint(
        peak_process_bytes=plan.prediction.peak_process_bytes,
        step_seconds=plan.prediction.step_seconds,
        tokens_per_second=plan.prediction.tokens_per_second,
        hours=plan.wall.total_seconds / 3600,
        usd=plan.offers[0].on_demand_usd if plan.offers else None,
        weight_error=plan.weight_error,
        configuration=plan.configuration,
    )


def frontier(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Those of *points* that no other beats in memory, time and weight error at once, the leanest first."""
    kept = [one for one in dict.fromkeys(points) if not any(_beats(other, one) for other in points)]
    return tuple(sorted(kept, key=lambda one: (one.peak_process_bytes, one.step_seconds)))


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    ours = (one.peak_process_bytes, one.step_seconds, one.weight_error)
    theirs = (other.peak_process_bytes, other.step_seconds, other.weight_error)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))
