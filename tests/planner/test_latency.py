"""The roofline: each operator takes its longer bound, a stretch its sum or the host's, a step its micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import costs, latency
from shallowflow.planner.communication import PCIE_LATENCY_SECONDS
from shallowflow.planner.costs import OP_KINDS, SEGMENTS, StepProfile
from shallowflow.planner.strategies import Strategy
from shallowflow.profiles import GpuSpec, gpu_names, load_gpu
from shallowflow.profiles.load import RATES
from tests.planner import tiny
from tests.profile_strategies import step_profiles
from tests.strategies import T4

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
    """After a gap, flops over the kind's rate or bytes over its bandwidth, whichever is more; moving has no flops.

    An arrival is no kernel. A gather's messages take their latency, then their bytes.
    """
    gpu = load_gpu(data.draw(st.sampled_from(gpu_names())))
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "int8"}
    *family, dtype = kind.split()
    field = f"{'attention_' if family == ['attention'] else ''}{short.get(dtype)}_flops_per_second"
    field = "dequantized_elements_per_second" if kind == "dequantize" else field

    found = latency.operator_seconds(
        np.array([OP_KINDS.index(kind)]), np.array([flops]), np.array([num_bytes]), gpu
    ).item()

    rate = 1 / PCIE_LATENCY_SECONDS if kind == "gather" else getattr(gpu, field, math.inf)
    bandwidth = dict.fromkeys(("host", "gather"), gpu.pcie_bytes_per_second)
    bandwidth["float32"] = gpu.fp32_matmul_bytes_per_second
    arithmetic, moving = flops / rate, num_bytes / bandwidth.get(kind, gpu.dram_bytes_per_second)
    in_turn = gpu.device_type == "cpu" or kind == "gather"
    together = arithmetic + moving if in_turn else max(arithmetic, moving)
    assert found == (0.0 if kind in ("arrival", "gathered") else pytest.approx(gpu.kernel_gap_seconds + together))


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


# Copies beside the computing

COMPUTE = OP_KINDS.index("memory")
segments_of_a_layer = st.lists(
    st.tuples(st.sampled_from([COMPUTE, latency.COPY, latency.ARRIVAL]), st.floats(0, 10, allow_subnormal=False)),
    min_size=1,
    max_size=20,
).map(lambda found: [(kind, 0.0 if kind == latency.ARRIVAL else seconds) for kind, seconds in found])
Operators = list[tuple[int, float]]


def scheduled(operators: Operators) -> float:
    """How long a segment takes."""
    kinds, took = (np.array(column) for column in zip(*operators, strict=True))
    return float(took[kinds != latency.COPY].sum()) + latency.unhidden_seconds(kinds, took)


def alone(operators: Operators, kind: int) -> float:
    """The sum of one kind's operators."""
    return sum(took for which, took in operators if which == kind)


def simulated(operators: Operators) -> float:
    """By events: both machines work through their queues; whichever is free and allowed to begins its next operator."""
    computing = [index for index, (kind, _) in enumerate(operators) if kind != latency.COPY]
    copies = [index for index, (kind, _) in enumerate(operators) if kind == latency.COPY]
    arrivals = [index for index in computing if operators[index][0] == latency.ARRIVAL]
    needs = {index: copies[: number + 1] for number, index in enumerate(arrivals)}
    ends: dict[int, float] = {}
    while len(ends) < len(operators):
        for queue, before in ((computing, {}), (copies, {i: [j for j in computing if j < i] for i in copies})):
            waiting = [index for index in queue if index not in ends]
            if not waiting:
                continue
            wanted = [*queue[: queue.index(waiting[0])], *before.get(waiting[0], []), *needs.get(waiting[0], [])]
            wanted = [index for index in wanted if index < waiting[0]]
            if all(index in ends for index in wanted):
                begin = max((ends[index] for index in wanted), default=0.0)
                ends[waiting[0]] = begin + operators[waiting[0]][1]
    return max(ends.values())


