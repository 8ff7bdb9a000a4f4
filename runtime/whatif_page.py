"""Every way to run a work as one self-contained HTML page."""

from __future__ import annotations

from typing import get_args

import plotly.graph_objects as go

from shallowflow.planner import comparison_view as view
from shallowflow.planner import words
from shallowflow.planner.comparison import Comparison
from shallowflow.planner.outlook import Market, Outlook

from .report import chart, template

HEADS = ("instance", "region", "market", "GPUs", "hours", "9 in 10", "dollars", "9 in 10", "low", "high")
MORE_HEADS = ("stops", "tokens/$", "over the cheapest", "over the fastest", "checkpoint", "what if")


def html(comparison: Comparison) -> str:
    """The page: dollars over hours, every way, the plans, and what the numbers rest on; the same for the same ways."""
    return template("whatif.html").render(
        title=view.title(comparison),
        kept=view.kept(comparison, len(comparison.outlooks)),
        chart=chart(_figure(comparison), first=True),
        heads=(*HEADS, *MORE_HEADS),
        rows=[_row(comparison, outlook) for outlook in comparison.outlooks],
        plan_heads=view.PLAN_HEADS,
        plans=[view.plan_cells(plan) for plan in comparison.plans],
        unplanned=view.unplanned(comparison),
        notes=comparison.notes,
    )


def _figure(comparison: Comparison) -> go.Figure:
    """Dollars over hours, on demand and spot."""
    figure = go.Figure()
    for market in get_args(Market):
        outlooks = [outlook for outlook in comparison.outlooks if outlook.market == market]
        figure.add_scatter(
            x=[outlook.hours for outlook in outlooks],
            y=[outlook.usd for outlook in outlooks],
            mode="markers",
            name=market,
            marker={"size": 7},
            customdata=[_told(comparison, outlook) for outlook in outlooks],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(
        title="dollars over hours",
        xaxis={"title": "hours", "type": "log", "ticksuffix": " h"},
        yaxis={"title": "dollars", "type": "log", "tickprefix": "$"},
    )
    return figure


def _row(comparison: Comparison, outlook: Outlook) -> tuple[str, ...]:
    instance, region, _, *numbers, stops = view.cells(outlook)
    low, high = (f"${usd:,.2f}" for usd in (outlook.low_usd, outlook.high_usd))
    seconds = outlook.interval_seconds
    return (
        *(instance, region, outlook.market, view.hardware(outlook), *numbers, low, high, stops),
        view.tokens(outlook.tokens_per_usd),
        *(view.further(share) for share, _ in view.distances(comparison, outlook)),
        "-" if seconds is None else words.duration(seconds),
        outlook.what_if,
    )


def _told(comparison: Comparison, outlook: Outlook) -> str:
    head = f"{outlook.instance} {outlook.market} in {outlook.region}"
    hours = f"{outlook.hours:.2f} h, {outlook.nine_of_ten_hours:.2f} h in nine of ten runs"
    usd = f"${outlook.usd:,.2f}, ${outlook.nine_of_ten_usd:,.2f} in nine of ten runs"
    return "<br>".join([head, hours, usd, *view.details(comparison, outlook)])
