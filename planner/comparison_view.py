"""What is shown of a comparison: lines on a terminal of 80 columns, and the rows of a page's table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import words
from .comparison import By, Comparison, Planned, ordered
from .outlook import Outlook

FEW = 8
"""Ways that are shown where not all are asked for."""
MANY = 8.995
NEVER = "never"
"""What a run comes to that interruptions keep from ending."""
MARKETS = {"on demand": "demand", "spot": "spot"}
HEADS = ("instance", "region", "market", "hours", "9 in 10", "dollars", "9 in 10", "stops")
WIDTHS = (-13, -14, -6, 7, 7, 9, 9, 5)
"""Of the columns; those that are negative are set to the left."""


def shown(comparison: Comparison, *, everything: bool) -> RenderableType:
    """The best ways, two lines each, the plans that they are for, and what the numbers rest on."""
    best = comparison.outlooks if everything else few(comparison)
    lines: list[RenderableType] = [Text(title(comparison), style="bold"), Text(kept(comparison, len(best))), Text()]
    lines.append(Text(_row(HEADS), style="bold"))
    for outlook in best:
        lines += [Text(_row(cells(outlook))), Text(f"  {', '.join(details(comparison, outlook))}", style="dim")]
    used = {(outlook.gpu, outlook.num_gpus, outlook.what_if) for outlook in best}
    lines += [Text(), _plans([p for p in comparison.plans if (p.gpu, p.num_gpus, p.what_if) in used])]
    lines += [Text(line) for line in unplanned(comparison)]
    return Group(*lines, Text(), *(Text(note, style="dim") for note in comparison.notes))


def few(comparison: Comparison) -> tuple[Outlook, ...]:
    """The best, each in its best region, and after them the best on demand, and those that no other beats."""
    best = comparison.best_regions()
    others = [next((outlook for outlook in best if outlook.market == market), None) for market in MARKETS]
    others += [ordered(comparison.outlooks, by)[0] for by in get_args(By)]
    return tuple(dict.fromkeys([*best[:FEW], *filter(None, others)]))


def title(comparison: Comparison) -> str:
    """What is compared."""
    by = {"money": "cheapest", "time": "fastest"}[comparison.by]
    return f"{comparison.model_name}, {comparison.total_tokens:,} tokens: the {by} first"


def kept(comparison: Comparison, num_shown: int) -> str:
    """How many ways there are, and how many of them are shown."""
    left = len(comparison.outlooks)
    limited = f", {left:,} within the limits" if left < comparison.num_ways else ""
    rest = "" if num_shown == left else f"; {num_shown} shown, in their best regions (--all: all of them)"
    return f"{words.counted(comparison.num_ways, 'way')}{limited}{rest}"


def cells(outlook: Outlook) -> tuple[str, ...]:
    """What stands under HEADS."""
    return (
        outlook.instance,
        outlook.region,
        MARKETS[outlook.market],
        *(f"{hours:.2f}" if math.isfinite(hours) else NEVER for hours in (outlook.hours, outlook.nine_of_ten_hours)),
        *(words.usd(usd) if math.isfinite(usd) else NEVER for usd in (outlook.usd, outlook.nine_of_ten_usd)),
        f"{outlook.interruptions:.2f}" if outlook.market == "spot" and math.isfinite(outlook.interruptions) else "-",
    )


def details(comparison: Comparison, outlook: Outlook) -> list[str]:
    """What else is told of one way."""
    found = [hardware(outlook), f"{tokens(outlook.tokens_per_usd)} tokens/$"]
    found += [f"{further(share)} {of}" for share, of in distances(comparison, outlook)]
    if outlook.market == "spot":
        every = outlook.interval_seconds
        found.append("no checkpoints" if every is None else f"a checkpoint every {words.duration(every)}")
    found += [] if outlook.disk_is_priced else ["disk unpriced"]
    return [*found, *([outlook.what_if] if outlook.what_if else [])]


def hardware(outlook: Outlook) -> str:
    """``4 x T4``, or ``4 x T4 in 2 instances``."""
    machines = f" in {outlook.num_machines} instances" if outlook.num_machines > 1 else ""
    return f"{gpus(outlook.num_gpus, outlook.gpu)}{machines}"


def distances(comparison: Comparison, outlook: Outlook) -> tuple[tuple[float, str], ...]:
    """By how much it is dearer than the cheapest, and slower than the fastest."""
    return (comparison.over_cheapest(outlook), "dollars"), (comparison.over_fastest(outlook), "hours")


def further(share: float) -> str:
    """``+12%``, or ``34x`` where that is many times as much."""
    if not math.isfinite(share):
        return NEVER
    return f"{share:+.0%}" if share < MANY else f"{share + 1:.0f}x"


def unplanned(comparison: Comparison) -> list[str]:
    """A line for GPUs without a plan."""
    return [
        f"{gpus(u.num_gpus, u.gpu)}{f', {u.what_if}' if u.what_if else ''}: {u.reason}" for u in comparison.unplanned
    ]


def gpus(number: int, name: str) -> str:
    """``4 x T4``."""
    return f"{number} x {name.upper()}"


def tokens(number: float) -> str:
    """Thousands or millions of tokens, in three digits."""
    scale, unit = (1e6, "M") if number >= 1e6 else (1e3, "k")
    return f"{number / scale:.3g}{unit}"


def plan_cells(plan: Planned) -> tuple[str, ...]:
    """What a table of plans says of *plan*."""
    return (
        gpus(plan.num_gpus, plan.gpu),
        plan.what_if,
        words.gib(plan.peak_process_bytes),
        f"{plan.step_seconds:.2f}",
        f"{plan.tokens_per_second:,.0f}",
        plan.layers,
    )


PLAN_HEADS = ("plan for", "", "memory", "s/step", "tokens/s", "layers")


def _plans(plans: Sequence[Planned]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, head in enumerate(PLAN_HEADS):
        table.add_column(head, justify="right" if 2 <= number <= 4 else "left", no_wrap=number != 5)
    for plan in plans:
        table.add_row(*plan_cells(plan))
    return table


def _row(values: Sequence[str]) -> str:
    parts = [f"{v:<{-w}}" if w < 0 else f"{v:>{w}}" for v, w in zip(values, WIDTHS, strict=True)]
    return " ".join(parts)
