"""What each operator of a step takes on a GPU, and on the host that launches it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowflow.profiles.specs import GpuSpec

from . import communication, costs
from .costs import OP_KINDS, Ints, LayerRuns, StepProfile

Seconds = npt.NDArray[np.float64]
COPY, ARRIVAL, GATHER, GATHERED = (OP_KINDS.index(kind) for kind in ("host", "arrival", "gather", "gathered"))
CROSSING = (COPY, GATHER)
"""Kinds that go on beside the computing, on the device's one link."""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One micro-batch's forward and backward passes, and one optimizer update."""

    micro_batch_seconds: float
    update_seconds: float

    def step(self, gradient_accumulation_steps: int) -> float:
        """One optimizer step with all its micro-batches."""
        return gradient_accumulation_steps * self.micro_batch_seconds + self.update_seconds


def step_seconds(
    runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec, length_share: float = 1.0
) -> StepSeconds:
    """Time of one step, operator by operator, by the roofline model (Williams, Waterman and Patterson, 2009).

    The device runs one operator after the other, with copies from and to the host beside them, while the host launches
    all of them ahead: a stretch takes the longer of the device's time and the host's. The rates are those that last
    under the chip's power cap. Left out: caches, and how a matrix product's shape fills the chip, but for the thin ones
    of adapters. With *length_share*, sequences are so much shorter than the profiled ones.
    """
    found = [profile_seconds(profile, micro_batch_size, rank, gpu, length_share) for profile, _ in runs]
    device, host = zip(*found, strict=True)
    on_device, on_host = costs.total_seconds(runs, device), costs.total_seconds(runs, host)
    return StepSeconds(max(on_device[0], on_host[0]), max(on_device[1], on_host[1]))


def profile_seconds(
    profile: StepProfile, micro_batch_size: int, rank: int, gpu: GpuSpec, length_share: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every segment of *profile* on the device, and on the host that launches it.

    A sequence of which only *length_share* is there takes what so much of one takes, and attention its square.
    """
    if length_share == 1.0:
        flops, num_bytes = costs.operator_costs(profile, micro_batch_size, rank)
    else:
        flops, num_bytes = costs.operator_costs(profile, micro_batch_size * length_share, rank)
        flops = np.where(np.isin(profile.op_kind, _QUADRATIC), flops * length_share, flops)
    seconds = operator_seconds(profile.op_kind, flops, num_bytes, gpu)
    waiting = waiting_seconds(profile, seconds)
    computing = costs.segment_seconds(profile, np.where(np.isin(profile.op_kind, CROSSING), 0.0, seconds))
    device = {name: computing[name] + waiting[name] for name in computing}
    return device, costs.segment_seconds(profile, launch_seconds(profile.op_kind, gpu))


def waiting_seconds(profile: StepProfile, seconds: Seconds) -> dict[str, float]:
    """How long the computing of every segment waits for what crosses, where each operator takes its *seconds*."""
    found = dict.fromkeys(costs.SEGMENTS, 0.0)
    for segment in np.unique(profile.op_segment[np.isin(profile.op_kind, CROSSING)]):
        here = profile.op_segment == segment
        found[costs.SEGMENTS[segment]] = unhidden_seconds(profile.op_kind[here], seconds[here])
    return found


