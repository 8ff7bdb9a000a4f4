"""What one of our steps spends its time on, on this CPU, predicted beside measured; and what packing documents gains.

python -m benchmarks.step_time     # after `sfplan calibrate`, or the rates are another machine's

Operators are timed by PyTorch's profiler, each without those that it calls. What is left of the step is the host's:
Python, autograd and the dispatcher, and the profiler itself.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shallowflow.planner import latency
from shallowflow.planner.allowed import ALPHA
from shallowflow.planner.costs import OP_KINDS
from shallowflow.planner.profiler import user_step
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.strategies import Activations, Configuration, Strategy, WeightFormat, uniform
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.profiles.load import load_model
from shallowflow.runtime import batches, build
from shallowflow.runtime.batches import Window
from shallowflow.runtime.heap import keeping_freed_memory
from shallowflow.runtime.meter import _silent_stderr
from shallowflow.runtime.simulated import register_quantization
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee

CPU = torch.device("cpu")
HOST = "python and host"
CATEGORIES = ("products", "attention", "element-wise", "dequantizing", "optimizer", HOST)
NUM_TIMED_STEPS = 5
CHARACTERS_PER_TOKEN = 4
LEAST_TOKENS = 8
TIMES_EACH = 3
"""Passes over the documents, of which the median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step of a model of random weights, LoRA of rank 16 on every linear layer, fp32."""

    model: str = "SmolLM2-135M"
    num_layers: int = 12
    micro_batch_size: int = 1
    sequence_length: int = 256
    weight_format: WeightFormat = "fp32"
    activations: Activations = "save"
    packing: bool = False

    def configuration(self) -> Configuration:
        """What a plan would say."""
        return Configuration(
            layers=uniform(Strategy(weight_format=self.weight_format, activations=self.activations), self.num_layers),
            rank=16,
            alpha=ALPHA["lora"],
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=1,
            packing=self.packing,
        )


WORKS = (Work(), Work(weight_format="nf4"), Work(micro_batch_size=4, sequence_length=128, activations="recompute"))
DOCUMENTS = Work(micro_batch_size=2)
"""How the documents are learned, packed and not."""
NUM_DOCUMENTS, ACCUMULATED = 96, 4


def trainee_of(work: Work, device: str) -> Trainee:
    """The model of *work*, ready to train."""
    torch.manual_seed(0)
    config = build.transformers_config(load_model(work.model).config, work.num_layers)
    return make_trainee(build.empty_model(config, "float32", device), work.configuration(), "float32")


def make_step(work: Work) -> Callable[[str], Callable[[], object]]:
    """A ``make_step(device)`` of *work*."""

    def make(device: str) -> Callable[[], object]:
        trainee = trainee_of(work, device)
        tokens = torch.ones((work.micro_batch_size, work.sequence_length), dtype=torch.int64, device=device)
        positions = torch.arange(work.sequence_length, device=device).expand_as(tokens) if work.packing else None
        batch = MicroBatch(tokens, torch.ones_like(tokens), tokens.numel(), positions)
        return lambda: trainee.step([batch])

    return make


# Predicted


def predicted(work: Work, gpu: GpuSpec) -> dict[str, float]:
    """Seconds by category; what every operator takes before it computes is the host's."""
    register_quantization()
    trace = user_step._trace(make_step(work), Target.of(gpu))
    kinds, flops, num_bytes = user_step.operator_arrays(user_step._steady(trace))
    seconds = latency.operator_seconds(kinds, flops, num_bytes, gpu)
    begins = max(position for position, label in trace.marks if label == "optimizer")
    start = next(position for position, label in trace.marks if label == f"step {user_step.NUM_STEPS - 1}")
    stop = next(position for position, label in trace.marks if label == "steady end")
    updates = [position > begins for position, _ in trace.ops if start < position <= stop]
    found = dict.fromkeys(CATEGORIES, 0.0)
    for kind, taken, is_update in zip(kinds, seconds, updates, strict=True):
        name = "optimizer" if is_update else _category(OP_KINDS[kind])
        found[name] += float(taken) - gpu.kernel_gap_seconds
        found[HOST] += gpu.kernel_gap_seconds
    return found


def _category(kind: str) -> str:
    if kind.startswith("attention"):
        return "attention"
    return {"memory": "element-wise", "dequantize": "dequantizing"}.get(kind, "products")


# Measured


