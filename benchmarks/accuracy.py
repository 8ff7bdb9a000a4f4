"""Predicted against recorded truth: LoRA steps that were measured on a real T4.

    python -m benchmarks.accuracy [--held-out] [--json]

Each step is rebuilt as its recording script built it, on ``meta``, with Hugging Face's, PEFT's and our modules, and
traced and replayed. No byte is fitted to the rows. The T4's rates are fitted to the seconds: for errors on models that
did not calibrate them, see ``benchmarks.calibration``. transformers loads quantized weights with several threads, so
that the memory of one and the same step differs from run to run: such a row's prediction is the median over load
orders that were tried, and what they span is shown beside it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import recorded, rivals
from shallowflow.planner.profiler.kernels import Target
from shallowflow.profiles import GpuSpec, load_gpu

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number, predicted and measured.

    Attributes:
        predicted: the median over load orders.
        low, high: what they span.
    """

    predicted: float
    low: float
    high: float
    measured: float

    @classmethod
    def of(cls, predicted: Iterable[float], measured: float) -> Quantity:
        """The quantity that was *measured*, and was *predicted* once for each load order."""
        values = sorted(predicted)
        return cls(predicted=statistics.median_low(values), low=values[0], high=values[-1], measured=measured)

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    @property
    def spanned(self) -> bool:
        """Whether the measurement lies within the span, give or take a step of 2 MiB."""
        return self.low - 2 * MIB <= self.measured <= self.high + 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recorded step beside its prediction.

    Attributes:
        quantities: by name; what was not recorded is left out. Bytes, but for ``seconds``.
        rivals: bytes by other tool, to be compared with the process's.
    """

    name: str
    model: str
    weights: str
    attention: str
    micro_batch_size: int
    sequence_length: int
    quantities: dict[str, Quantity]
    rivals: dict[str, int]

    def error(self, quantity: str) -> float:
        """The relative error of *quantity*."""
        return self.quantities[quantity].error


def measured(run: dict[str, Any]) -> dict[str, float]:
    """What was recorded of *run*: bytes, but for ``seconds``; what was not recorded is left out."""
    found: dict[str, float | None] = {
        "allocated": run["mem_peak_alloc_gib"] * 2**30,
        "reserved": run["mem_peak_reserved_gib"] * 2**30,
        "process": run["mem_process_gib"] * 2**30,
        "seconds": run["step_s_steady"],
    }
    phases = run["phases"]
    if phases:
        resident, peak = phases["resident_before_step_mib"] * MIB, phases["peak_allocated_mib"] * MIB
        found |= {"resident": resident, "step": peak - resident}
        found |= {name: phases[f"peak_{name}_mib"] * MIB for name in ("forward", "backward", "optimizer")}
    return {name: value for name, value in found.items() if value is not None}


def predict(run: dict[str, Any], gpu: GpuSpec) -> Row:
    """Rebuild the step of *run*, trace it and set the prediction beside the measurement."""
    step = recorded.trace(run, Target.of(gpu))
    found = recorded.spread(step)
    predicted: dict[str, list[float]] = {
        "process": [f.reserved + gpu.context_bytes for f in found],
        "seconds": [recorded.operators(step).seconds(gpu)],
        "step": [f.allocated - f.resident for f in found],
        **{name: [getattr(f, name) for f in found] for name in recorded.Levels.__dataclass_fields__},
    }
    quantities = {name: Quantity.of(predicted[name], value) for name, value in measured(run).items()}
    return Row(
        name=run["id"],
        model=run["model_id"].split("/")[-1],
        weights="nf4" if recorded.is_quantized(run) else "fp16",
        attention="eager" if recorded.is_eager(run) else "SDPA",
        micro_batch_size=run["batch"],
        sequence_length=run["max_seq"],
        quantities=quantities,
        rivals=rivals.predictions(run),
    )


def rows(every: int = 1, path: Path = recorded.RECORDS) -> Iterator[Row]:
    """Predictions of every *every*-th step recorded in *path*."""
    gpu = load_gpu("t4")
    for run in recorded.runs(path)[::every]:
        yield predict(run, gpu)


def main(path: Path, as_json: bool) -> None:
    """Print the table of the steps recorded in *path*, and the summaries."""
    warnings.simplefilter("ignore")
    total = len(recorded.runs(path))
    found = list(track(rows(path=path), "tracing recorded steps", total, console=Console(stderr=True), transient=True))
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return
    console = Console(width=175)
    console.print(_every_row(found))
    console.print(_summary(found))
    quantized = [row.quantities["reserved"] for row in found if row.weights == "nf4"]
    inside = sum(q.spanned for q in quantized)
    console.print(f"reserved, nf4: {inside} of {len(quantized)} measurements lie within what load order spans")
    near = [abs(q.predicted - q.measured) <= MIB for row in found if (q := row.quantities.get("step"))]
    console.print(f"step over resident: {sum(near)} of {len(near)} within 1 MiB")


def _every_row(found: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    text = ("row", "model", "weights", "attention", "batch")
    numbers = ("allocated GiB", "measured", "error", "reserved GiB", "span", "measured", "error", "s", "measured")
    for name in text:
        table.add_column(name, no_wrap=True)
    for name in (*numbers, "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    allocated, reserved, seconds = (row.quantities.get(name) for name in ("allocated", "reserved", "seconds"))
    assert allocated is not None
    assert reserved is not None
    span = f"{reserved.low / 2**30:.2f}-{reserved.high / 2**30:.2f}" if reserved.low < reserved.high else ""
    return (
        row.name,
        row.model.removesuffix("-Instruct").removesuffix("-Chat-v1.0"),
        row.weights,
        row.attention,
        f"{row.micro_batch_size}x{row.sequence_length}",
        f"{allocated.predicted / 2**30:.3f}",
        f"{allocated.measured / 2**30:.3f}",
        f"{allocated.error:+.2%}",
        f"{reserved.predicted / 2**30:.3f}",
        span,
        f"{reserved.measured / 2**30:.3f}",
        f"{reserved.error:+.1%}",
        *((f"{seconds.predicted:.2f}", f"{seconds.measured:.2f}", f"{seconds.error:+.0%}") if seconds else ("",) * 3),
    )


def _summary(found: list[Row]) -> Table:
    """Median and worst error by quantity and kind of row."""
    table = Table(box=None, pad_edge=False)
    kinds = [(weights, attention) for weights in ("fp16", "nf4") for attention in ("SDPA", "eager")]
    table.add_column("median, worst error")
    for weights, attention in kinds:
        table.add_column(f"{weights}, {attention}", justify="right")
    table.add_column("all", justify="right")
    names = ("allocated", "reserved", "process", "resident", "step", "forward", "backward", "optimizer", "seconds")
    for name in names:
        groups = [[r for r in found if (r.weights, r.attention) == kind] for kind in kinds]
        errors = [[r.error(name) for r in group if name in r.quantities] for group in (*groups, found)]
        table.add_row(name, *map(summary, errors))
    for name in rivals.NAMES:
        groups = [[r for r in found if (r.weights, r.attention) == kind] for kind in kinds]
        against = [[r.rivals[name] / r.quantities["process"].measured - 1 for r in g] for g in (*groups, found)]
        table.add_row(f"process, {name}", *map(summary, against))
    return table


def summary(errors: Iterable[float]) -> str:
    """Median and worst absolute error in percent, both with as many decimals as show two digits of the median.

    Three at most. So no worst error is shown below its median.
    """
    sizes = [100 * abs(e) for e in errors]
    if not sizes:
        return ""
    median = statistics.median(sizes)
    decimals = 3 if median == 0 else min(max(1 - math.floor(math.log10(median)), 0), 3)
    return f"{median:.{decimals}f} %, {max(sizes):.{decimals}f} %"


if __name__ == "__main__":
    wanted = recorded.HELD_OUT if "--held-out" in sys.argv[1:] else recorded.RECORDS
    main(wanted, "--json" in sys.argv[1:])
