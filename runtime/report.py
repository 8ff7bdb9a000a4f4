"""A plan and its run as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io

from shallowflow.planner import words
from shallowflow.planner.memory_record import MemoryRecord, Timeline
from shallowflow.planner.plan import Plan

from .fallback import told
from .record import Comparison, RunRecord

INK = "#7a808a"
"""A grey that reads on light and dark pages alike."""


ROWS_SHOWN = 40


def html(plan: Plan, run: RunRecord, timeline: Timeline | None = None) -> str:
    """The page: did it fit and learn, predicted beside measured, loss, time, memory by category and over the step."""
    figures = [memory_figure(plan), _loss(run), _seconds(plan, run)]
    figures += [timeline_figure(timeline, "The step's memory, predicted")] if timeline else []
    charts = [chart(figure, first=index == 0) for index, figure in enumerate(figures)]
    return template("report.html").render(
        plan=plan,
        run=run,
        charts=charts,
        comparisons=[row(c) for c in run.comparisons],
        words=words,
        strategies=words.strategies(run.configuration or plan.configuration),
        told=told,
    )


def memory_html(record: MemoryRecord, name: str) -> str:
    """A page on one simulated step: what it takes, when, and of what it consists at the peak."""
    assert record.timeline is not None
    peak = f"peak: {record.peak_phase} phase" + (f" of {record.peak_module}" if record.peak_module else "")
    return template("memory.html").render(
        record=record,
        name=name,
        chart=chart(timeline_figure(record.timeline, peak), first=True),
        answers=[
            ("resident before the step", record.resident_bytes),
            ("peak allocated", record.peak_allocated_bytes),
            ("peak reserved", record.peak_reserved_bytes),
            ("peak of the process", record.peak_process_bytes),
        ],
        rows_shown=ROWS_SHOWN,
        rest=sum(part.num_bytes for part in record.modules[ROWS_SHOWN:]),
        mib=lambda num_bytes: f"{num_bytes / 2**20:,.2f} MiB",
    )


def template(name: str) -> jinja2.Template:
    """One of the pages' templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shallowflow.runtime", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def row(comparison: Comparison) -> tuple[str, str, str, str]:
    """(quantity, predicted, measured, error) as people read them."""
    shown = words.gib if comparison.unit == "bytes" else words.duration
    return (
        comparison.quantity,
        shown(comparison.predicted),
        shown(comparison.measured),
        "0.00%" if abs(comparison.error) < 0.00005 else f"{comparison.error:+.2%}",
    )


def chart(figure: go.Figure, *, first: bool, name: str | None = None) -> str:
    """*figure* as a part of a page, the *first* with all that the others need too; *name* is its own on the page."""
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
        figure,
        full_html=False,
        include_plotlyjs=first,
        config={"displayModeBar": False, "responsive": True},
        div_id=name,
    )
    return page


def memory_figure(plan: Plan) -> go.Figure:
    """The process's memory at the peak, by category."""
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


def timeline_figure(timeline: Timeline, title: str) -> go.Figure:
    """Categories stacked over the step's allocations and frees, what is reserved above them, and where phases begin."""
    figure = go.Figure()
    for name, levels in timeline.categories.items():
        figure.add_scatter(
            x=timeline.positions,
            y=[level / 2**20 for level in levels],
            name=name,
            stackgroup="allocated",
            line={"width": 0.5, "shape": "hv"},
            hovertemplate=f"{name}: %{{y:,.1f}} MiB<extra></extra>",
        )
    figure.add_scatter(
        x=timeline.positions,
        y=[level / 2**20 for level in timeline.reserved_bytes],
        name="reserved",
        line={"dash": "dash", "shape": "hv", "color": INK},
        hovertemplate="reserved: %{y:,.1f} MiB<extra></extra>",
    )
    for position, name in timeline.phases:
        if not name.startswith("end"):
            figure.add_vline(x=position, line_width=1, line_dash="dot", line_color=INK)
            figure.add_annotation(x=position, y=1, yref="paper", yanchor="bottom", text=name, showarrow=False)
    allocated = [sum(levels) for levels in zip(*timeline.categories.values(), strict=True)]
    highest = max(range(len(allocated)), key=allocated.__getitem__)
    figure.add_annotation(
        x=timeline.positions[highest], y=allocated[highest] / 2**20, text="peak", arrowcolor=INK, ax=50, ay=-10
    )
    figure.update_layout(
        title=title,
        xaxis_title="allocations and frees",
        yaxis_title="MiB",
        legend={"orientation": "h", "y": -0.3, "traceorder": "normal"},
    )
    return figure


def _loss(run: RunRecord) -> go.Figure:
    line = go.Scatter(x=[s.index for s in run.steps], y=[s.loss for s in run.steps], mode="lines+markers", name="loss")
    figure = go.Figure(line)
    if run.evaluations:
        steps, losses = [e.step for e in run.evaluations], [e.loss for e in run.evaluations]
        figure.add_scatter(x=steps, y=losses, mode="lines+markers", name="held-out text")
    figure.update_layout(title="Loss", xaxis_title="step", yaxis_title="cross-entropy per token")
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
