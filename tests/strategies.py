"""Hypothesis strategies: profiles, workloads, problems and plans of all kinds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

from hypothesis import strategies as st

from shallowflow.planner.allowed import HEADROOM, LOSS_CHUNKS, cells, configured
from shallowflow.planner.costs import StepProfile
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
from tests.profile_strategies import step_profiles, with_other_sizes

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
    step_seconds=st.floats(1e-9, 1e12),
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
