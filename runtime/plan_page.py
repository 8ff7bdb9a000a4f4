"""A plan as one self-contained HTML page, which opens on the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import plotly.graph_objects as go

from shallowflow.planner import words
from shallowflow.planner.layer_cost import LayerCost
from shallowflow.planner.memory_record import Timeline
from shallowflow.planner.plan import Plan
from shallowflow.planner.variants import Variant
from shallowflow.profiles.specs import GpuSpec, InstanceSpec

from .report import INK, chart, memory_figure, template, timeline_figure

GIB = 2**30
MOST_PRICES = 12
BELOW = {"orientation": "h", "y": -0.3}


def html(
    plan: Plan,
    gpu: GpuSpec,
    instances: Sequence[InstanceSpec],
    timeline: Timeline | None,
    layers: Sequence[LayerCost],
    variants: Sequence[Variant],
) -> str:
    """The page: will it fit, how long, how much; then memory, time, alternatives, other sizes and money."""
    figures: list[tuple[str, go.Figure]] = [("memory at the peak by category", memory_figure(plan))]
    if layers:
        figures.append(("memory by layer", _layers(layers)))
    if timeline is not None:
        figures.append(("memory over the step", timeline_figure(timeline, "Memory over one step")))
    figures.append(("time by kind of operator", _time(plan)))
    figures.append(("the plan and its alternatives", _others(plan)))
    charts = [(name, chart(figure, first=index == 0)) for index, (name, figure) in enumerate(figures)]
    return template("plan.html").render(
        plan=plan,
        gpu=gpu,
        words=words,
        charts=charts,
        answers=answers(plan),
        strategies=words.strategies(plan.configuration),
        money=_money(plan, instances)[:MOST_PRICES],
        num_prices=len(_money(plan, instances)),
        data=_data(plan, gpu, variants) if variants else None,
    )


def answers(plan: Plan) -> list[tuple[str, str]]:
    """Will it fit, how long, how much, how fast: each a figure, and what it is."""
    took = f"for {plan.workload.total_tokens:,} tokens, in {words.counted(plan.num_steps, 'step')}"
    found = [
        (words.gib(plan.prediction.peak_process_bytes), f"of {words.gib(plan.memory_bytes)} at the peak: it fits"),
        (words.duration(plan.wall.total_seconds), took),
    ]
    if plan.offers:
        offer = plan.offers[0]
        where = f"on demand on {offer.instance} in {offer.region}; {words.usd(offer.spot_usd)} on spot"
        found.append((words.usd(offer.on_demand_usd), where))
    step, speed = words.duration(plan.prediction.step_seconds), plan.prediction.tokens_per_second
    return [*found, (step, f"a step, {speed:,.0f} tokens/s")]


def _data(plan: Plan, gpu: GpuSpec, variants: Sequence[Variant]) -> str:
    """What the sliders read, as JSON that may stand inside a page."""
    offer = plan.offers[0] if plan.offers else None
    facts = {
        "variants": [msgspec.to_builtins(variant) for variant in variants],
        "chosen": {
            "sequence_length": plan.configuration.sequence_length,
            "micro_batch_size": plan.configuration.micro_batch_size,
            "rank": plan.configuration.rank,
        },
        "memory_bytes": gpu.memory_bytes,
        "budget_bytes": plan.budget_bytes + gpu.context_bytes,
        "total_tokens": plan.workload.total_tokens,
        "beside_seconds": plan.wall.total_seconds - plan.wall.training_seconds,
        "usd_per_hour": None if offer is None else offer.on_demand_usd_per_hour * offer.num_instances,
    }
    return json.dumps(facts).replace("<", "\\u003c")


def _layers(layers: Sequence[LayerCost]) -> go.Figure:
    """Bytes that each layer holds between steps, and from its forward to its backward pass."""
    numbers = list(range(len(layers)))
    parts = {
        "weights, adapter and its state": [layer.resident_bytes for layer in layers],
        "gradients": [layer.gradient_bytes for layer in layers],
        "saved activations of a micro-batch": [layer.saved_bytes for layer in layers],
    }
    figure = go.Figure(
        [
            go.Bar(
                name=name,
                x=numbers,
                y=[num_bytes / 2**20 for num_bytes in values],
                hovertemplate=f"layer %{{x}}, {name}: %{{y:,.1f}} MiB<extra></extra>",
            )
            for name, values in parts.items()
        ]
    )
    figure.update_layout(barmode="stack", title="Memory by layer", xaxis_title="layer", yaxis_title="MiB", legend=BELOW)
    return figure


def _time(plan: Plan) -> go.Figure:
    """Each kind of operator: what arithmetic and bytes take at the chip's rates, and the gaps between kernels."""
    parts = list(reversed(plan.time.kinds))
    rows: dict[str, list[float]] = {
        "at the roofline": [part.seconds * part.roofline_share for part in parts],
        "gaps between kernels": [part.seconds * (1 - part.roofline_share) for part in parts],
    }
    figure = go.Figure(
        [
            go.Bar(
                name=name,
                y=[part.kind for part in parts],
                x=seconds,
                orientation="h",
                hovertemplate=f"%{{y}}, {name}: %{{x:.3f}} s<extra></extra>",
            )
            for name, seconds in rows.items()
        ]
    )
    figure.update_layout(barmode="stack", title="A step's time on the device", xaxis_title="s", legend=BELOW)
    figure.update_yaxes(automargin=True)
    return figure


def _others(plan: Plan) -> go.Figure:
    """The plan and what else fits, by memory and time."""
    figure = go.Figure()
    groups: list[tuple[str, list[Any], str]] = [
        ("the plan", [plan], "star"),
        ("alternatives", list(plan.alternatives), "circle"),
    ]
    for name, found, symbol in groups:
        figure.add_scatter(
            name=name,
            mode="markers",
            x=[one.prediction.peak_process_bytes / GIB for one in found],
            y=[one.prediction.step_seconds for one in found],
            customdata=[words.summary(one.configuration) for one in found],
            marker={"size": 12, "symbol": symbol},
            hovertemplate="%{customdata}<br>%{x:.2f} GiB, %{y:.2f} s a step<extra></extra>",
        )
    figure.add_vline(x=plan.memory_bytes / GIB, line_dash="dash", line_color=INK, annotation_text="the GPU's memory")
    figure.update_layout(
        title="The plan and its alternatives",
        xaxis_title="GiB at the peak",
        yaxis_title="s a step",
        legend=BELOW,
    )
    return figure


def _money(plan: Plan, instances: Sequence[InstanceSpec]) -> list[tuple[str, ...]]:
    """(instance, region, on demand, spot, date of the price) of the whole run, cheapest on demand first."""
    number, hours = plan.workload.num_machines, plan.wall.total_seconds / 3600 * plan.workload.num_machines
    found = [
        (price.on_demand_usd_per_hour * hours, instance.name, price)
        for instance in instances
        if instance.num_gpus >= plan.workload.gpus_per_machine
        for price in instance.prices
    ]
    return [
        (
            name if number == 1 else f"{number} x {name}",
            price.region,
            words.usd(usd),
            words.usd(None if price.spot_usd_per_hour is None else price.spot_usd_per_hour * hours),
            price.date,
        )
        for usd, name, price in sorted(found, key=lambda one: one[:2])
    ]
