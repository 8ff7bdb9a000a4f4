"""A profile of three layers stands for a model of any depth, at any micro-batch and rank."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner import costs
from shallowflow.planner.costs import OP_KINDS, SEGMENTS, Ints, StepProfile
from shallowflow.planner.profiler.trace import Trace
from shallowflow.planner.strategies import (
    Activations,
    Adapter,
    Configuration,
    Strategy,
    StrategyRun,
    TargetGroup,
    TargetModules,
    WeightFormat,
)
from shallowflow.runtime.build import empty_model, transformers_config
from shallowflow.runtime.step import MicroBatch, make_trainee
from tests import flops as flop_count
from tests.planner import tiny
from tests.planner.tiny import FAMILIES, VOCABULARY, configuration
from tests.profile_strategies import same, step_profiles
from tests.strategies import FORMATS, POLICIES


def block_levels(trace: Trace, alignment: int) -> list[int]:
    """The whole blocks that live after each event."""
    rounded = [-(-size // alignment) * alignment for size in trace.sizes]
    return list(accumulate(rounded[event - 1] if event > 0 else -rounded[-event - 1] for event in trace.events))


@settings(max_examples=30)
@given(
    family=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    weight_format=st.sampled_from(FORMATS),
    activations=st.sampled_from(POLICIES),
    num_layers=st.integers(2, 6),
    micro_batch_size=st.integers(1, 6),
    rank=st.sampled_from([1, 4, 8, 13, 48]),  # less than the width, from which on adapters would be offloaded, too
    accumulation=st.integers(1, 2),
    adapter=st.sampled_from(["lora", "lora", "dora"]),
    on=st.sampled_from(["all-linear", "all-linear", "attention", "names"]),
)
def test_composition_is_the_full_trace(
    family: str,
    weight_format: WeightFormat,
    activations: Activations,
    num_layers: int,
    micro_batch_size: int,
    rank: int,
    accumulation: int,
    adapter: Adapter,
    on: TargetGroup | Literal["names"],
) -> None:
    """Footprints composed from three layers are those of all; only accumulation and the update are nearly so."""
    target_modules: TargetModules = tiny.NAMES[family] if on == "names" else on
    chosen = configuration(
        weight_format,
        activations,
        num_layers=num_layers,
        rank=rank,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
    )
    chosen = replace(chosen, adapter=adapter, target_modules=target_modules)
    strategy = Strategy(weight_format=weight_format, activations=activations)
    profile = tiny.profiled(family, "t4", strategy, adapter=adapter, target_modules=target_modules)

    composed = costs.footprint([(profile, num_layers)], micro_batch_size, rank, accumulates=accumulation > 1)

    trace = tiny.traced(family, "t4", chosen)
    levels = block_levels(trace, 512)
    second = max(position for position, label in trace.marks if label == "step 1")
    update = max(position for position, label in trace.marks if label == "optimizer")
    resident, peak = levels[second - 1], max(levels)
    batches = 2 * accumulation * (micro_batch_size * chosen.sequence_length * 8 + 512)
    assert resident - batches <= composed.resident_bytes <= resident
    assert composed.peak_allocated_bytes == pytest.approx(peak, rel=0.001)
    if max(levels[second:update]) == peak:
        assert composed.peak_allocated_bytes >= peak - (batches if accumulation > 1 else 0)


every_strategy = st.builds(
    Strategy, weight_format=st.sampled_from(FORMATS), activations=st.sampled_from(POLICIES)
) | st.builds(
    Strategy, weight_format=st.just("nf4"), activations=st.sampled_from(POLICIES), double_quantization=st.just(True)
)


@settings(max_examples=25)
@given(
    family=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    chosen=st.lists(every_strategy, min_size=2, max_size=6),
    micro_batch_size=st.integers(1, 5),
    rank=st.sampled_from([4, 8, 16]),
    accumulation=st.integers(1, 2),
    shared_by=st.sampled_from([1, 1, 4]),
)
def test_layers_of_different_strategies_compose_too(
    family: str, chosen: list[Strategy], micro_batch_size: int, rank: int, accumulation: int, shared_by: int
) -> None:
    """Whatever is done to each layer, the composed peak is that of the whole trace; with shared weights, too."""
    runs = tuple(StrategyRun(first=i, last=i, strategy=strategy) for i, strategy in enumerate(chosen))
    mixed = replace(
        configuration(
            "fp16",
            "save",
            rank=rank,
            sequence_length=128,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
        ),
        layers=runs,
        num_gpus=shared_by,
        sharding="none" if shared_by == 1 else "weights",
    )
    profiles = [(tiny.profiled(family, "t4", strategy, 128, shared_by=shared_by), 1) for strategy in chosen]

    composed = costs.footprint(profiles, micro_batch_size, rank, accumulates=accumulation > 1)

    trace = tiny.traced(family, "t4", mixed)
    end = next(position for position, label in trace.marks if label == "evaluation")
    assert composed.peak_allocated_bytes == pytest.approx(max(block_levels(trace, 512)[:end]), rel=0.001)


@settings(max_examples=12)
@given(
    family=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    activations=st.sampled_from(POLICIES),
    num_layers=st.integers(2, 6),
    micro_batch_size=st.integers(1, 4),
    rank=st.sampled_from([1, 4, 13, 48]),  # so that all states, some, and none stay in fp32
)
def test_another_optimizer_composes_too(
    family: str, activations: Activations, num_layers: int, micro_batch_size: int, rank: int
) -> None:
    """With a state of 8 bits, what is composed of a profile and of the optimizer's own is what a trace finds."""
    chosen = replace(
        configuration("fp16", activations, num_layers=num_layers, rank=rank, micro_batch_size=micro_batch_size),
        optimizer="adamw8bit",
    )
    profile = tiny.profiled(family, "t4", Strategy(weight_format="fp16", activations=activations))
    updated = costs.with_update(profile, tiny.updated(family, "t4", "adamw8bit", rank))

    composed = costs.footprint([(updated, num_layers)], micro_batch_size, rank, accumulates=False)

    trace = tiny.traced(family, "t4", chosen)
    levels = block_levels(trace, 512)
    second = max(position for position, label in trace.marks if label == "step 1")
    batch = micro_batch_size * chosen.sequence_length * 8 + 512
    assert levels[second - 1] - 2 * batch <= composed.resident_bytes <= levels[second - 1]
    assert composed.peak_allocated_bytes == pytest.approx(max(levels), rel=0.001)


