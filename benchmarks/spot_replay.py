"""Runs on the nodes of a spot trace beside what the planner expects of them, for several intervals and lengths.

python -m benchmarks.spot_replay TRACE.csv

A trace has rows ``milliseconds,add|remove,node``. A run begins on each node that joins; when the trace removes it, the
run goes on with the node that joins next. The wait for that one is left out on both sides: it is the trace's own. Only
runs that begin early enough to be over by the trace's end under twice the undisturbed time count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from shallowflow.planner.hazard import of_history
from shallowflow.planner.spot import Job, best_interval, daly_seconds, means, young_seconds

STEP = 10.0
LENGTHS_HOURS = (0.5, 1.0, 2.0, 4.0)
INTERVALS_MINUTES = (2.0, 5.0, 10.0, 30.0)
JOB = Job(
    num_steps=1,
    step_seconds=STEP,
    first_seconds=420.0,
    again_seconds=425.0,
    last_seconds=5.0,
    checkpoint_seconds=4.0,
    upload_seconds=1.0,
    waiting_seconds=0.0,
    interruptions_per_second=0.0,
)
"""Five minutes of set-up, two of loading, a checkpoint of half a GB: an 8B model's on a g4dn.xlarge."""


def lives(lines: Sequence[str]) -> tuple[list[tuple[float, float]], float]:
    """When each node came and went, in seconds, and the trace's end; those still there go never."""
    since: dict[str, float] = {}
    found: list[tuple[float, float]] = []
    now = 0.0
    for line in lines:
        at, event, node = line.strip().split(",")
        now = float(at) / 1000
        if event == "add":
            since[node] = now
        else:
            found.append((since.pop(node), now))
    return sorted(found + [(start, float("inf")) for start in since.values()]), now


def run(job: Job, interval: int, nodes: Sequence[tuple[float, float]], first: int) -> float | None:
    """Seconds on all nodes until a run ends that begins on the *first* of them; None where no node is left."""
    safe, took = 0, 0.0
    number: int | None = first
    while number is not None:
        came, went = nodes[number]
        clock = job.again_seconds if safe else job.first_seconds
        life, done = went - came, safe
        while clock < life:
            steps = min(interval, job.num_steps - done)
            clock += steps * job.step_seconds
            done += steps
            if done == job.num_steps:
                break
            clock += job.checkpoint_seconds
            if clock + job.upload_seconds <= life:
                safe = done
        if done == job.num_steps and clock + job.last_seconds <= life:
            return took + clock + job.last_seconds
        took += life
        number = next((other for other, (joined, _) in enumerate(nodes) if joined > went), None)
    return None


def replayed(job: Job, interval: int, nodes: Sequence[tuple[float, float]], end: float) -> list[float]:
    """What each run takes that begins early enough."""
    early = [n for n, (came, _) in enumerate(nodes) if came + 2 * job.undisturbed_seconds <= end]
    return [took for n in early if (took := run(job, interval, nodes, n)) is not None]


def main() -> None:
    """Print predicted and replayed overheads side by side."""
    path = Path(sys.argv[1])
    lines = path.read_text(encoding="utf-8").splitlines()
    hazard = of_history(lines, path.name)
    nodes, end = lives(lines)
    console = Console(width=100, highlight=False)
    console.print(
        f"{hazard.source}: {hazard.middle:.3f} interruptions per hour ({hazard.low:.3f} to {hazard.high:.3f})"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("job", "interval", "runs", "predicted", "low", "high", "replayed"):
        table.add_column(head, justify="right")
    for hours in LENGTHS_HOURS:
        job = replace(JOB, num_steps=round(hours * 3600 / STEP), interruptions_per_second=hazard.middle / 3600)
        for minutes in (*INTERVALS_MINUTES, None):
            interval = best_interval(job) if minutes is None else round(minutes * 60 / STEP)
            took = replayed(job, interval, nodes, end)
            shares = [
                means(replace(job, interruptions_per_second=rate / 3600), interval).seconds / job.undisturbed_seconds
                - 1
                for rate in (hazard.middle, hazard.low, hazard.high)
            ]
            best = "" if minutes is not None else " best"
            table.add_row(
                f"{hours:g} h",
                f"{interval * STEP / 60:.1f} min{best}",
                f"{len(took)}",
                *(f"{share:+.1%}" for share in shares),
                f"{mean(took) / job.undisturbed_seconds - 1:+.1%}" if took else "-",
            )
    console.print(table)
    console.print(f"Young {young_seconds(job) / 60:.1f} min, Daly {daly_seconds(job) / 60:.1f} min")


if __name__ == "__main__":
    main()
