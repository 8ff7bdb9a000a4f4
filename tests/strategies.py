"""Hypothesis strategies: profiles, workloads, problems and plans of all kinds."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st

from shallowflow.planner.allowed import HEADROOM, LOSS_CHUNKS, cells, configured
from shallowflow.planner.costs import OP_KINDS, SEGMENTS, LayerRuns, StepProfile
from shallowflow.planner.plan import (
    FORMAT_VERSION,
    Candidate,
    LayerTime,
    MemoryPart,
    Offer,
    Plan,
    Prediction,
    SearchRecord,
    Sensitivity,
    StepTime,
    TimePart,
    WallTime,
    Workload,
)
from shallowflow.planner.problem import Problem, predict
from shallowflow.planner.proof import Proof
from shallowflow.planner.quality import next_rank
from shallowflow.planner.strategies import (
    Activations,
    Adapter,
    Configuration,
    Optimizer,
    Sharding,
    Strategy,
    StrategyRun,
    WeightFormat,
)
from shallowflow.profiles import load_gpu

T4 = load_gpu("t4")
FORMATS: tuple[WeightFormat, ...] = ("fp16", "int8", "nf4")
POLICIES: tuple[Activations, ...] = get_args(Activations)
STRATEGIES = [
    strategy
    for strategy in (Strategy(weight_format=f, activations=p) for f in FORMATS for p in POLICIES)
    if strategy.weight_format == "nf4" or not strategy.reuses_weights
]

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
counts = st.integers(1, 10**9)
byte_counts = st.integers(0, 2**50)
amounts = st.floats(0, 1e12, allow_nan=False)


def rows(*highest: int) -> st.SearchStrategy[list[int]]:
    """Coefficients of 1, micro-batch, rank and both, none negative, up to *highest*."""
    return st.tuples(*(st.integers(0, high) for high in highest)).map(list)


@st.composite
def step_profiles(draw: st.DrawFn, like: StepProfile | None = None) -> StepProfile:
    """Steps of three layers that hold something from their forward to their backward pass.

    Backward passes take something while they run; those of the first micro-batch leave gradients, which the update
    frees.
    """
    saved = {place: draw(rows(10**4, 10**6, 10**4, 10**3)) for place in ("embed", "first", "inner", "last", "head")}
    scratch = {place: draw(rows(10**6, 10**6, 10**4, 0)) for place in ("first", "inner", "last")}
    gradients, outside = (
        draw(st.lists(st.tuples(st.just(0), st.just(0), st.integers(1, 10**5), st.just(0)), max_size=most))
        for most in (3, 1)
    )
    if like is not None:
        gradients, outside = (
            [tuple(row) for row in rows.tolist()] for rows in (like.gradients, like.outside_gradients)
        )
    sizes: list[list[int]] = []
    events: list[tuple[int, str, int]] = []

    def make(row: list[int], segment: str, micro_batch: int) -> int:
        sizes.append(row)
        events.append((len(sizes), segment, micro_batch))
        return len(sizes)

    kept: list[int] = []
    for micro_batch in (0, 1):
        held = {place: make(row, place, micro_batch) for place, row in saved.items()}
        if not micro_batch:
            kept += [make(list(row), "head", 0) for row in outside]
        events.append((-held["head"], "head", micro_batch))
        for place in ("last", "inner", "first"):
            events.append((-make(scratch[place], f"{place}_back", micro_batch), f"{place}_back", micro_batch))
            if not micro_batch:
                kept += [make(list(row), f"{place}_back", 0) for row in gradients]
            events.append((-held[place], f"{place}_back", micro_batch))
        events.append((-held["embed"], "first_back", micro_batch))
    events += [(-number, "update", 1) for number in kept]

    costs = st.tuples(rows(*4 * [10**11]), rows(*4 * [10**9]))
    kinds, places = st.integers(0, len(OP_KINDS) - 1), st.integers(0, SEGMENTS.index("update"))
    operators = draw(st.lists(st.tuples(costs, kinds, places), max_size=4))
    messages = OP_KINDS.index("gather")  # whose latency is no GPU's own
    operators = [(([0, 0, 0, 0], b) if k == messages else (f, b), k, place) for (f, b), k, place in operators]
    operators.append((([0, 0, 0, 0], [0, 0, 0, 0]), 0, SEGMENTS.index("head")))  # no model does nothing
    return StepProfile(
        sizes=np.array(sizes),
        events=np.array([event for event, _, _ in events]),
        event_segment=np.array([SEGMENTS.index(segment) for _, segment, _ in events]),
        event_pass=np.array([micro_batch for _, _, micro_batch in events]),
        op_kind=np.array([kind for _, kind, _ in operators]),
        op_segment=np.array([place for _, _, place in operators]),
        op_flops=np.array([flops for (flops, _), _, _ in operators]),
        op_bytes=np.array([num_bytes for (_, num_bytes), _, _ in operators]) + 1,
        fixed=np.array([draw(rows(10**8, 0, 0, 0))]),
        workspaces=np.array(draw(rows(10**7, 10**7))),
        layer=np.array([draw(rows(10**7, 0, 10**5, 0))]),
        state=np.array([draw(rows(0, 0, 10**5, 0))]),
        shared_state=np.array([draw(rows(2000, 0, 0, 0))]),
        gradients=np.array(gradients, dtype=np.int64).reshape(-1, 4),
        outside_gradients=np.array(outside, dtype=np.int64).reshape(-1, 4),
        recomputed=np.array([draw(st.integers(0, 1)) for _ in sizes]),
        alignment_bytes=draw(st.sampled_from([1, 512])),
    )


@st.composite
def with_other_sizes(draw: st.DrawFn, like: StepProfile) -> StepProfile:
    """The same step with other layers: as much outside of them, the same adapters, and the same update of them."""
    other = draw(step_profiles(like))
    update = SEGMENTS.index("update")
    ours, theirs = like.op_segment == update, other.op_segment != update
    operators = {
        name: np.concatenate([getattr(other, name)[theirs], getattr(like, name)[ours]])
        for name in ("op_kind", "op_segment", "op_flops", "op_bytes")
    }
    return replace(
        other,
        **operators,
        fixed=like.fixed,
        workspaces=like.workspaces,
        state=like.state,
        shared_state=like.shared_state,
        gradients=like.gradients,
        outside_gradients=like.outside_gradients,
        alignment_bytes=like.alignment_bytes,
    )


@st.composite
def layer_runs(draw: st.DrawFn, num_layers: int) -> LayerRuns:
    """Layers all alike, or of two kinds."""
    split = draw(st.integers(1, num_layers))
    runs = [(draw(step_profiles()), split)]
    return runs if split == num_layers else [*runs, (draw(step_profiles()), num_layers - split)]


@st.composite
def workloads(draw: st.DrawFn, most_sequences: int = 48) -> Workload:
    """Small and large, free and fixed; the global batch always divides over the GPUs."""
    num_gpus = draw(st.integers(1, 4))
    return Workload(
        sequence_length=draw(st.integers(2, 4096)),
        total_tokens=draw(counts),
        num_sequences=draw(st.none() | counts),
        global_batch_size=num_gpus * draw(st.integers(1, most_sequences)),
        num_gpus=num_gpus,
        rank=draw(st.none() | st.integers(1, 300)),
        min_rank=draw(st.integers(1, 300)),
        adapter=draw(st.sampled_from(get_args(Adapter))),
        target_modules=draw(st.sampled_from(["all-linear", "attention", ("q_proj",), ("q_proj", "mlp.c_proj")])),
        quantization=draw(st.sampled_from(["any", "fp16", "int8", "nf4"])),
        objective=draw(st.sampled_from(["time", "cost", "quality"])),
        region=draw(words),
        sharding=draw(st.sampled_from([None, *get_args(Sharding)])) if num_gpus > 1 else None,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems of a few layers in which nothing, something or everything fits; kinds of layers alternate or not."""
    chosen = draw(st.lists(st.sampled_from(STRATEGIES), unique=True, min_size=1, max_size=3))
    kinds = draw(st.sampled_from([(0,), (0, 0), (0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 2, 2, 2)]))
    first = draw(step_profiles())
    profiles = {(s, k): draw(with_other_sizes(first)) for s in chosen for k in sorted(set(kinds))}
    heads = {chunks: draw(with_other_sizes(first)) for chunks in LOSS_CHUNKS}
    sharded = {pair: draw(with_other_sizes(first)) for pair in profiles}
    sharded_heads = {chunks: draw(with_other_sizes(first)) for chunks in LOSS_CHUNKS}
    work = draw(workloads(most_sequences=6))
    rank = work.rank or work.min_rank
    ranks = [wider for wider in (rank, next_rank(rank)) if wider is not None]
    updates: dict[tuple[Optimizer, int | None, int], StepProfile] = {}
    for kind in sorted(set(kinds)):
        other = replace(draw(step_profiles(first)), alignment_bytes=first.alignment_bytes)
        updates |= {("adamw8bit", wider, kind): other for wider in ranks}
    roomy = Problem(
        work,
        replace(T4, memory_bytes=2**62),
        kinds,
        profiles,
        heads,
        rank,
        updates=updates,
        sharded=sharded,
        sharded_heads=sharded_heads,
    )
    needs = sorted(
        predict(roomy, configured(work, cell, [strategy] * len(kinds))).peak_reserved_bytes
        for cell in cells(work, T4, rank)
        for strategy in chosen
    )
    budget = draw(st.sampled_from(needs)) + draw(st.sampled_from([-1, 0, 10**6]))
    return replace(roomy, gpu=replace(T4, memory_bytes=int((budget + T4.context_bytes) / (1 - HEADROOM)) + 1))


