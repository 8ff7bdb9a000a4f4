"""What the command line shows while it works and when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shallowflow.planner import render
from shallowflow.planner.plan import Plan

if TYPE_CHECKING:
    from shallowflow.runtime.meter import MeasuredPeak
    from shallowflow.runtime.record import RunRecord, StepRecord

PLAIN_WIDTH = 100


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, a fixed width, so that output is the same everywhere."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


@contextlib.contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error while something is worked out; call the result to say what."""
    target = console(stderr=True)
    if not target.is_terminal:
        yield lambda _detail: None
        return
    with target.status(message) as shown:
        yield lambda detail: shown.update(f"{message}: {detail}")


class Watcher:
    """Shows a run's stages as progress bars: loss, tokens per second, memory against prediction, dollars."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.usd = 0.0
        self.task = progress.add_task("starting", total=None, detail="")

    def stage(self, message: str, total: int | None = None) -> None:
        """Begin a new bar."""
        self.progress.stop_task(self.task)
        task = self.progress.tasks[-1]
        if task.total is None:
            self.progress.update(self.task, visible=False)
        self.task = self.progress.add_task(message, total=total, detail="")

    def advance(self) -> None:
        """Move the bar by one."""
        self.progress.advance(self.task)

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """Show what one optimizer update did."""
        parts = [f"loss {record.loss:.3f}", f"{record.num_target_tokens / record.seconds:,.0f} tok/s"]
        if peak is not None:
            parts.append(f"{render.gib(peak.peak_allocated_bytes)}")
        if record.usd is not None:
            self.usd += record.usd
            parts.append(f"${self.usd:.4f}")
        if record.skipped:
            parts.append("skipped")
        self.progress.update(self.task, advance=1, detail="  ".join(parts))


@contextlib.contextmanager
def watching(plan: Plan) -> Iterator[Watcher]:
    """Progress bars on standard error while a plan runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    target = console(stderr=True)
    with Progress(*columns, console=target, disable=not target.is_terminal) as progress:
        yield Watcher(plan, progress)


def results(record: RunRecord, output: Path) -> RenderableType:
    """A finished run: what it learned, predicted beside measured, and where everything lies."""
    from shallowflow.runtime.report import row

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("predicted and measured")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for comparison in record.comparisons:
        table.add_row(*row(comparison))
    lines = [Text(f"{record.model_name}: {record.outcome}, {render.counted(len(record.steps), 'step')}", style="bold")]
    if record.perplexity_before is not None and record.perplexity_after is not None:
        lines.append(
            Text(f"perplexity on held-out text  {record.perplexity_before:.2f} -> {record.perplexity_after:.2f}")
        )
    rate = record.tokens_per_second
    spent = "" if record.usd is None else f", ${record.usd:.4f}"
    if rate is not None:
        lines.append(Text(f"{rate:,.0f} tokens/s learned, {render.duration(record.seconds)} in all{spent}"))
    lines += [Text(note) for note in record.notes]
    where = [Text(f"results in {output}: adapter, run.json, plan.json, report.html")]
    if record.outcome == "interrupted":
        where.append(Text("go on with the same command and --resume"))
    return Group(*lines, Text(), table, Text(), *where)
