"""Steps that were recorded on a real T4, rebuilt on ``meta`` as their script built them, and replayed."""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shallowflow.planner import latency
from shallowflow.planner.costs import OP_KINDS
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.replay import Replay, replay
from shallowflow.planner.profiler.trace import Recorder, Trace
from shallowflow.profiles import GpuSpec
from shallowflow.runtime import build, quantized
from shallowflow.runtime.simulated import register_quantization

MEASURED = Path(__file__).resolve().parent.parent / "tests" / "measured"
RECORDS = MEASURED / "t4_fitcheck.json"
HELD_OUT = MEASURED / "t4_held_out.json"
"""A later session of the same authors, on models of 1.2 to 7.6 billion parameters, to which nothing was ever fitted."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
NUM_LOAD_ORDERS = 24
NUM_STEPS = 3
"""A warm-up, the step whose peaks were read, and one whose phases were."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight's way to the GPU.

    Attributes:
        arrives: the event of its fp16 copy, or of itself where it is not quantized; None for a tied one.
        quantized: the events of its quantization: constants and packed bytes made, the fp16 copy freed.
        num_bytes: in fp16.
    """

    arrives: int | None
    quantized: tuple[int, ...]
    num_bytes: int


@dataclass(slots=True)
class RecordedStep:
    """A recorded run's trace, with its loading kept apart so that it can be put in another order.

    Attributes:
        weights: in the order of the checkpoint's keys; empty where nothing was quantized.
        loading: first and last event of them, as positions in the trace.
    """

    trace: Trace
    weights: list[Weight] = field(default_factory=list)
    loading: tuple[int, int] = (0, 0)

    def mark(self, label: str, after: int = 0) -> int:
        """The position of the first mark called *label* at or after *after*."""
        return next(p for p, name in self.trace.marks if name == label and p >= after)

    def replayed(self, order: Sequence[int] | None = None) -> Replay:
        """The allocator's levels, with the weights' events in *order*; None is one weight after the other."""
        events = self.trace.events[: self.mark("end")]
        if order is not None:
            first, last = self.loading
            events = [*events[:first], *order, *events[last:]]
        return replay(events, self.trace.sizes)


@dataclass(frozen=True, slots=True)
class Levels:
    """What the recording script read, in bytes: after loading, at most, and at most in each phase."""

    resident: int
    allocated: int
    reserved: int
    forward: int
    backward: int
    optimizer: int


def runs(path: Path = RECORDS) -> list[dict[str, Any]]:
    """The runs recorded in *path*, each with its ``phases`` where those were recorded."""
    records = json.loads(path.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = records["runs"]
    for run in found:
        run["phases"] = next((p for p in records["phases"] if _same(run, p)), None)
    return found


def _same(run: dict[str, Any], phases: dict[str, Any]) -> bool:
    named = (phases["model_id"], phases["batch_size"], phases["seq_len"]) == (
        run["model_id"],
        run["batch"],
        run["max_seq"],
    )
    kind = is_quantized(run) == (phases["quantization"] == "nf4") and is_eager(run) == (phases["attn_impl"] == "eager")
    peaks = (("mem_peak_alloc_gib", "peak_allocated_mib"), ("mem_peak_reserved_gib", "peak_reserved_mib"))
    return named and kind and all(abs(run[a] - phases[b] / 1024) < 6e-5 for a, b in peaks)


def is_quantized(run: dict[str, Any]) -> bool:
    """Whether the run's base weights were nf4; fp16 otherwise."""
    return bool(run["quant"].startswith("nf4"))


def is_eager(run: dict[str, Any]) -> bool:
    """Whether it had eager attention; memory-efficient SDPA otherwise."""
    return bool(run["attn"] == "eager")


