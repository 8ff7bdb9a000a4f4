"""Plans side by side as one self-contained HTML page with charts."""

from __future__ import annotations

import plotly.graph_objects as go

from shallowflow.planner.charts import LETTERS, Axis, Chart
from shallowflow.planner.frontier_view import View

from .report import INK, chart, template

SIDES = ("top right", "middle left", "bottom right")
"""Where letters stand beside their points, in turn, so that those of near points do not overlap."""


def html(view: View) -> str:
    """The page: a chart over each axis, and the table; the same text for the same plans."""
    charts = [
        {
            "name": f"{drawn.up.name} over {drawn.across.name}",
            "page": chart(_figure(drawn, view), first=number == 0, name=f"chart-{number}"),
        }
        for number, drawn in enumerate(view.charts)
    ]
    return template("frontier.html").render(view=view, charts=charts)


def _figure(drawn: Chart, view: View) -> go.Figure:
    """Points by their letters, above a line through those that are best so far."""
    line = [drawn.points[number] for number in drawn.steps()]
    widths, heights = zip(*drawn.points, strict=True)
    figure = go.Figure()
    figure.add_scatter(
        x=[x for x, _ in line],
        y=[y for _, y in line],
        mode="lines",
        line={"shape": "hv" if drawn.falls else "linear", "color": INK, "width": 1.5},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=widths,
        y=heights,
        mode="markers+text",
        text=list(LETTERS[: len(widths)]),
        textposition=[SIDES[number % len(SIDES)] for number in range(len(widths))],
        marker={"size": 9},
        customdata=[_told(view, row) for row in view.rows],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_layout(
        title=f"{drawn.up.name} over {drawn.across.name}",
        xaxis={"title": drawn.across.name, **_ticks(drawn.across)},
        yaxis={"title": drawn.up.name, **_ticks(drawn.up)},
        showlegend=False,
    )
    return figure


def _ticks(axis: Axis) -> dict[str, str]:
    """What stands before and after each number."""
    before, _, form = axis.form.partition("{")
    return {"tickprefix": before, "ticksuffix": form.partition("}")[2]}


def _told(view: View, row: tuple[str, ...]) -> str:
    return "<br>".join(f"{head} {cell}".strip() for head, cell in zip(view.heads, row, strict=True) if cell)
