"""Ways to run a work side by side: the cheapest, the fastest, and what limits leave, or which ones would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from . import words
from .bounds import Meta
from .outlook import Outlook
from .plan import Bytes, Plan, Seconds
from .remedies import Infeasible
from .strategies import Positive

By = Literal["money", "time"]
Ratio = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the best plan for so many GPUs of one kind is."""

    gpu: str
    num_gpus: Positive
    what_if: str
    step_seconds: Seconds
    tokens_per_second: Ratio
    peak_process_bytes: Bytes
    weight_error: Ratio
    layers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """GPUs for which there is no plan, and why, in one line."""

    gpu: str
    num_gpus: Positive
    what_if: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every way to run a work that was asked about.

    Attributes:
        outlooks: within the limits, best first.
        num_ways: how many there are without the limits.
        unplanned: GPUs for which there is no plan.
        notes: what the numbers rest on: what is assumed, and each price's date and source.
    """

    model_name: str
    total_tokens: Positive
    by: By
    outlooks: tuple[Outlook, ...]
    num_ways: int
    plans: tuple[Planned, ...]
    unplanned: tuple[Unplanned, ...]
    notes: tuple[str, ...]

    def over_cheapest(self, outlook: Outlook) -> float:
        """The share by which *outlook* is dearer than the cheapest."""
        return _over(outlook.usd, min(other.usd for other in self.outlooks))

    def over_fastest(self, outlook: Outlook) -> float:
        """The share by which *outlook* takes longer than the fastest."""
        return _over(outlook.hours, min(other.hours for other in self.outlooks))

    def best_regions(self) -> tuple[Outlook, ...]:
        """Of every instance, market, number of GPUs and change, the best region alone."""
        found: dict[tuple[str, ...], Outlook] = {}
        for outlook in self.outlooks:
            found.setdefault((outlook.instance, outlook.market, str(outlook.num_gpus), outlook.what_if), outlook)
        return tuple(found.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every outlook with how far it is from the cheapest and from the fastest."""
        return {
            "model_name": self.model_name,
            "total_tokens": self.total_tokens,
            "by": self.by,
            "num_ways": self.num_ways,
            "outlooks": [self.row(outlook) for outlook in self.outlooks],
            "plans": [asdict(planned) for planned in self.plans],
            "unplanned": [asdict(unplanned) for unplanned in self.unplanned],
            "notes": self.notes,
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: the best ways, as the command line shows them."""
        from . import notebook
        from .comparison_view import shown

        return notebook.html(shown(self, everything=False))

    def row(self, outlook: Outlook) -> dict[str, Any]:
        """All that is known of one way."""
        return {
            **asdict(outlook),
            "over_cheapest": self.over_cheapest(outlook),
            "over_fastest": self.over_fastest(outlook),
        }


class OutOfReach(Infeasible):
    """No way to run the work keeps the limits; its options were computed to leave one.

    Attributes:
        options: each with what it leaves.
    """

    def __init__(self, reason: str, options: Sequence[tuple[str, Outlook]] = ()) -> None:
        self.options = tuple(options)
        super().__init__(0, 0, (), reason)

    def as_dict(self) -> dict[str, Any]:
        """The refusal for JSON."""
        remedies = [{"option": option, "outlook": asdict(outlook)} for option, outlook in self.options]
        return {"error": "out of reach", "reason": self.reason, "remedies": remedies}

    def __str__(self) -> str:
        if not self.options:
            return self.reason
        width = max(len(option) for option, _ in self.options)
        lines = [f"  {option:<{width}}   ({_told(outlook)})" for option, outlook in self.options]
        return "\n".join([self.reason, "This would do:", *lines])


def planned(plan: Plan, what_if: str = "") -> Planned:
    """What is told of *plan* beside others."""
    return Planned(
        gpu=plan.gpu,
        num_gpus=plan.configuration.num_gpus,
        what_if=what_if,
        step_seconds=plan.prediction.step_seconds,
        tokens_per_second=plan.prediction.tokens_per_second,
        peak_process_bytes=plan.prediction.peak_process_bytes,
        weight_error=plan.weight_error,
        layers=words.summary(plan.configuration),
    )


def ordered(outlooks: Iterable[Outlook], by: By) -> tuple[Outlook, ...]:
    """*outlooks* by money, or by time; the other decides between equals."""

    def place(outlook: Outlook) -> tuple[float, float, str, str, str]:
        first, then = (outlook.usd, outlook.hours) if by == "money" else (outlook.hours, outlook.usd)
        return first, then, outlook.instance, outlook.region, outlook.what_if

    return tuple(sorted(outlooks, key=place))


def within(
    outlooks: Sequence[Outlook], deadline_hours: float | None = None, budget_usd: float | None = None
) -> tuple[Outlook, ...]:
    """Those of *outlooks* of which nine of ten runs end by the deadline, and nine of ten within the budget.

    Raises:
        OutOfReach: there are none; with the least deadline and the least budget that leave one.
    """
    hours, usd = (math.inf if limit is None else limit for limit in (deadline_hours, budget_usd))
    in_time = [outlook for outlook in outlooks if outlook.nine_of_ten_hours <= hours]
    in_budget = [outlook for outlook in outlooks if outlook.nine_of_ten_usd <= usd]
    both = tuple(outlook for outlook in in_time if outlook.nine_of_ten_usd <= usd)
    if both or not outlooks:
        return both
    options: list[tuple[str, Outlook]] = []
    if deadline_hours is not None and in_budget:
        fastest = min(in_budget, key=lambda outlook: outlook.nine_of_ten_hours)
        options.append((f"--deadline-hours {_up(fastest.nine_of_ten_hours)}", fastest))
    if budget_usd is not None and in_time:
        cheapest = min(in_time, key=lambda outlook: outlook.nine_of_ten_usd)
        options.append((f"--budget-usd {_up(cheapest.nine_of_ten_usd)}", cheapest))
    if not options:
        cheapest = min(outlooks, key=lambda outlook: outlook.nine_of_ten_usd)
        option = f"--deadline-hours {_up(cheapest.nine_of_ten_hours)} --budget-usd {_up(cheapest.nine_of_ten_usd)}"
        options.append((option, cheapest))
    asked = [] if deadline_hours is None else [f"within {deadline_hours:g} hours"]
    asked += [] if budget_usd is None else [f"for ${budget_usd:,.2f}"]
    raise OutOfReach(f"none of {len(outlooks):,} ways ends {' and '.join(asked)} in nine of ten runs.", options)


def _over(amount: float, least: float) -> float:
    return amount / least - 1 if math.isfinite(amount) and least else math.inf


def _told(outlook: Outlook) -> str:
    gpus = f", {words.counted(outlook.num_gpus, 'GPU')}" if outlook.num_gpus > 1 else ""
    gpus += f" in {outlook.num_machines} instances" if outlook.num_machines > 1 else ""
    what_if = f", {outlook.what_if}" if outlook.what_if else ""
    money = f"{words.usd(outlook.nine_of_ten_usd)} and {outlook.nine_of_ten_hours:.2f} h in nine of ten runs"
    return f"{outlook.instance} {outlook.market} in {outlook.region}{gpus}{what_if}: {money}"


def _up(number: float) -> str:
    """Two digits, never less than *number*."""
    return f"{math.ceil(number * 100) / 100:g}" if number < 1e4 else f"{math.ceil(number)}"
