"""What is shown of plans along memory, length or GPUs: a table, and charts whose letters stand beside its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .charts import LETTERS, Axis, Chart, chart
from .frontier import FrontierPoint
from .words import gib, usd

SECONDS = Axis("s/step", "{:.2f} s")
MEMORY = Axis("memory", "{:.2f} GiB")
ERROR = Axis("weight error", "{:.4f}")
DOLLARS = Axis("dollars", "${:,.2f}")
LENGTH = Axis("sequence length", "{:,.0f}")
SPEED = Axis("tokens/s", "{:,.0f}")
HOURS = Axis("hours", "{:.2f} h")
GPUS = Axis("GPUs", "{:,.0f}")
PER_MILLION = Axis("$ per M tokens", "${:,.2f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Plans side by side.

    Attributes:
        heads, rows: a table's; each row begins with its letter in the charts.
        notes: lines below it.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...] = ()


def over_memory(model: str, gpu: str, points: Sequence[FrontierPoint]) -> View:
    """From the leanest to the fastest: a step's seconds over memory, weight error and, if priced, dollars."""
    heads = ("", "memory", "s/step", "hours", "dollars", "weight error", "batch")
    rows = [
        (
            letter,
            gib(point.peak_process_bytes),
            f"{point.step_seconds:.2f}",
            f"{point.hours:.2f}",
            usd(point.usd),
            f"{point.weight_error:.4f}",
            _batch(point),
        )
        for letter, point in zip(LETTERS, points, strict=False)
    ]
    across = {
        MEMORY: [point.peak_process_bytes / 2**30 for point in points],
        ERROR: [point.weight_error for point in points],
    }
    prices = [point.usd for point in points if point.usd is not None]
    if len(prices) == len(points):
        across[DOLLARS] = prices
    seconds = [point.step_seconds for point in points]
    charts = [
        Chart(across=axis, up=SECONDS, points=tuple(zip(values, seconds, strict=True)))
        for axis, values in across.items()
    ]
    return View(title=f"{model} on {gpu.upper()}", heads=heads, rows=tuple(rows), charts=tuple(charts))


def over_lengths(model: str, gpu: str, points: Sequence[FrontierPoint], length: int, unfit: Sequence[int] = ()) -> View:
    """By sequence length: speed against sequences of *length*, memory, and the hours of the same tokens.

    At the *unfit* lengths there is no plan.
    """
    own = next((p.tokens_per_second for p in points if p.configuration.sequence_length == length), None)
    heads = ("", "sequence", "memory", "s/step", "tokens/s", f"against {length:,}", "hours", "dollars", "batch")
    rows = [
        (
            letter,
            f"{point.configuration.sequence_length:,}",
            gib(point.peak_process_bytes),
            f"{point.step_seconds:.2f}",
            f"{point.tokens_per_second:,.0f}",
            "" if own is None or own == point.tokens_per_second else f"{point.tokens_per_second / own - 1:+.1%}",
            f"{point.hours:.2f}",
            usd(point.usd),
            _batch(point),
        )
        for letter, point in zip(LETTERS, points, strict=False)
    ]
    up = {
        SPEED: [point.tokens_per_second for point in points],
        MEMORY: [point.peak_process_bytes / 2**30 for point in points],
        HOURS: [point.hours for point in points],
    }
    lengths = [point.configuration.sequence_length for point in points]
    return View(
        title=f"{model} on {gpu.upper()}, by sequence length",
        heads=heads,
        rows=tuple(rows),
        charts=_over(LENGTH, lengths, up),
        notes=tuple(f"No plan fits with sequences of {tokens:,} tokens." for tokens in unfit),
    )


def over_gpus(model: str, gpu: str, points: Sequence[FrontierPoint], million_tokens: float) -> View:
    """By the number of GPUs: speed against the fewest, and what the same *million_tokens* of work take and cost.

    What an hour costs that more GPUs save is where more of them stop to pay.
    """
    heads = (
        "",
        "GPUs",
        "memory each",
        "s/step",
        "tokens/s",
        "faster",
        "hours",
        "dollars",
        "per M tokens",
        "an hour saved",
    )
    rows = [
        (
            letter,
            _gpus(point),
            gib(point.peak_process_bytes),
            f"{point.step_seconds:.2f}",
            f"{point.tokens_per_second:,.0f}",
            f"{point.tokens_per_second / points[0].tokens_per_second:.2f} x",
            f"{point.hours:.2f}",
            usd(point.usd),
            usd(None if point.usd is None else point.usd / million_tokens),
            "" if before is None else _saved(before, point),
        )
        for letter, point, before in zip(LETTERS, points, (None, *points), strict=False)
    ]
    up = {SPEED: [point.tokens_per_second for point in points], HOURS: [point.hours for point in points]}
    prices = [point.usd for point in points if point.usd is not None]
    if len(prices) == len(points):
        up[PER_MILLION] = [price / million_tokens for price in prices]
    counts = [point.configuration.num_gpus for point in points]
    return View(
        title=f"{model} on {gpu.upper()}, by the number of them",
        heads=heads,
        rows=tuple(rows),
        charts=_over(GPUS, counts, up),
        notes=(
            "On the cheapest machine that has so many: some have more than are used. What no machine has is in as few",
            "as have it, joined by their network.",
        ),
    )


def _gpus(point: FrontierPoint) -> str:
    """How many, and into how many stages the model is cut."""
    chosen = point.configuration
    parts = f" of {chosen.parts_per_stage} parts" if chosen.parts_per_stage > 1 else ""
    return f"{chosen.num_gpus}" if chosen.num_stages == 1 else f"{chosen.num_gpus} in {chosen.num_stages} stages{parts}"


def _over(across: Axis, places: Sequence[int], up: Mapping[Axis, Sequence[float]]) -> tuple[Chart, ...]:
    """A chart of each of the values *up* over the same *places*."""
    return tuple(
        Chart(across=across, up=axis, points=tuple(zip(places, values, strict=True)), falls=False)
        for axis, values in up.items()
    )


def _saved(before: FrontierPoint, point: FrontierPoint) -> str:
    """What each hour costs that *point* takes less than *before*."""
    hours = before.hours - point.hours
    if hours <= 0:
        return "none is"
    if before.usd is None or point.usd is None:
        return usd(None)
    more = point.usd - before.usd
    return usd(more / hours) if more > 0 else "nothing"


def shown(view: View) -> RenderableType:
    """*view* on a terminal; as many charts beside each other as it is wide."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in view.heads:
        table.add_column(name, justify="right" if name else "left")
    for row in view.rows:
        table.add_row(*row)
    charts = Columns([chart(drawn) for drawn in view.charts], padding=(0, 1))
    notes = [Text(note, style="dim") for note in view.notes]
    return Group(Text(view.title, style="bold"), table, *notes, Text(), charts)


def _batch(point: FrontierPoint) -> str:
    return f"{point.configuration.micro_batch_size} x {point.configuration.gradient_accumulation_steps}"