def unrolled(profile: StepProfile, num_layers: int, micro_batch_size: int, rank: int, accumulates: bool) -> list[int]:
    """The level after every event of a step in which each layer's events are written out as often as it has layers."""
    align = profile.alignment_bytes

    def blocks(row: Ints) -> int:
        constant, per_sample, per_rank, mixed = row.tolist()
        size: int = constant + per_sample * micro_batch_size + per_rank * rank + mixed * micro_batch_size * rank
        return -(-size // align) * align

    outside, layer = (*profile.fixed, *profile.shared_state), (*profile.layer, *profile.state)
    resident = sum(map(blocks, outside)) + int(profile.workspaces.sum()) + num_layers * sum(map(blocks, layer))
    gradients = num_layers * sum(map(blocks, profile.gradients)) + sum(map(blocks, profile.outside_gradients))
    inner = ["inner"] * (num_layers - 2)
    layers = ["first", *inner, "last"] if num_layers > 1 else ["first"]
    order = ["embed", *layers, "release", "head", *(f"{place}_back" for place in reversed(layers))]
    levels = [resident + (gradients if accumulates else 0)]
    for segment in order:
        for event, index, micro_batch in zip(profile.events, profile.event_segment, profile.event_pass, strict=True):
            if SEGMENTS[index] == segment and micro_batch == accumulates:
                size = blocks(profile.sizes[abs(event) - 1])
                levels.append(levels[-1] + (size if event > 0 else -size))
    return levels


@given(
    profile=step_profiles(),
    num_layers=st.integers(1, 12),
    micro_batch_size=st.integers(1, 8),
    rank=st.integers(1, 64),
    accumulates=st.booleans(),
)
def test_repeated_layers_are_as_good_as_written_out(
    profile: StepProfile, num_layers: int, micro_batch_size: int, rank: int, accumulates: bool
) -> None:
    """The peak is the highest level of the whole step with every layer's events in a row."""
    levels = unrolled(profile, num_layers, micro_batch_size, rank, accumulates)

    found = costs.footprint([(profile, num_layers)], micro_batch_size, rank, accumulates=accumulates)

    assert found.peak_allocated_bytes == max(levels)


@pytest.mark.parametrize("sequence_length", [2, 8])
@pytest.mark.parametrize("num_layers", [2, 9])
def test_a_peak_in_the_optimizer_is_composed_too(sequence_length: int, num_layers: int) -> None:
    """With few tokens and large adapters the update is the worst moment."""
    chosen = configuration(
        "fp16", "save", num_layers=num_layers, rank=64, sequence_length=sequence_length, micro_batch_size=1
    )
    strategy = Strategy(weight_format="fp16", activations="save")
    trace = tiny.traced("llama", "t4", chosen)

    composed = costs.footprint(
        [(tiny.profiled("llama", "t4", strategy, sequence_length), num_layers)], 1, 64, accumulates=False
    )

    levels = block_levels(trace, 512)[: next(position for position, label in trace.marks if label == "evaluation")]
    update = max(position for position, label in trace.marks if label == "optimizer")
    second = max(position for position, label in trace.marks if label == "step 1")
    assert composed.peak_allocated_bytes == max(levels) == max(levels[update:]) > max(levels[second:update])


@pytest.mark.parametrize(
    ("weight_format", "activations"), [("fp16", "save"), ("int8", "recompute"), ("nf4", "recompute")]
)
def test_longer_sequences_never_shrink_the_footprint(weight_format: WeightFormat, activations: Activations) -> None:
    """More tokens need no less memory, whatever the micro-batch, the rank and the depth."""
    strategy = Strategy(weight_format=weight_format, activations=activations)
    profiles = [tiny.profiled("llama", "t4", strategy, length) for length in (64, 200)]

    for micro_batch_size, rank, num_layers, accumulates in ((1, 8, 3, False), (4, 64, 9, True), (7, 16, 2, False)):
        prints = [
            costs.footprint([(profile, num_layers)], micro_batch_size, rank, accumulates=accumulates)
            for profile in profiles
        ]
        peaks = [found.peak_allocated_bytes for found in prints]
        assert peaks[0] < peaks[1]
        assert prints[0].resident_bytes <= prints[1].resident_bytes


@given(
    profile=step_profiles(),
    num_layers=st.integers(1, 80),
    micro_batch_size=st.integers(1, 16),
    rank=st.integers(1, 128),
    accumulates=st.booleans(),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 64)),
)
def test_more_layers_samples_or_ranks_never_shrink_the_footprint(
    profile: StepProfile,
    num_layers: int,
    micro_batch_size: int,
    rank: int,
    accumulates: bool,
    more: tuple[int, int, int],
) -> None:
    """A footprint grows with each of its arguments, and its peak covers what is resident."""
    small = costs.footprint([(profile, num_layers)], micro_batch_size, rank, accumulates=accumulates)

    large = costs.footprint(
        [(profile, num_layers + more[0])], micro_batch_size + more[1], rank + more[2], accumulates=accumulates
    )

    assert small.resident_bytes <= small.peak_allocated_bytes
    assert small.resident_bytes <= large.resident_bytes
    assert small.peak_allocated_bytes <= large.peak_allocated_bytes


