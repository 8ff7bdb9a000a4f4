"""What each operator of a step takes on a GPU, and on the host that launches it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowflow.profiles.specs import GpuSpec

from . import costs
from .costs import OP_KINDS, Ints, LayerRuns, StepProfile

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One micro-batch's forward and backward passes, and one optimizer update."""

    micro_batch_seconds: float
    update_seconds: float

    def step(self, gradient_accumulation_steps: int) -> float:
        """One optimizer step with all its micro-batches."""
        return gradient_accumulation_steps * self.micro_batch_seconds + self.update_seconds


def step_seconds(runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec) -> StepSeconds:
    """Time of one step, operator by operator, by the roofline model (Williams, Waterman and Patterson, 2009).

    The device runs one operator after the other, while the host launches them ahead: a stretch takes the longer of the
    two sums. The rates are those that last under the chip's power cap. Left out: caches, and how a matrix product's
    shape fills the chip, but for the thin ones of adapters.
    """
    device, host = zip(*(profile_seconds(profile, micro_batch_size, rank, gpu) for profile, _ in runs), strict=True)
    on_device, on_host = costs.total_seconds(runs, device), costs.total_seconds(runs, host)
    return StepSeconds(max(on_device[0], on_host[0]), max(on_device[1], on_host[1]))


def profile_seconds(
    profile: StepProfile, micro_batch_size: int, rank: int, gpu: GpuSpec
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every segment of *profile* on the device, and on the host that launches it."""
    flops, num_bytes = costs.operator_costs(profile, micro_batch_size, rank)
    device = operator_seconds(profile.op_kind, flops, num_bytes, gpu)
    host = launch_seconds(profile.op_kind, gpu)
    return costs.segment_seconds(profile, device), costs.segment_seconds(profile, host)


def stretch_seconds(kinds: Ints, flops: Ints, num_bytes: Ints, gpu: GpuSpec) -> float:
    """Seconds of these operators in a row: the device's or the host's, whichever are more."""
    on_device = float(operator_seconds(kinds, flops, num_bytes, gpu).sum())
    return max(on_device, float(launch_seconds(kinds, gpu).sum()))


def operator_seconds(kinds: Ints, flops: Ints, num_bytes: Ints, gpu: GpuSpec) -> Seconds:
    """Seconds on the device of each operator; *kinds* index OP_KINDS.

    The longer of its arithmetic at its kind's rate and its bytes at theirs, after the gap that every kernel leaves. On
    a CPU both in turn: its libraries rearrange a product's factors before they compute.
    """
    rates = np.array([_rate(gpu, kind) for kind in OP_KINDS])
    moved = np.array([_bandwidth(gpu, kind) for kind in OP_KINDS])
    computing, moving = flops / rates[kinds], num_bytes / moved[kinds]
    busy = computing + moving if gpu.device_type == "cpu" else np.maximum(computing, moving)
    seconds: Seconds = gpu.kernel_gap_seconds + busy
    return seconds


def launch_seconds(kinds: Ints, gpu: GpuSpec) -> Seconds:
    """Seconds of the host for each operator."""
    extra = [gpu.quantized_launch_seconds if kind in ("dequantize", "int8") else 0.0 for kind in OP_KINDS]
    seconds: Seconds = gpu.kernel_launch_seconds + np.array(extra)[kinds]
    return seconds


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
    }.get(kind, np.inf)


def _bandwidth(gpu: GpuSpec, kind: str) -> float:
    if kind == "host":
        return gpu.pcie_bytes_per_second
    return gpu.fp32_matmul_bytes_per_second if kind == "float32" else gpu.dram_bytes_per_second