predictions = st.builds(
    Prediction,
    resident_bytes=byte_counts,
    peak_allocated_bytes=byte_counts,
    peak_reserved_bytes=byte_counts,
    peak_process_bytes=byte_counts,
    step_seconds=amounts,
    communication_seconds=amounts,
    tokens_per_second=amounts,
    traced=st.booleans(),
)

offers = st.builds(
    Offer,
    instance=words,
    region=words,
    hours=amounts,
    on_demand_usd_per_hour=amounts,
    on_demand_usd=amounts,
    spot_usd_per_hour=st.none() | amounts,
    spot_usd=st.none() | amounts,
    price_date=words,
    price_source=words,
)


time_parts = st.builds(TimePart, kind=words, seconds=amounts, roofline_share=st.floats(0, 1))
layer_times = st.builds(
    LayerTime, first=byte_counts, last=byte_counts, forward_seconds=amounts, backward_seconds=amounts
)
wall_times = st.builds(
    WallTime,
    start_seconds=amounts,
    load_seconds=amounts,
    tokenize_seconds=amounts,
    training_seconds=amounts,
    evaluation_seconds=amounts,
    save_seconds=amounts,
)


@st.composite
def step_times(draw: st.DrawFn) -> StepTime:
    """Kinds that sum to the device's seconds, the rest of whatever numbers."""
    kinds = tuple(draw(st.lists(time_parts, max_size=3)))
    return StepTime(
        bound=draw(st.sampled_from(["device", "host"])),
        device_seconds=math.fsum(part.seconds for part in kinds),
        host_seconds=draw(amounts),
        waiting_seconds=draw(amounts),
        kinds=kinds,
        layers=tuple(draw(st.lists(layer_times, max_size=2))),
        update_seconds=draw(amounts),
    )