@given(step_profiles(), st.integers(1, 40), st.integers(1, 8), st.integers(1, 64))
def test_accumulation_never_needs_less(profile: StepProfile, num_layers: int, micro_batch_size: int, rank: int) -> None:
    """Gradients that are there from the start leave less room than gradients that grow."""
    once, twice = (
        costs.footprint([(profile, num_layers)], micro_batch_size, rank, accumulates=accumulates)
        for accumulates in (False, True)
    )

    assert once.resident_bytes == twice.resident_bytes
    assert once.peak_allocated_bytes <= twice.peak_allocated_bytes


@given(step_profiles())
def test_arrays_and_back_is_the_identity(profile: StepProfile) -> None:
    """Nothing of a profile is lost in its arrays."""
    back = StepProfile.from_arrays(profile.to_arrays())

    assert same(profile, back)


@pytest.mark.parametrize("name", [field.name for field in fields(StepProfile)])
def test_a_missing_array_is_a_key_error(name: str) -> None:
    """A profile of fewer arrays, such as an older program wrote, is none."""
    arrays = tiny.profiled("gpt2", "t4", Strategy(weight_format="fp16", activations="save")).to_arrays()
    del arrays[name]

    with pytest.raises(KeyError, match=name):
        StepProfile.from_arrays(arrays)


def real_flops(family: str, chosen: Configuration) -> int:
    """What PyTorch counts in the forward and backward passes of one micro-batch on the CPU."""
    model = empty_model(transformers_config(FAMILIES[family], chosen.num_layers), "float32", "cpu")
    trainee = make_trainee(model, chosen, "float32")
    tokens = torch.randint(VOCABULARY, (chosen.micro_batch_size, chosen.sequence_length))
    with flop_count.counting() as counter:
        trainee.loss(MicroBatch(tokens, tokens, tokens.numel())).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_are_those_of_the_real_step(family: str, activations: Activations) -> None:
    """The composed count of a real step's arithmetic is PyTorch's own, to the last operation."""
    chosen = configuration("fp32", activations, num_layers=5, rank=12, micro_batch_size=4)
    profile = tiny.profiled(family, "cpu", Strategy(weight_format="fp32", activations=activations))

    flops, _ = costs.operator_costs(profile, chosen.micro_batch_size, 12)
    segments = costs.segment_seconds(profile, flops.astype(np.float64))
    micro_batch, update = costs.total_seconds([(profile, chosen.num_layers)], [segments])

    assert (micro_batch, update) == (real_flops(family, chosen), 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_storing_weights_otherwise_changes_no_arithmetic(family: str, weight_format: WeightFormat) -> None:
    """Quantized weights are multiplied as often as others are."""
    counts: list[float] = []
    for stored in (weight_format, "fp32"):
        profile = tiny.profiled(family, "cpu", Strategy(weight_format=stored, activations="save"))
        flops, _ = costs.operator_costs(profile, 3, 8)
        work = np.where(profile.op_kind == OP_KINDS.index("dequantize"), 0, flops).astype(np.float64)
        counts.append(costs.total_seconds([(profile, 4)], [costs.segment_seconds(profile, work)])[0])

    assert counts[0] == counts[1] > 0


def test_gradients_are_one_fp32_number_per_adapter_weight() -> None:
    """Gradient bytes are the adapter's, each tensor in whole blocks."""
    profile = tiny.profiled("llama", "t4", Strategy(weight_format="nf4", activations="save"))

    found = costs.gradient_bytes(profile, 7, 8)

    features = [64, 64, 64, 32, 64, 32, 64, 64, 64, 176, 64, 176, 176, 64]
    assert found == 7 * sum(-(-8 * n * 4 // 512) * 512 for n in features)
