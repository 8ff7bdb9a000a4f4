"""Calibrate this machine's CPU, then predict and measure steps of a model that the calibration has not seen.

python -m benchmarks.cpu_steps
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
from rich.console import Console
from rich.table import Table

from shallowflow.planner.profiler.user_step import simulate
from shallowflow.planner.strategies import WeightFormat
from shallowflow.runtime import cells
from shallowflow.runtime.calibrate import calibrate
from shallowflow.runtime.cells import Cell, Recompute
from shallowflow.runtime.heap import keeping_freed_memory

SHAPES = ((1, 128), (4, 128), (1, 512))
FORMATS: tuple[WeightFormat, ...] = ("fp32", "nf4", "int8")
POLICIES: tuple[Recompute, ...] = ("none", "all")
CELLS = tuple(
    Cell(model="SmolLM2-135M", weight_format=w, recompute=r, micro_batch_size=b, sequence_length=s)
    for (b, s), w, r in product(SHAPES, FORMATS, POLICIES)
)
NUM_TIMED = 5
NOISE = 0.05
"""Steps nearer to each other than this have no order."""


def measured(cell: Cell) -> float:
    """Median seconds of a step, after two that do not count."""
    step = cells.step_of(cell, "float32")("cpu")
    times: list[float] = []
    for _ in range(2 + NUM_TIMED):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def wrong_orders(predicted: Sequence[float], seconds: Sequence[float]) -> tuple[int, int]:
    """(pairs whose order is wrong, pairs that have one)."""
    pairs = [
        (predicted[i] - predicted[j]) * (seconds[i] - seconds[j]) < 0
        for i, j in combinations(range(len(seconds)), 2)
        if abs(seconds[i] / seconds[j] - 1) > NOISE
    ]
    return sum(pairs), len(pairs)


def main() -> None:
    """Print every step, the errors and the order."""
    warnings.simplefilter("ignore")
    console = Console(width=100)
    with console.status("calibrating") as status:
        found = calibrate("cpu", status.update)
    table = Table(box=None, pad_edge=False)
    for name in ("step", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name == "step" else "right")
    predicted, seconds = [], []
    with keeping_freed_memory(), console.status("measuring"):
        for cell in CELLS:
            predicted.append(simulate(cells.step_of(cell, "float32"), found.gpu).step_seconds or 0.0)
            seconds.append(measured(cell))
            title = f"{cell.micro_batch_size} x {cell.sequence_length} {cell.weight_format}, recompute {cell.recompute}"
            numbers = (f"{predicted[-1]:.3f}", f"{seconds[-1]:.3f}", f"{predicted[-1] / seconds[-1] - 1:+.1%}")
            table.add_row(title, *numbers)
    console.print(f"{found.device}, torch {found.torch_version}; SmolLM2-135M, rank 16")
    console.print(table)
    errors = sorted(abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True))
    wrong, pairs = wrong_orders(predicted, seconds)
    console.print(
        f"median error {statistics.median(errors):.1%}, p90 {np.quantile(errors, 0.9):.1%}, worst {errors[-1]:.1%}; "
        f"expected by the calibration: {found.gpu.step_error:.0%}\n"
        f"{wrong} of {pairs} pairs in the wrong order"
    )


if __name__ == "__main__":
    main()