@st.composite
def configurations(draw: st.DrawFn, workload: Workload | None = None, num_layers: int | None = None) -> Configuration:
    """One run of layers or several; the batch is the workload's, if one is given."""
    num_layers = num_layers or draw(st.integers(1, 150))
    ends = sorted({*draw(st.lists(st.integers(1, num_layers), max_size=3)), num_layers})
    layers = tuple(
        StrategyRun(first=first, last=end - 1, strategy=draw(st.sampled_from(STRATEGIES)))
        for first, end in itertools.pairwise([0, *ends])
    )
    workload = workload or draw(workloads())
    share = workload.global_batch_size // workload.num_gpus
    micro_batch_size = draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
    return Configuration(
        layers=layers,
        rank=draw(st.integers(1, 300)),
        alpha=draw(st.integers(1, 600)),
        sequence_length=workload.sequence_length,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=share // micro_batch_size,
        num_gpus=workload.num_gpus,
        adapter=workload.adapter,
        target_modules=workload.target_modules,
        sharding=draw(st.sampled_from(get_args(Sharding))) if workload.num_gpus > 1 else "none",
    )


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | amounts | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that do not contradict themselves, of whatever numbers."""
    workload = draw(workloads())
    memory = draw(st.lists(st.builds(MemoryPart, category=words, num_bytes=byte_counts), max_size=5))

    def candidates(num_layers: int | None = None) -> st.SearchStrategy[Candidate]:
        chosen = configurations(workload, num_layers)
        return st.builds(Candidate, configuration=chosen, prediction=predictions, weight_error=amounts)

    best = draw(candidates())
    others = draw(st.lists(candidates(best.configuration.num_layers), max_size=2))
    process = sum(part.num_bytes for part in memory)
    resident, allocated, reserved = sorted(draw(st.tuples(*3 * [st.integers(0, process)])))
    runs = [run for shown in (best, *others) for run in shown.configuration.layers]
    plain = any(run.strategy.weight_format == "fp16" for run in runs)
    return Plan(
        format_version=FORMAT_VERSION,
        model_name=draw(words),
        model_config={**draw(st.dictionaries(words, json_values, max_size=4)), "model_type": draw(words)},
        num_parameters=draw(counts),
        gpu=draw(words),
        compute_dtype="float16" if plain else draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        attention=draw(st.sampled_from(["SDPA", "eager"])),
        memory_bytes=process + draw(st.integers(0, 2**30)),
        budget_bytes=draw(byte_counts),
        workload=workload,
        configuration=best.configuration,
        prediction=replace(
            best.prediction,
            resident_bytes=resident,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            peak_process_bytes=process,
        ),
        weight_error=best.weight_error,
        memory=tuple(memory),
        time=draw(step_times()),
        wall=draw(wall_times),
        offers=tuple(draw(st.lists(offers, max_size=2))),
        alternatives=tuple(others),
        search=SearchRecord(
            num_strategies=4,
            num_cells=3,
            num_nodes=draw(st.integers(0, 9)),
            num_traced=2,
            num_rejected=draw(st.integers(0, 9)),
            best_uniform_seconds=draw(st.none() | amounts),
        ),
        sensitivity=Sensitivity(
            binding=draw(words),
            seconds_per_100_mib=draw(amounts),
            next_rank=draw(st.none() | st.just(32)),
            next_rank_seconds=draw(st.none() | amounts),
        ),
        proof=Proof(
            status=draw(st.sampled_from(["optimal", "within", "feasible"])),
            gap=draw(amounts),
            unfragmented_gap=draw(amounts),
            score_picoseconds=draw(byte_counts),
            bound_picoseconds=draw(byte_counts),
            budget_bytes=draw(byte_counts),
            harm=None,
            host_bytes=draw(st.none() | byte_counts),
            step_picoseconds=None,
            strategies=tuple(draw(st.lists(st.sampled_from(STRATEGIES), max_size=2))),
            tables=(),
            cells=(),
            unfragmented=(),
        ),
        notes=tuple(draw(st.lists(words, max_size=2))),
        versions=draw(st.dictionaries(words, words, max_size=3)),
    )


def same(first: StepProfile, second: StepProfile) -> bool:
    """Equal in every array."""
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(StepProfile))
