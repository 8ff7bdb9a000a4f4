"""What the command line shows while it works and when it is done."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from shallowflow.planner import words
from shallowflow.planner.plan import Plan

if TYPE_CHECKING:
    from shallowflow.runtime.meter import MeasuredPeak
    from shallowflow.runtime.record import EvaluationRecord, RunRecord, StepRecord
    from shallowflow.runtime.watch import Money

PLAIN_WIDTH = 100
PLAIN_SECONDS = 30.0
"""Between two lines on a run's steps where there is no terminal."""
RECENT_STEPS = 20
"""Whose pace tells how long the rest takes."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, a fixed width, so that output is the same everywhere."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def show(what: RenderableType) -> None:
    """Print *what*; where there is no terminal, without the blanks that fill lines up."""
    target = console()
    if target.is_terminal:
        target.print(what)
        return
    with target.capture() as captured:
        target.print(what)
    target.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


@contextlib.contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error while something is worked out; call the result to say what."""
    target = console(stderr=True)
    if not target.is_terminal:
        yield _now_and_then(target, message)
        return
    with target.status(message) as shown:
        yield lambda detail: shown.update(Text(f"{message}: {detail}", no_wrap=True, overflow="ellipsis"))


def _now_and_then(target: Console, message: str) -> Callable[[str], None]:
    """Tells of what takes long, a line in PLAIN_SECONDS, where there is no terminal."""
    told = time.monotonic()

    def tell(detail: str) -> None:
        nonlocal told
        if time.monotonic() - told >= PLAIN_SECONDS:
            told = time.monotonic()
            target.print(f"{message}: {detail}", soft_wrap=True, markup=False)

    return tell


class Watcher:
    """Shows how a run goes: bars and figures that stay in place on a terminal, a line now and then elsewhere."""

    def __init__(self, plan: Plan, target: Console) -> None:
        self.plan = plan
        self.target = target
        self.figures = Figures(plan.prediction.peak_allocated_bytes)
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=target,
        )
        self.training: TaskID | None = None
        self.task: TaskID | None = None
        self.last_line = -math.inf

    def __rich__(self) -> RenderableType:
        """The bars, and below them what is known of the training."""
        return Group(self.bars, *(Text(f"  {line}", no_wrap=True) for line in self.figures.lines()))

    def stage(self, message: str, total: int | None = None) -> None:
        """Begin a new bar, or say what begins; the training's stays above those of its evaluations."""
        if not self.target.is_terminal:
            self.target.print(f"running {self.plan.model_name}: {message}", soft_wrap=True, markup=False)
        if self.task is not None and self.task != self.training:
            self.bars.update(self.task, visible=False)
        self.task = self.bars.add_task(message, total=total, detail="")
        if message == "training":
            self.training = self.task
            self.figures.left = total or 0

    def advance(self) -> None:
        """Move the bar by one."""
        if self.task is not None:
            self.bars.advance(self.task)

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """Show what one optimizer update did."""
        self.figures.step(record, None if peak is None else peak.peak_allocated_bytes)
        if self.task is not None and self.task != self.training:
            self.bars.update(self.task, visible=False)
            self.task = self.training
        if self.training is not None:
            self.bars.update(self.training, advance=1, detail=self.figures.remaining())
        if not self.target.is_terminal and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            told = [f"step {record.index}", *self.figures.parts(), self.figures.skipped(), self.figures.money()]
            told.append(self.figures.remaining())
            self.target.print(", ".join(part for part in told if part), soft_wrap=True, markup=False)

    def money(self, money: Money) -> None:
        """Show what the run has cost."""
        self.figures.spent = money

    def evaluated(self, record: EvaluationRecord) -> None:
        """Show what an evaluation came to."""
        self.figures.evaluated = f"after step {record.step}: loss {record.loss:.4f}, perplexity {record.perplexity:.2f}"
        if not self.target.is_terminal:
            self.target.print(self.figures.evaluated, soft_wrap=True, markup=False)

    def note(self, message: str) -> None:
        """Say something that stays."""
        self.target.print(message, soft_wrap=True, markup=False)


@dataclass(slots=True)
class Figures:
    """What is shown of a training: its last step, its memory, what is left of it, and its price."""

    predicted_bytes: int
    left: int = 0
    last: StepRecord | None = None
    peak_bytes: int | None = None
    evaluated: str = ""
    usd: float = 0.0
    spent: Money | None = None
    seconds: list[float] = field(default_factory=list)

    def step(self, record: StepRecord, peak_bytes: int | None) -> None:
        """Take one step in."""
        self.last, self.peak_bytes = record, peak_bytes
        self.left -= 1
        self.usd += record.usd or 0.0
        self.seconds = [*self.seconds[-RECENT_STEPS:], record.seconds]

    def parts(self) -> list[str]:
        """Loss, speed and memory, as far as they are known."""
        last = self.last
        if last is None:
            return []
        found = [f"loss {last.loss:.3f}", f"{last.num_target_tokens / last.seconds:,.0f} tokens/s"]
        if self.peak_bytes is not None:
            found.append(f"{words.gib(self.peak_bytes)} of {words.gib(self.predicted_bytes)} predicted")
        return found

    def skipped(self) -> str:
        """That the last update was not made, and the loss scale since."""
        return f"update skipped, scale {self.last.loss_scale:g}" if self.last and self.last.skipped else ""

    def money(self) -> str:
        """Dollars so far, and at the end at the pace of the last steps; nothing where there is no price."""
        if self.spent is not None:
            return _dollars(self.spent)
        last = self.last
        if last is None or last.usd is None:
            return ""
        at_the_end = self.usd + self.left * statistics.median(self.seconds) * last.usd / last.seconds
        return f"${self.usd:.4f} so far, ${at_the_end:.4f} at the end"

    def remaining(self) -> str:
        """How long the steps that are left take, at the pace of the last ones."""
        return f"{words.duration(self.left * statistics.median(self.seconds))} left" if self.left > 0 else ""

    def lines(self) -> list[str]:
        """All of it, on lines for the space below the bars."""
        below = "   ".join(part for part in (self.money(), self.skipped()) if part)
        return [line for line in ("   ".join(self.parts()), below, self.evaluated) if line]


def _dollars(spent: Money) -> str:
    """All sessions' dollars so far and at the end, the budget, and how often the run was interrupted."""
    found = [f"${spent.usd:.4f} so far"]
    if spent.projected_usd is not None:
        found.append(f"${spent.projected_usd:.4f} at the end")
    if spent.budget_usd is not None:
        found.append(f"${spent.budget_usd:.4f} at most")
    if spent.interruptions:
        found.append(words.counted(spent.interruptions, "interruption"))
    return ", ".join(found)


@contextlib.contextmanager
def watching(plan: Plan) -> Iterator[Watcher]:
    """What is shown on standard error while a plan runs."""
    target = console(stderr=True)
    watcher = Watcher(plan, target)
    if not target.is_terminal:
        yield watcher
        return
    with Live(watcher, console=target, refresh_per_second=8):
        yield watcher


def results(record: RunRecord, output: Path) -> RenderableType:
    """A finished run: what it learned, predicted beside measured, and where everything lies."""
    from shallowflow.runtime.outcome import learned, outcome

    where = [Text(f"results in {output}: {learned(record)}, run.json, plan.json, report.html")]
    if not record.steps:
        where = [Text(f"nothing was learned; the record is in {output}")]
    if record.outcome == "out of budget":
        where.append(Text("go on with the same command, --resume and a higher --budget-usd"))
    if record.outcome == "interrupted":
        where.append(Text("go on with the same command and --resume"))
    return Group(outcome(record), *where)
