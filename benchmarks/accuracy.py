"""Predicted against recorded truth: LoRA steps that were measured on a real T4.

    python benchmarks/accuracy.py [--json]

Each step is rebuilt as its recording script built it, on ``meta``, with Hugging Face's, PEFT's and our modules, and
traced and replayed; nothing here is fitted to the rows.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shallowflow.planner import latency
from shallowflow.planner.costs import OP_KINDS
from shallowflow.planner.profiler.allocator import replay
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.trace import Recorder, Trace, recording
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.runtime import build, quantized
from shallowflow.runtime.simulated import register_quantization

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "measured" / "t4_fitcheck.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recorded step beside its prediction; a measured None was not recorded."""

    name: str
    model: str
    weights: str
    attention: str
    micro_batch_size: int
    sequence_length: int
    predicted_allocated_bytes: int
    measured_allocated_bytes: int
    predicted_reserved_bytes: int
    measured_reserved_bytes: int
    predicted_seconds: float
    measured_seconds: float | None

    @property
    def allocated_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_allocated_bytes / self.measured_allocated_bytes - 1

    @property
    def reserved_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_reserved_bytes / self.measured_reserved_bytes - 1

    @property
    def seconds_error(self) -> float | None:
        """Predicted over measured, less one."""
        return None if self.measured_seconds is None else self.predicted_seconds / self.measured_seconds - 1


def recorded_steps() -> list[dict[str, Any]]:
    """The recorded runs."""
    runs: list[dict[str, Any]] = json.loads(RECORDS.read_text(encoding="utf-8"))["runs"]
    return runs


def predict(run: dict[str, Any], gpu: GpuSpec) -> Row:
    """Rebuild the step of *run*, trace it and set the prediction beside the measurement."""
    quantization = "nf4" if run["quant"].startswith("nf4") else None
    eager = run["attn"] == "eager"
    trace = _trace(run, quantization, "eager" if eager else None, Target.of(gpu))
    steady = next(position for position, label in trace.marks if label == "step 1")
    end = next(position for position, label in trace.marks if label == "end")
    played = replay(trace.events[:end], trace.sizes)
    return Row(
        name=run["id"],
        model=run["model_id"].split("/")[-1],
        weights=quantization or "fp16",
        attention="eager" if eager else "SDPA",
        micro_batch_size=run["batch"],
        sequence_length=run["max_seq"],
        predicted_allocated_bytes=max(played.allocated_bytes[steady:]),
        measured_allocated_bytes=round(run["mem_peak_alloc_gib"] * 2**30),
        predicted_reserved_bytes=max(played.reserved_bytes),
        measured_reserved_bytes=round(run["mem_peak_reserved_gib"] * 2**30),
        predicted_seconds=_seconds(trace, steady, gpu),
        measured_seconds=run["step_s_steady"],
    )


