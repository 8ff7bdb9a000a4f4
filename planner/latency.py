"""A roofline for time: what each operator of a step takes on a GPU, summed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shallowflow.profiles.specs import GpuSpec

from . import costs
from .costs import OP_KINDS, Ints, LayerRuns, StepProfile


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One micro-batch's forward and backward passes, and one optimizer update."""

    micro_batch_seconds: float
    update_seconds: float

    def step(self, gradient_accumulation_steps: int) -> float:
        """One optimizer step with all its micro-batches."""
        return gradient_accumulation_steps * self.micro_batch_seconds + self.update_seconds


def step_seconds(runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec) -> StepSeconds:
    """Time of one step by the roofline model (Williams, Waterman and Patterson, 2009), operator by operator.

    An operator takes the longer of its arithmetic at the GPU's sustained rate for its dtype and its bytes at the
    sustained memory bandwidth. A stretch of them takes the longer of that sum and the host's time to launch them.
    Left out: caches, fusion, the shape of a matrix product, the clock's drop under a long load.
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
    host = np.full(len(flops), gpu.kernel_launch_seconds)
    return costs.segment_seconds(profile, device), costs.segment_seconds(profile, host)


def operator_seconds(kinds: Ints, flops: Ints, num_bytes: Ints, gpu: GpuSpec) -> npt.NDArray[np.float64]:
    """Seconds on the device of each operator; *kinds* index OP_KINDS."""
    rates = np.array([_rate(gpu, kind) for kind in OP_KINDS])
    moved = np.array([gpu.pcie_bytes_per_second if kind == "host" else gpu.dram_bytes_per_second for kind in OP_KINDS])
    seconds: npt.NDArray[np.float64] = np.maximum(flops / rates[kinds], num_bytes / moved[kinds])
    return seconds


def _rate(gpu: GpuSpec, kind: str) -> float:
    return {
        "float16": gpu.fp16_flops_per_second,
        "bfloat16": gpu.bf16_flops_per_second,
        "float32": gpu.fp32_flops_per_second,
        "memory": np.inf,
        "host": np.inf,
    }[kind]