def trace(run: dict[str, Any], target: Target) -> RecordedStep:
    """Load, adapt and train as the recording script did, all on ``meta`` and all recorded."""
    register_quantization()
    from peft import LoraConfig, get_peft_model

    quantization: Any = "nf4" if is_quantized(run) else None
    base = build.load_model(run["model_id"], quantization, attn_implementation="eager" if is_eager(run) else None)
    recorder = Recorder(target)
    recorded = RecordedStep(recorder.trace)
    with recording(recorder):
        if quantization:
            _load_quantized(recorder, base, recorded)
        else:
            _move(recorder, base)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        config = LoraConfig(
            r=run["lora_r"], lora_alpha=2 * run["lora_r"], target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
        model.train()
        recorder.mark("loaded")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        tokens = torch.empty((run["batch"], run["max_seq"]), dtype=torch.int64, device="meta")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            output = model(input_ids=tokens, labels=tokens)
            output.loss.backward()
            optimizer.step()

        for index in range(NUM_STEPS):
            recorder.phase = "forward"
            recorder.mark(f"step {index}")
            step()
        recorder.mark("end")
    return recorded


def _move(recorder: Recorder, module: torch.nn.Module) -> None:
    """``model.cuda()``: children first, then a module's own parameters and buffers."""
    for child in module.children():
        _move(recorder, child)
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None:
            recorder.follow(tensor)


def _load_quantized(recorder: Recorder, model: torch.nn.Module, recorded: RecordedStep) -> None:
    """``from_pretrained`` with a device map and bitsandbytes' nf4, then PEFT's k-bit preparation.

    transformers first takes and gives back one block of the final size; then each weight arrives in fp16, is quantized
    and is freed. What stays in fp16 is cast to fp32 at the end.
    """
    named = dict(model.named_parameters())
    owners = {f"{path}.weight": module for path, module in model.named_modules() if quantized.is_quantized(module)}
    events = recorder.trace.events
    recorder.free(recorder.allocate(sum(p.numel() * p.element_size() for p in named.values())))
    first = len(events)
    for name in sorted(named, key=_natural):
        owner, before = owners.get(name), len(events)
        num_bytes = 2 * (owner.in_features * owner.out_features if owner else named[name].numel())
        if owner is None:
            recorder.follow(named[name])
        else:
            half = recorder.allocate(num_bytes)
            absmax, *others = quantized.constants(owner)
            for tensor in (absmax, named[name], *others):
                recorder.follow(tensor)
            recorder.free(half)
        made = events[before:]
        recorded.weights.append(Weight(made[0] if made else None, tuple(made[1:]), num_bytes))
    recorded.loading = (first, len(events))
    for buffer in model.buffers():
        recorder.follow(buffer)
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


NUM_LOADERS = 4
"""Threads that transformers loads with (its GLOBAL_WORKERS)."""

DISK_BYTES_PER_SECOND = (0.2e9, 4e9)
"""One thread reading and casting: from a cold network disk to a warm page cache."""

COPY_BYTES_PER_SECOND = (3e9, 6e9)
"""Pageable host memory to the GPU; one copy at a time."""

QUANTIZE_BYTES_PER_SECOND = (20e9, 80e9)
PYTHON_SECONDS = (3e-4, 1e-3)
"""Per weight in the main thread: finding its module, launching, moving the progress bar."""

TASK_SECONDS = (5e-5, 2e-4)
"""Per weight in a loading thread."""

JITTER = 0.7
"""Standard deviation of the logarithm of each duration: two cores share five threads."""


def load_order(weights: Sequence[Weight], rng: random.Random) -> list[int]:
    """The weights' events in one order that loading with several threads may have.

    The threads fetch weights in the order of their keys, each at its own pace; the main thread quantizes them in that
    order as they come. How many fp16 copies wait on the GPU meanwhile decides where everything comes to lie. The rates
    are drawn from what such machines do, not from the recorded rows.
    """

    def drawn(bounds: tuple[float, float]) -> float:
        return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))

    disk, copy, quantize = map(drawn, (DISK_BYTES_PER_SECOND, COPY_BYTES_PER_SECOND, QUANTIZE_BYTES_PER_SECOND))
    python, task = drawn(PYTHON_SECONDS), drawn(TASK_SECONDS)

    def jitter() -> float:
        return rng.lognormvariate(0, JITTER)

    def fetched(start: float, index: int) -> tuple[float, int]:
        return start + (task + weights[index].num_bytes / disk) * jitter(), index

    events: list[tuple[float, int, int, tuple[int, ...]]] = []
    there = [0.0] * len(weights)
    queue = [fetched(0.0, index) for index in range(min(NUM_LOADERS, len(weights)))]
    heapq.heapify(queue)
    waiting, copied = len(queue), 0.0
    while queue:
        moment, index = heapq.heappop(queue)
        arrives = weights[index].arrives
        if arrives is not None:
            events.append((moment, index, 0, (arrives,)))
        copied = there[index] = max(moment, copied) + weights[index].num_bytes / copy
        if waiting < len(weights):
            heapq.heappush(queue, fetched(copied, waiting))
            waiting += 1
    clock = 0.0
    for index, weight in enumerate(weights):
        clock = max(clock, there[index]) + python * jitter()
        if weight.quantized:
            clock += weight.num_bytes / quantize
            events.append((clock, index, 1, weight.quantized))
    return [event for _, _, _, group in sorted(events) for event in group]


def levels(recorded: RecordedStep, order: Sequence[int] | None = None) -> Levels:
    """What the script would have read, had the weights been loaded in *order*."""
    played = recorded.replayed(order)
    allocated, reserved = played.allocated_bytes, played.reserved_bytes
    second, third, end = recorded.mark("step 1"), recorded.mark("step 2"), recorded.mark("end")
    backward = recorded.mark("backward", third)
    optimizer = recorded.mark("optimizer", third)
    return Levels(
        resident=allocated[recorded.mark("loaded") - 1],
        allocated=max(allocated[second:third]),
        reserved=max(reserved[:third]),
        forward=max(allocated[third:backward]),
        backward=max(allocated[backward:optimizer]),
        optimizer=max(allocated[optimizer:end]),
    )


def spread(recorded: RecordedStep) -> list[Levels]:
    """The levels of every load order that is tried; one where order makes no difference."""
    if not recorded.weights:
        return [levels(recorded)]
    return [levels(recorded, load_order(recorded.weights, random.Random(seed))) for seed in range(NUM_LOAD_ORDERS)]


@dataclass(frozen=True, slots=True)
class StepOperators:
    """The second step's operators, as the latency model counts them."""

    kinds: npt.NDArray[np.int64]
    flops: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]

    def seconds(self, gpu: GpuSpec) -> float:
        """What they take on *gpu*."""
        return latency.stretch_seconds(self.kinds, self.flops, self.num_bytes, gpu)


def operators(recorded: RecordedStep) -> StepOperators:
    """The operators of the step whose time was read."""
    start, end = recorded.mark("step 1"), recorded.mark("step 2")
    ops = [cost for position, cost in recorded.trace.ops if start < position <= end]
    return StepOperators(
        np.array([OP_KINDS.index(op.kind) for op in ops]),
        np.array([op.flops for op in ops]),
        np.array([op.num_bytes for op in ops]),
    )
