"""A plan and its run as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io

from shallowflow.planner import render
from shallowflow.planner.plan import Plan

from .record import Comparison, RunRecord

INK = "#7a808a"
"""A grey that reads on light and dark pages alike."""


def html(plan: Plan, run: RunRecord) -> str:
    """The page: did it fit and learn, predicted beside measured, loss, time, memory by category."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shallowflow.runtime", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = [_memory(plan), _loss(run), _seconds(plan, run)]
    charts = [_chart(figure, first=index == 0) for index, figure in enumerate(figures)]
    return environment.get_template("report.html").render(
        plan=plan,
        run=run,
        charts=charts,
        comparisons=[row(c) for c in run.comparisons],
        render=render,
        strategies=render.strategies(plan.configuration),
    )


def row(comparison: Comparison) -> tuple[str, str, str, str]:
    """(quantity, predicted, measured, error) as people read them."""
    shown = render.gib if comparison.unit == "bytes" else render.duration
    return (
        comparison.quantity,
        shown(comparison.predicted),
        shown(comparison.measured),
        "0.00%" if abs(comparison.error) < 0.00005 else f"{comparison.error:+.2%}",
    )


def _chart(figure: go.Figure, *, first: bool) -> str:
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "system-ui, sans-serif"},
        margin={"l": 50, "r": 10, "t": 50, "b": 50},
        autosize=True,
        height=340,
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False)
    page: str = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=first, config={"displayModeBar": False, "responsive": True}
    )
    return page


def _memory(plan: Plan) -> go.Figure:
    bars: list[Any] = [
        go.Bar(
            name=part.category,
            x=[part.num_bytes / 2**30],
            y=["predicted"],
            orientation="h",
            hovertemplate=f"{part.category}: %{{x:.3f}} GiB<extra></extra>",
        )
        for part in plan.memory
    ]
    figure = go.Figure(bars)
    figure.update_layout(
        barmode="stack",
        title="Memory at the peak, predicted",
        xaxis_title="GiB",
        yaxis_visible=False,
        legend={"orientation": "h", "y": -0.4, "traceorder": "normal"},
    )
    return figure


def _loss(run: RunRecord) -> go.Figure:
    line = go.Scatter(x=[s.index for s in run.steps], y=[s.loss for s in run.steps], mode="lines+markers", name="loss")
    figure = go.Figure(line)
    figure.update_layout(title="Training loss", xaxis_title="step", yaxis_title="cross-entropy per token")
    return figure


def _seconds(plan: Plan, run: RunRecord) -> go.Figure:
    counted = [s for s in run.steps if not s.memory_measured]
    figure = go.Figure(go.Bar(x=[s.index for s in counted], y=[s.seconds for s in counted], name="measured"))
    figure.add_hline(
        y=plan.prediction.step_seconds,
        line_dash="dash",
        line_color=INK,
        annotation_text="predicted",
        annotation_position="top left",
    )
    figure.update_layout(title="Seconds per step", xaxis_title="step", yaxis_title="s")
    return figure
