"""``sfplan frontier``: what memory and finer weights buy, what other sequence lengths cost, or what more GPUs give."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from shallowflow import completing
from shallowflow.options import DEFAULT_MODEL, request, workload_options
from shallowflow.planner import frontier_view
from shallowflow.planner.frontier_view import View
from shallowflow.printing import echo_json
from shallowflow.runtime.files import write_text
from shallowflow.session import RequestError
from shallowflow.tradeoffs import Over, find_over_gpus, find_over_lengths, find_trade_offs, lengths


@click.command("frontier")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completing.models)
@click.option(
    "--over", type=click.Choice(get_args(Over)), default="memory", show_default=True, help="What the plans differ in."
)
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), help="Write the charts to a page, FILE.html.")
@workload_options
@click.option("--json", "as_json", is_flag=True, help="Print the points as JSON.")
def frontier_command(model: str, over: Over, chart: Path | None, as_json: bool, **options: Any) -> None:
    """Show what memory and finer weights buy: plans that no other beats in memory, time and weight error at once.

    Each is a plan for a part of the GPU's memory, traced whole. With --over sequence_length it shows what longer and
    shorter sequences cost: the best plan at a quarter, half, once and twice the length, for the same work. With --over
    gpus it shows what more of them give, and where they stop to pay: 1, 2, 4 and so on, as far as one machine has them.

    \b
    sfplan frontier Llama-3.2-1B --gpu t4 --sequence-length 1024
    sfplan frontier Llama-3.2-1B --gpu t4 --sequence-length 1024 --over sequence_length
    sfplan frontier Llama-3.2-1B --gpu t4 --sequence-length 1024 --over gpus
    sfplan frontier Llama-3.2-1B --gpu t4 --sequence-length 1024 --chart frontier.html
    """
    from shallowflow.hub import find_model
    from shallowflow.terminal import show, status

    spec = find_model(model)
    names = model, spec.name
    device, workload, _ = request(names, **options)
    _check_chart(chart)
    with status(f"planning {spec.name}") as tell:
        if over == "memory":
            points = find_trade_offs(spec, device, workload, progress=tell)
            view = frontier_view.over_memory(spec.name, device.name, points)
        elif over == "gpus":
            points = find_over_gpus(spec, device, workload, progress=tell)
            view = frontier_view.over_gpus(spec.name, device.name, points, workload.total_tokens / 1e6)
        else:
            length = workload.sequence_length
            works = {n: request(names, **{**options, "sequence_length": n})[1] for n in lengths(spec, length)}
            points = find_over_lengths(spec, device, works, progress=tell)
            unfit = sorted(set(works) - {point.configuration.sequence_length for point in points})
            view = frontier_view.over_lengths(spec.name, device.name, points, length, unfit)
    if chart is not None:
        _write_chart(chart, view)
    if as_json:
        echo_json(points)
        return
    show(frontier_view.shown(view))


def _check_chart(chart: Path | None) -> None:
    if chart is not None and chart.suffix not in (".html", ".htm"):
        raise RequestError(f"--chart {chart} is no page; give a name that ends in .html")
    if chart is not None and not chart.parent.is_dir():
        raise RequestError(f"folder {chart.parent} for --chart does not exist")


def _write_chart(chart: Path, view: View) -> None:
    from shallowflow.runtime.frontier_page import html

    try:
        write_text(chart, html(view))
    except OSError as error:
        raise RequestError(f"cannot write {chart}: {error.strerror}") from None