def _trace(run: dict[str, Any], quantization: Any, attention: str | None, target: Target) -> Trace:
    """Load, adapt and train as the recording script did, all on ``meta`` and all recorded."""
    register_quantization()
    from peft import LoraConfig, get_peft_model

    base = build.load_model(run["model_id"], quantization, attn_implementation=attention)
    recorder = Recorder(target)
    with recording(recorder):
        load = _load_quantized if quantization else _move
        load(recorder, base)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        config = LoraConfig(
            r=run["lora_r"], lora_alpha=2 * run["lora_r"], target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        recorder.mark("loaded")
        tokens = torch.empty((run["batch"], run["max_seq"]), dtype=torch.int64, device="meta")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            output = model(input_ids=tokens, labels=tokens)
            output.loss.backward()
            optimizer.step()

        for index in range(2):
            recorder.phase = "forward"
            recorder.mark(f"step {index}")
            step()
        recorder.mark("end")
    return recorder.trace


def _move(recorder: Recorder, module: torch.nn.Module) -> None:
    """``model.cuda()``: children first, then a module's own parameters and buffers."""
    for child in module.children():
        _move(recorder, child)
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None:
            recorder.follow(tensor)


def _load_quantized(recorder: Recorder, model: torch.nn.Module) -> None:
    """``from_pretrained`` with a device map and bitsandbytes' nf4, then PEFT's k-bit preparation.

    transformers first takes and gives back one block of the final size; then each weight, in the order of the
    checkpoint's keys, arrives in fp16, is quantized and is freed. What stays in fp16 is cast to fp32 at the end.
    """
    named = dict(model.named_parameters())
    owners = {f"{path}.weight": module for path, module in model.named_modules() if quantized.is_quantized(module)}
    recorder.free(recorder.allocate(sum(p.numel() * p.element_size() for p in named.values())))
    for name in sorted(named, key=_natural):
        owner = owners.get(name)
        if owner is None:
            recorder.follow(named[name])
            continue
        half = recorder.allocate(2 * owner.in_features * owner.out_features)
        for constant in quantized.constants(owner):
            recorder.follow(constant)
        recorder.follow(named[name])
        recorder.free(half)
    for buffer in model.buffers():
        recorder.follow(buffer)
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _seconds(trace: Trace, steady: int, gpu: GpuSpec) -> float:
    """The roofline's sum over the second step's operators."""
    ops = [cost for position, cost in trace.ops if position > steady]
    kinds = np.array([OP_KINDS.index(op.kind) for op in ops])
    flops, num_bytes = np.array([op.flops for op in ops]), np.array([op.num_bytes for op in ops])
    return max(
        float(latency.operator_seconds(kinds, flops, num_bytes, gpu).sum()), len(ops) * gpu.kernel_launch_seconds
    )


def summary(errors: Sequence[float]) -> str:
    """Median and worst absolute error in percent."""
    sizes = [abs(e) for e in errors]
    return f"median {statistics.median(sizes):.3%}, worst {max(sizes):.2%} of {len(sizes)} rows"


def rows(every: int = 1) -> Iterator[Row]:
    """Predictions of every *every*-th recorded step."""
    gpu = load_gpu("t4")
    for run in recorded_steps()[::every]:
        yield predict(run, gpu)


def main(as_json: bool) -> None:
    """Print the table and the summaries."""
    warnings.simplefilter("ignore")
    console = Console(width=150)
    table = Table(box=None, pad_edge=False)
    headings = ("row", "model", "weights", "attention", "batch", "allocated GiB", "measured", "error", "reserved GiB")
    for name in (*headings, "measured", "error", "s", "measured", "error"):
        table.add_column(name, justify="left" if name in headings[:5] else "right", no_wrap=True)
    total = len(recorded_steps())
    found = list(track(rows(), "tracing recorded steps", total, console=Console(stderr=True), transient=True))
    for row in found:
        table.add_row(*_cells(row))
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
        return
    console.print(table)
    for name in ("SDPA", "eager"):
        chosen = [r for r in found if r.attention == name]
        console.print(f"{name}: peak allocated {summary([r.allocated_error for r in chosen])}")
        console.print(f"{name}: peak reserved  {summary([r.reserved_error for r in chosen])}")
        console.print(f"{name}: step seconds   {summary([e for r in chosen if (e := r.seconds_error) is not None])}")


def _cells(row: Row) -> tuple[str, ...]:
    timed = row.measured_seconds is not None and row.seconds_error is not None
    return (
        row.name,
        row.model.removesuffix("-Instruct").removesuffix("-Chat-v1.0"),
        row.weights,
        row.attention,
        f"{row.micro_batch_size}x{row.sequence_length}",
        f"{row.predicted_allocated_bytes / 2**30:.3f}",
        f"{row.measured_allocated_bytes / 2**30:.3f}",
        f"{row.allocated_error:+.2%}",
        f"{row.predicted_reserved_bytes / 2**30:.3f}",
        f"{row.measured_reserved_bytes / 2**30:.3f}",
        f"{row.reserved_error:+.1%}",
        f"{row.predicted_seconds:.2f}",
        f"{row.measured_seconds:.2f}" if timed else "",
        f"{row.seconds_error:+.0%}" if timed else "",
    )


if __name__ == "__main__":
    main("--json" in sys.argv[1:])