def measured(work: Work) -> tuple[float, dict[str, float]]:
    """Median seconds of a step by itself, and the seconds by category of one under the profiler."""
    step = make_step(work)("cpu")
    step()
    plain = [_timed(step) for _ in range(NUM_TIMED_STEPS)]
    with _silent_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        whole = _timed(step)
    found = dict.fromkeys(CATEGORIES, 0.0)
    for event in profiled.events() or []:
        name = _event_category(event)
        if name is not None:
            found[name] += event.self_cpu_time_total * 1e-6
    found[HOST] = whole - sum(found.values())
    return statistics.median(plain), found


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _event_category(event: Any) -> str | None:
    """Of an operator's own time; None for what is no operator, such as a step of autograd."""
    above = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        above.append(event.name)
    own = above[0].removeprefix("aten::")
    if "::" not in above[0] or above[0].startswith("autograd::"):
        return None
    if any(name.startswith("Optimizer.step") for name in above):
        return "optimizer"
    if own in ("mm", "addmm", "bmm", "baddbmm", "linear"):
        return "products"
    if any(name.startswith("bitsandbytes::") for name in above):
        return "dequantizing"
    return "attention" if "attention" in own else "element-wise"


# Packed and not


def documents(length: int, most: int) -> list[Window]:
    """Paragraphs of Python's reference topics, in tokens that mean nothing; longer ones are cut to *length*."""
    paragraphs = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    lengths = (min(length, len(part) // CHARACTERS_PER_TOKEN) for part in paragraphs)
    kept = itertools.islice((n for n in lengths if n >= LEAST_TOKENS), most)
    return [Window((1,) * n, (1,) * n, n) for n in kept]


def passes(work: Work, every: Sequence[Window]) -> list[list[batches.Group]]:
    """One pass over *every*, as a run takes it: packed into sequences, or in micro-batches of like length."""
    windows = batches.packed(every, work.sequence_length) if work.packing else list(every)
    size = work.micro_batch_size
    accumulated = min(ACCUMULATED, len(windows) // size)
    endless = batches.steps(windows, size, accumulated, work.sequence_length, 0, first_whole=-batches.NUM_WHOLE_STEPS)
    return list(itertools.islice(endless, max(1, len(windows) // (size * accumulated))))


def tokens_per_second(work: Work, every: Sequence[Window], gpu: GpuSpec) -> tuple[float, float]:
    """Tokens of documents, predicted and measured."""
    steps = passes(work, every)
    num_tokens = sum(window.num_targets for step in steps for group in step for window in group.windows)
    by_length = {
        n: predicted(replace(work, sequence_length=n), gpu) for n in {group.length for step in steps for group in step}
    }
    micro = sum(sum(by_length[group.length].values()) for step in steps for group in step)
    update = statistics.median(found["optimizer"] for found in by_length.values())
    expected = micro - update * sum(len(step) - 1 for step in steps)  # one update for all micro-batches of a step
    trainee = trainee_of(work, "cpu")

    def run() -> None:
        for step in steps:
            trainee.step([batches.micro_batch(group.windows, CPU, group.length) for group in step])

    run()
    return num_tokens / expected, num_tokens / statistics.median(_timed(run) for _ in range(TIMES_EACH))


# Shown


def breakdown_table(works: Sequence[Work], gpu: GpuSpec) -> Table:
    """A row for each category of each step."""
    table = _table("step", "ms", "predicted", "share", "measured", "share")
    for work in works:
        expected = predicted(work, gpu)
        alone, found = measured(work)
        title = f"{work.weight_format}, {work.activations}, {work.micro_batch_size} x {work.sequence_length}"
        whole, profiled = sum(expected.values()), sum(found.values())
        table.add_row(title, "all, unprofiled", f"{whole * 1e3:.0f}", "", f"{alone * 1e3:.0f}", "")
        for name in CATEGORIES:
            mine, theirs = expected[name], found[name]
            shares = f"{mine / whole:.0%}", f"{theirs / profiled:.0%}"
            table.add_row("", name, f"{mine * 1e3:.0f}", shares[0], f"{theirs * 1e3:.0f}", shares[1])
    return table


def packing_table(work: Work, every: Sequence[Window], gpu: GpuSpec) -> Table:
    """Tokens of documents per second, packed and not, and the gain."""
    table = _table("documents", "tokens/s", "predicted", "", "measured", "")
    apart, packed = (tokens_per_second(replace(work, packing=packing), every, gpu) for packing in (False, True))
    mean = sum(window.num_targets for window in every) / len(every)
    title = f"{len(every)} of {mean:.0f} tokens, to {work.micro_batch_size} x {work.sequence_length}"
    table.add_row(title, "a sequence each", f"{apart[0]:.0f}", "", f"{apart[1]:.0f}", "")
    table.add_row("", "packed", f"{packed[0]:.0f}", "", f"{packed[1]:.0f}", "")
    table.add_row("", "gain", f"{packed[0] / apart[0]:.2f}", "", f"{packed[1] / apart[1]:.2f}", "")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 2 else "right")
    return table


def main() -> None:
    """Print both tables."""
    warnings.simplefilter("ignore")
    console, gpu = Console(width=100), load_gpu("cpu")
    with keeping_freed_memory():
        console.print(breakdown_table(WORKS, gpu))
        console.print()
        console.print(packing_table(DOCUMENTS, documents(DOCUMENTS.sequence_length, NUM_DOCUMENTS), gpu))


if __name__ == "__main__":
    main()
