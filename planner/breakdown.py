"""Where a step's time goes: by kind of operator, by layer, and whether device or host is the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shallowflow.profiles.specs import GpuSpec

from . import costs, latency
from .costs import OP_KINDS, LayerRuns, StepProfile
from .plan import LayerTime, StepTime, TimePart

KIND_NAMES = {
    "float16": "fp16 products",
    "bfloat16": "bf16 products",
    "float32": "fp32 products",
    "int8": "int8 products",
    "batched float16": "fp16 products of attention",
    "batched bfloat16": "bf16 products of attention",
    "batched float32": "fp32 products of attention",
    "attention float16": "fused attention in fp16",
    "attention bfloat16": "fused attention in bf16",
    "attention float32": "fused attention in fp32",
    "dequantize": "dequantizing",
    "memory": "element-wise and copies",
    "host": "copies to and from the host that nothing hides",
    "gather": "gathering weights that nothing hides",
}
HEAD_FORWARD_SHARE, LEARNED_HEAD_FORWARD_SHARE = 1 / 2, 1 / 3
"""Of the head's and the loss's time: logits are computed, then as many operations lead back through them, and as many
again to a head that learns."""


def step_time(
    runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec, accumulation: int, waiting: float = 0.0
) -> StepTime:
    """The time of one step of the model of *runs*, taken apart; *waiting* is for other GPUs."""
    device, host = _sums(runs, micro_batch_size, rank, gpu)
    return StepTime(
        bound="host" if host[0] > device[0] else "device",
        device_seconds=accumulation * device[0] + device[1],
        host_seconds=accumulation * host[0] + host[1],
        waiting_seconds=waiting,
        kinds=_kinds(runs, micro_batch_size, rank, gpu, accumulation),
        layers=_layers(runs, micro_batch_size, rank, gpu),
        update_seconds=max(device[1], host[1]),
    )


def of_each_stage(time: StepTime, num_stages: int, step_seconds: float) -> StepTime:
    """*time* of a whole model, as each of its stages has it on the mean in a step; the rest is waiting for others."""
    device, host = time.device_seconds / num_stages, time.host_seconds / num_stages
    return replace(
        time,
        device_seconds=device,
        host_seconds=host,
        waiting_seconds=max(0.0, step_seconds - max(device, host)),
        kinds=tuple(replace(part, seconds=part.seconds / num_stages) for part in time.kinds),
        update_seconds=time.update_seconds / num_stages,
    )


def forward_seconds(runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec) -> float:
    """One micro-batch's forward pass and loss, as an evaluation runs it.

    Counted too are copies to the host, which it does without.
    """
    longest = 0.0
    for side in (0, 1):
        segments = [latency.profile_seconds(profile, micro_batch_size, rank, gpu)[side] for profile, _ in runs]
        ahead = [
            {name: 0.0 if name.endswith("_back") or name == "update" else seconds for name, seconds in found.items()}
            for found in segments
        ]
        for found in ahead:
            found["head"] *= LEARNED_HEAD_FORWARD_SHARE if len(runs[-1][0].outside_gradients) else HEAD_FORWARD_SHARE
        longest = max(longest, costs.total_seconds(runs, ahead)[0])
    return longest


def _sums(
    runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(micro-batch, update) on the device, and on the host."""
    device, host = zip(*(latency.profile_seconds(p, micro_batch_size, rank, gpu) for p, _ in runs), strict=True)
    return costs.total_seconds(runs, device), costs.total_seconds(runs, host)


def _kinds(runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec, accumulation: int) -> tuple[TimePart, ...]:
    """Seconds on the device by kind of operator, most first, each with the part that is no gap between kernels.

    Copies count for as long as the computing waits for them.
    """
    found: list[TimePart] = []
    for index, kind in enumerate(OP_KINDS):
        sums = [0.0, 0.0]
        for gaps in (0, 1):
            segments = []
            for profile, _ in runs:
                flops, num_bytes = costs.operator_costs(profile, micro_batch_size, rank)
                seconds = latency.operator_seconds(profile.op_kind, flops, num_bytes, gpu)
                of_kind = profile.op_kind == index
                seconds -= (1 - gaps) * gpu.kernel_gap_seconds * of_kind
                if index in latency.CROSSING:
                    segments.append(_waiting(profile, seconds, index))
                else:
                    segments.append(costs.segment_seconds(profile, np.where(of_kind, seconds, 0.0)))
            micro_batch, update = costs.total_seconds(runs, segments)
            sums[gaps] = accumulation * micro_batch + update
        if sums[1]:
            share = min(1.0, max(0.0, sums[0] / sums[1]))
            found.append(TimePart(kind=KIND_NAMES[kind], seconds=sums[1], roofline_share=share))
    return tuple(sorted(found, key=lambda part: -part.seconds))


def _waiting(profile: StepProfile, seconds: latency.Seconds, kind: int) -> dict[str, float]:
    """How long the computing waits for what crosses of one *kind*; for gathers, beyond its waiting for copies."""
    copies = latency.waiting_seconds(profile, np.where(profile.op_kind == latency.GATHER, 0.0, seconds))
    if kind == latency.COPY:
        return copies
    both = latency.waiting_seconds(profile, seconds)
    return {name: both[name] - copies[name] for name in both}


def _layers(runs: LayerRuns, micro_batch_size: int, rank: int, gpu: GpuSpec) -> tuple[LayerTime, ...]:
    """What a layer of each run takes in one micro-batch, on the device."""
    found: list[LayerTime] = []
    first = 0
    for profile, count in runs:
        segments, _ = latency.profile_seconds(profile, micro_batch_size, rank, gpu)
        last = first + count - 1
        found.append(
            LayerTime(
                first=first, last=last, forward_seconds=segments["inner"], backward_seconds=segments["inner_back"]
            )
        )
        first = last + 1
    return tuple(found)