def unhidden_seconds(kinds: Ints, seconds: Seconds) -> float:
    """What copies add to the time that the other operators of a segment take, in the order in which they are issued.

    List scheduling on two machines (Graham, 1966): the device computes, the link copies, each one thing after the
    other. A copy starts when what was issued before it is computed and the link is free; computing goes on beside it.
    The n-th arrival holds the computing up until the n-th copy is done, the segment ends when both have. So it is with
    what is gathered from other devices, over the same link.

    That copies arrive in the order of their first uses holds but for those that one operator needs together. Left out:
    that a copy takes memory bandwidth from the computing, and what else the link carries; that a link carries two ways
    at once is not counted on.
    """
    computed = np.cumsum(np.where(np.isin(kinds, CROSSING), 0.0, seconds))
    done: dict[int, list[float]] = {ARRIVAL: [], GATHERED: []}
    num_arrived = {ARRIVAL: 0, GATHERED: 0}
    late = free = 0.0
    for at in np.flatnonzero(np.isin(kinds, (*CROSSING, ARRIVAL, GATHERED))):
        kind, now = int(kinds[at]), computed[at] + late
        if kind in CROSSING:
            free = max(free, now) + seconds[at]
            done[ARRIVAL if kind == COPY else GATHERED].append(free)
        else:
            num_arrived[kind] += 1
            late += max(0.0, max(done[kind][: num_arrived[kind]], default=0.0) - now)
    return float(max(late, free - computed[-1]))


def stretch_seconds(kinds: Ints, flops: Ints, num_bytes: Ints, gpu: GpuSpec) -> float:
    """Seconds of these operators in a row: the device's or the host's, whichever are more."""
    on_device = float(operator_seconds(kinds, flops, num_bytes, gpu).sum())
    return max(on_device, float(launch_seconds(kinds, gpu).sum()))


def operator_seconds(kinds: Ints, flops: Ints, num_bytes: Ints, gpu: GpuSpec) -> Seconds:
    """Seconds on the device of each operator; *kinds* index OP_KINDS.

    The longer of its arithmetic at its kind's rate and its bytes at theirs, after the gap that every kernel leaves. On
    a CPU both in turn: its libraries rearrange a product's factors before they compute. An arrival runs nothing.
    """
    rates = np.array([_rate(gpu, kind) for kind in OP_KINDS])
    moved = np.array([_bandwidth(gpu, kind) for kind in OP_KINDS])
    computing, moving = flops / rates[kinds], num_bytes / moved[kinds]
    in_turn = np.isin(kinds, GATHER) if gpu.device_type == "cuda" else np.True_  # a message's latency, then its bytes
    busy = np.where(in_turn, computing + moving, np.maximum(computing, moving))
    seconds: Seconds = np.where(np.isin(kinds, (ARRIVAL, GATHERED)), 0.0, gpu.kernel_gap_seconds + busy)
    return seconds


def launch_seconds(kinds: Ints, gpu: GpuSpec) -> Seconds:
    """Seconds of the host for each operator."""
    extra = [gpu.quantized_launch_seconds if kind in ("dequantize", "int8") else 0.0 for kind in OP_KINDS]
    seconds: Seconds = gpu.kernel_launch_seconds + np.array(extra)[kinds]
    return seconds


_QUADRATIC = [index for index, kind in enumerate(OP_KINDS) if kind.startswith(("attention", "batched"))]
"""Kinds whose arithmetic grows with the square of the sequence length."""


def _rate(gpu: GpuSpec, kind: str) -> float:
    matrix = {
        "float16": gpu.fp16_flops_per_second,
        "bfloat16": gpu.bf16_flops_per_second,
        "float32": gpu.fp32_flops_per_second,
    }
    return {
        **matrix,
        **{f"batched {dtype}": rate for dtype, rate in matrix.items()},
        "int8": gpu.int8_flops_per_second,
        "attention float16": gpu.attention_fp16_flops_per_second,
        "attention bfloat16": gpu.attention_bf16_flops_per_second,
        "attention float32": gpu.attention_fp32_flops_per_second,
        "dequantize": gpu.dequantized_elements_per_second,
        "gather": 1 / communication.pcie(gpu.pcie_bytes_per_second).latency_seconds,
    }.get(kind, np.inf)


def _bandwidth(gpu: GpuSpec, kind: str) -> float:
    if kind in ("host", "gather"):
        return gpu.pcie_bytes_per_second
    return gpu.fp32_matmul_bytes_per_second if kind == "float32" else gpu.dram_bytes_per_second