@given(segments_of_a_layer)
def test_a_segment_takes_what_its_events_take(operators: Operators) -> None:
    """The formula is the schedule that it describes."""
    assert scheduled(operators) == pytest.approx(simulated(operators))


@given(segments_of_a_layer)
def test_copies_hide_behind_computing_and_no_more(operators: Operators) -> None:
    """Never longer than one after the other, never shorter than either alone."""
    took = scheduled(operators)

    computing, copying = alone(operators, COMPUTE), alone(operators, latency.COPY)
    assert max(computing, copying) * (1 - 1e-12) <= took <= (computing + copying) * (1 + 1e-12)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=8))
def test_what_is_waited_for_at_once_hides_nothing(pairs: list[tuple[float, float]]) -> None:
    """Where each copy is needed as soon as it begins, or begins when all is computed, the two are a sum."""
    at_once: Operators = []
    for computing, copying in pairs:
        at_once += [(COMPUTE, computing), (latency.COPY, copying), (latency.ARRIVAL, 0.0)]
    late = sorted(at_once, key=lambda operator: operator[0])

    both = pytest.approx(sum(map(sum, pairs)))
    assert scheduled(at_once) == both
    assert scheduled(late) == both


@given(segments_of_a_layer)
def test_gathers_cross_as_copies_do(operators: Operators) -> None:
    """What comes from other GPUs hides behind computing as what comes from the host does, over one link."""
    other = {latency.COPY: latency.GATHER, latency.ARRIVAL: latency.GATHERED}
    gathers = [(other.get(kind, kind), took) for kind, took in operators]
    kinds, took = (np.array(column) for column in zip(*gathers, strict=True))

    found = float(took[kinds == COMPUTE].sum()) + latency.unhidden_seconds(kinds, took)

    assert found == pytest.approx(scheduled(operators))


@given(st.floats(0, 10))
def test_an_arrival_waits_for_its_own_kind(late: float) -> None:
    """A copy to the host that nobody waits for holds no gathered matrix up but by the link that it takes first."""
    gather: Operators = [(latency.GATHER, 1.0), (latency.GATHERED, 0.0)]
    sent: Operators = [(latency.COPY, late)]
    kinds, took = (np.array(column) for column in zip(*gather, *sent, (COMPUTE, late), strict=True))

    assert latency.unhidden_seconds(kinds, took) == pytest.approx(1.0)


@given(segments_of_a_layer, st.floats(1, 10))
def test_a_faster_link_takes_no_more_time(operators: Operators, ratio: float) -> None:
    """Whatever the copies and where they are needed."""
    faster = [(kind, took / ratio if kind == latency.COPY else took) for kind, took in operators]

    assert scheduled(faster) <= scheduled(operators) * (1 + 1e-12)


def test_an_offloaded_layer_takes_less_than_its_copies_and_its_computing() -> None:
    """In both passes of a real layer, whose forward pass still ends with a copy; without copies nothing changes."""
    strategy = Strategy(weight_format="nf4", activations="offload")
    profile = tiny.profiled("llama", "t4", strategy, 128)
    gpu = replace(T4, kernel_gap_seconds=0.0)

    found, _ = latency.profile_seconds(profile, 64, 8, gpu)

    flops, num_bytes = costs.operator_costs(profile, 64, 8)
    each = latency.operator_seconds(profile.op_kind, flops, num_bytes, gpu)
    is_copy = profile.op_kind == latency.COPY
    serial = costs.segment_seconds(profile, each)
    copying = costs.segment_seconds(profile, np.where(is_copy, each, 0.0))
    computing = costs.segment_seconds(profile, np.where(is_copy, 0.0, each))
    for segment in ("inner", "inner_back"):
        assert max(copying[segment], computing[segment]) < found[segment] < serial[segment]
    assert {name: found[name] for name in ("embed", "head", "update")} == {
        name: serial[name] for name in ("embed", "head", "update")
    }
