"""The roofline: each operator takes its longer bound, a stretch its sum or the host's, a step its micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import costs, latency
from shallowflow.planner.costs import OP_KINDS, SEGMENTS, StepProfile
from shallowflow.profiles import GpuSpec, gpu_names, load_gpu
from shallowflow.profiles.load import RATES
from tests.strategies import T4, step_profiles

SPEEDS = tuple(name for name in RATES if name.endswith("_per_second"))
DELAYS = tuple(name for name in RATES if name.endswith("_seconds"))
ENDLESS: dict[str, Any] = dict.fromkeys(SPEEDS, 1e30)
BOUNDLESS = replace(T4, kernel_gap_seconds=0.0, **ENDLESS)
INSTANT = replace(T4, kernel_launch_seconds=0.0, quantized_launch_seconds=0.0)


def seconds(profile: StepProfile, gpu: GpuSpec, num_layers: int = 3, micro_batch_size: int = 2) -> tuple[float, float]:
    """(micro-batch, update)."""
    found = latency.step_seconds([(profile, num_layers)], micro_batch_size, 8, gpu)
    return found.micro_batch_seconds, found.update_seconds


@given(kind=st.sampled_from(OP_KINDS), flops=st.integers(0, 10**15), num_bytes=st.integers(0, 10**12), data=st.data())
def test_an_operator_takes_the_longer_of_arithmetic_and_bytes(
    kind: str, flops: int, num_bytes: int, data: st.DataObject
) -> None:
    """After a gap, flops over the kind's rate or bytes over its bandwidth, whichever is more; moving has no flops."""
    gpu = load_gpu(data.draw(st.sampled_from(gpu_names())))
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "int8"}
    *family, dtype = kind.split()
    field = f"{'attention_' if family == ['attention'] else ''}{short.get(dtype)}_flops_per_second"
    field = "dequantized_elements_per_second" if kind == "dequantize" else field

    found = latency.operator_seconds(
        np.array([OP_KINDS.index(kind)]), np.array([flops]), np.array([num_bytes]), gpu
    ).item()

    arithmetic = flops / getattr(gpu, field) if kind not in ("memory", "host") else 0.0
    bandwidth = {"host": gpu.pcie_bytes_per_second, "float32": gpu.fp32_matmul_bytes_per_second}
    moving = num_bytes / bandwidth.get(kind, gpu.dram_bytes_per_second)
    together = arithmetic + moving if gpu.device_type == "cpu" else max(arithmetic, moving)
    assert found == pytest.approx(gpu.kernel_gap_seconds + together)


@given(step_profiles(), st.integers(1, 60))
def test_where_the_device_is_instant_the_host_is_the_bound(profile: StepProfile, num_layers: int) -> None:
    """Then a step takes as many launches as it has operators, repeated as often as their layers are.

    A product with a quantized weight costs the host more.
    """
    inner, last = max(0, num_layers - 2), min(1, num_layers - 1)
    times = {"inner": inner, "inner_back": inner, "last": last, "last_back": last}
    names = [SEGMENTS[index] for index in profile.op_segment]
    quantized = [OP_KINDS[kind] in ("dequantize", "int8") for kind in profile.op_kind]
    costs_of = [T4.kernel_launch_seconds + q * T4.quantized_launch_seconds for q in quantized]

    micro_batch, update = seconds(profile, BOUNDLESS, num_layers)

    launching = list(zip(names, costs_of, strict=True))
    assert micro_batch == pytest.approx(sum(c * times.get(name, 1) for name, c in launching if name != "update"))
    assert update == pytest.approx(sum(c for name, c in launching if name == "update") * num_layers / 3)


@given(step_profiles(), st.integers(1, 60), st.integers(1, 16))
def test_a_step_is_never_faster_than_the_host_or_the_device(
    profile: StepProfile, num_layers: int, micro_batch_size: int
) -> None:
    """Both bounds hold, and one of them is met."""
    found = seconds(profile, T4, num_layers, micro_batch_size)

    host = seconds(profile, BOUNDLESS, num_layers, micro_batch_size)
    device = seconds(profile, INSTANT, num_layers, micro_batch_size)
    for actual, launching, working in zip(found, host, device, strict=True):
        assert actual == pytest.approx(max(launching, working))


@given(step_profiles(), st.integers(1, 60), st.integers(1, 15), st.integers(1, 15))
def test_more_samples_take_no_less_time(
    profile: StepProfile, num_layers: int, micro_batch_size: int, more: int
) -> None:
    """A larger micro-batch is never faster."""
    small, _ = seconds(profile, T4, num_layers, micro_batch_size)
    large, _ = seconds(profile, T4, num_layers, micro_batch_size + more)

    assert small <= large * (1 + 1e-12)


@given(step_profiles(), st.integers(2, 60), st.floats(1, 100))
def test_a_faster_gpu_takes_no_more_time(profile: StepProfile, num_layers: int, ratio: float) -> None:
    """Raising every rate by a ratio and launching as much faster divides the time by it."""
    changed: dict[str, Any] = {name: getattr(T4, name) * ratio for name in SPEEDS}
    changed |= {name: getattr(T4, name) / ratio for name in DELAYS}
    faster = replace(T4, **changed)

    assert seconds(profile, T4, num_layers) == pytest.approx(
        tuple(ratio * part for part in seconds(profile, faster, num_layers))
    )


@given(step_profiles(), st.integers(2, 60), st.integers(0, 20))
def test_time_is_linear_in_the_layers(profile: StepProfile, num_layers: int, more: int) -> None:
    """Each further inner layer costs the same, forward, backward and in the update."""
    flops, _ = costs.operator_costs(profile, 2, 8)
    work = flops.astype(np.float64)

    def total(depth: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array(costs.total_seconds([(profile, depth)], [costs.segment_seconds(profile, work)]))

    one_more = total(3) - total(2)
    assert total(num_layers + more) == pytest.approx(total(num_layers) + more * one_more, rel=1e-9, abs=1.0)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 64))
def test_a_step_is_its_micro_batches_and_one_update(micro_batch: float, update: float, accumulation: int) -> None:
    """Accumulation repeats the micro-batch and not the update."""
    found = latency.StepSeconds(micro_batch, update).step(accumulation)

    assert found == pytest.approx(accumulation * micro_batch + update)
