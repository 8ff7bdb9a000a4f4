"""Fit a T4's rates to recorded steps, and say how well they predict models that they were not fitted to.

    python -m benchmarks.calibration

The rates are few and physical, each drawn towards a microbenchmark's value; the error is that of leave-one-model-out
cross-validation. The rows come from two sessions, each on a card of its own: one factor between the two cards is fitted
beside the rates, and the shipped rates are those of a card between them. Where no row of the fitted models is bound by
the host, the host's constants are those of published generation benchmarks.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks import recorded
from shallowflow.planner import fitting, latency
from shallowflow.planner.profiler.kernels import Target
from shallowflow.profiles import GpuSpec, load_gpu

MICROBENCHMARKS = {
    "fp16_flops_per_second": 26e12,
    "fp32_flops_per_second": 5e12,
    "attention_fp16_flops_per_second": 15e12,
    "attention_fp32_flops_per_second": 4.5e12,
    "dequantized_elements_per_second": 30e9,
    "dram_bytes_per_second": 230e9,
    "fp32_matmul_bytes_per_second": 100e9,
}
"""Where each rate starts, and what it is drawn to, weakly: near what t4_micro.csv says of products and copies, and of
the right order where it says nothing."""

HOST = {"kernel_launch_seconds": 45e-6, "quantized_launch_seconds": 150e-6}
"""Where the host's constants start: high enough that the search sees the host as a bound and can lower it."""

HOST_ELSEWHERE = {"kernel_launch_seconds": 21e-6, "quantized_launch_seconds": 86e-6}
"""Qwen2.5-3B generating one token in 39 ms, 1,858 operators; with nf4 in 61 ms, 252 quantized products."""

SECOND_CARD = "torch 2.10"
"""The software of the second session, by which its rows are told apart."""

_CARD = "second card"


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A recorded step's operators and its time."""

    model: str
    weights: str
    attention: str
    shape: str
    on_second_card: bool
    seconds: float
    operators: recorded.StepOperators


@dataclass(frozen=True, slots=True)
class Fit:
    """A T4 with fitted rates; the second card takes *second_card* of the first one's time."""

    gpu: GpuSpec
    second_card: float

    def seconds(self, step: TimedStep) -> float:
        """Predicted, on the card that *step* ran on."""
        return max(self.on_device(step), self.on_host(step))

    def on_device(self, step: TimedStep) -> float:
        """Sum over its operators, on its card."""
        ops = step.operators
        device = latency.operator_seconds(ops.kinds, ops.flops, ops.num_bytes, self.gpu).sum()
        return float(device) * (self.second_card if step.on_second_card else 1.0)

    def on_host(self, step: TimedStep) -> float:
        """What launching its operators takes."""
        return float(latency.launch_seconds(step.operators.kinds, self.gpu).sum())

    def between_cards(self) -> GpuSpec:
        """The rates of a card midway between the two."""
        middle = math.sqrt(self.second_card)
        rates: dict[str, Any] = {name: getattr(self.gpu, name) / middle for name in MICROBENCHMARKS}
        return replace(self.gpu, **rates)


def timed_steps() -> list[TimedStep]:
    """Every recorded step with a time, traced."""
    runs = [run for run in recorded.runs() if run["step_s_steady"]]
    target = Target.of(load_gpu("t4"))
    return [
        TimedStep(
            model=run["model_id"].rpartition("/")[2],
            weights="nf4" if recorded.is_quantized(run) else "fp16",
            attention="eager" if recorded.is_eager(run) else "SDPA",
            shape=f"{run['batch']}x{run['max_seq']}",
            on_second_card=run["versions"].startswith(SECOND_CARD),
            seconds=run["step_s_steady"],
            operators=recorded.operators(recorded.trace(run, target)),
        )
        for run in track(runs, "tracing recorded steps", console=Console(stderr=True), transient=True)
    ]


def fit(steps: Sequence[TimedStep]) -> Fit:
    """The rates that predict *steps* best."""
    t4 = load_gpu("t4")

    def made(rates: fitting.Rates) -> Fit:
        named: dict[str, Any] = {name: rate for name, rate in rates.items() if name != _CARD}
        return Fit(replace(t4, **named), rates[_CARD])

    start = {**MICROBENCHMARKS, **HOST, _CARD: 1.0}
    timed = [(step, step.seconds) for step in steps]
    found = made(fitting.fit(start, lambda rates, step: made(rates).seconds(step), timed))
    if any(found.on_host(step) > 0.98 * found.on_device(step) for step in steps):
        return found
    elsewhere: dict[str, Any] = HOST_ELSEWHERE
    return replace(found, gpu=replace(found.gpu, **elsewhere))


def cross_validated(steps: Sequence[TimedStep]) -> list[float]:
    """Each step's predicted seconds, by rates fitted to the other models' steps."""
    models = {step.model for step in steps}
    fits = {model: fit([s for s in steps if s.model != model]) for model in models}
    return [fits[step.model].seconds(step) for step in steps]


def main() -> None:
    """Print the fitted rates, every row, and the errors."""
    warnings.simplefilter("ignore")
    steps = timed_steps()
    found, predicted = fit(steps), cross_validated(steps)
    console = Console(width=120)
    middle = found.between_cards()
    shipped = load_gpu("t4")
    for name in (*MICROBENCHMARKS, *HOST):
        console.print(f"{name:<34}fitted {getattr(middle, name):<10.3g} shipped {getattr(shipped, name):.3g}")
    console.print(f"the second card takes {found.second_card:.3f} of the first one's time")
    table = Table(box=None, pad_edge=False)
    for name in ("model", "weights", "attention", "shape"):
        table.add_column(name)
    for name in ("s", "measured", "error", "bound by"):
        table.add_column(name, justify="right")
    errors = [p / step.seconds - 1 for p, step in zip(predicted, steps, strict=True)]
    for step, seconds, error in zip(steps, predicted, errors, strict=True):
        bound = "host" if found.on_host(step) > found.on_device(step) else "device"
        cells = (f"{seconds:.3f}", f"{step.seconds:.3f}", f"{error:+.1%}", bound)
        table.add_row(step.model, step.weights, step.attention, step.shape, *cells)
    console.print(table)
    console.print("leave-one-model-out " + summary(errors))
    on_device = [e for e, s in zip(errors, steps, strict=True) if found.on_host(s) <= found.on_device(s)]
    console.print(f"of them {len(on_device)} bound by the device: " + summary(on_device))
    measured = [step.seconds for step in steps]
    console.print(f"rank correlation {spearmanr(predicted, measured).statistic:.4f}; within each model:")
    for model in sorted({step.model for step in steps}):
        pairs = [(p, s.seconds) for p, s in zip(predicted, steps, strict=True) if s.model == model]
        console.print(f"  {model}: {spearmanr(*zip(*pairs, strict=True)).statistic:.4f}")


def summary(errors: Sequence[float]) -> str:
    """Median, 90th percentile and worst absolute error."""
    sizes = sorted(map(abs, errors))
    return f"median {statistics.median(sizes):.1%}, p90 {np.quantile(sizes, 0.9):.1%}, worst {sizes[-1]:.1%}"


if __name__ == "__main__":
    main()
