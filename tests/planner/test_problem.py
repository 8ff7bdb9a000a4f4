"""The search problem: which strategies and configurations there are, and what is predicted of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner import problem as posing
from shallowflow.planner.plan import Workload
from shallowflow.planner.problem import RANKS, Problem, candidates
from tests.strategies import STRATEGIES, T4, problems, workloads


@given(workloads(), st.integers(1, 80))
def test_configurations_divide_the_global_batch(workload: Workload, num_layers: int) -> None:
    """Every micro-batch that divides a GPU's share comes once per rank, and multiplies back to the global batch."""
    strategy = STRATEGIES[0]

    found = list(posing.configurations(workload, num_layers, strategy))

    share = workload.global_batch_size // workload.num_gpus
    divisors = {n for n in range(1, share + 1) if share % n == 0}
    ranks = {c.rank for c in found}
    assert {c.global_batch_size for c in found} == {workload.global_batch_size}
    assert {(c.rank, c.micro_batch_size) for c in found} == {(r, n) for r in ranks for n in divisors}
    assert len(found) == len(ranks) * len(divisors)
    assert {c.strategies() for c in found} == {num_layers * (strategy,)}
    assert {c.sequence_length for c in found} == {workload.sequence_length}


@given(workloads())
def test_ranks_are_the_one_fixed_or_all_from_the_least(workload: Workload) -> None:
    """A fixed rank is the only one; otherwise none is below the least, and the least itself is never missed."""
    ranks = {c.rank for c in posing.configurations(workload, 2, STRATEGIES[0])}

    if workload.rank is not None:
        assert ranks == {workload.rank}
    else:
        assert min(ranks) >= workload.min_rank
        assert ranks == {r for r in RANKS if r >= workload.min_rank} or ranks == {workload.min_rank}


@settings(max_examples=50)
@given(problems())
def test_predictions_add_up(problem: Problem) -> None:
    """Reserved covers allocated, the process adds the context, time adds communication, and tokens come of time."""
    for found in candidates(problem):
        prediction, chosen = found.prediction, found.configuration
        assert prediction.resident_bytes <= prediction.peak_allocated_bytes <= prediction.peak_reserved_bytes
        assert prediction.peak_process_bytes == prediction.peak_reserved_bytes + problem.gpu.context_bytes
        assert 0 <= prediction.communication_seconds <= prediction.step_seconds
        tokens = chosen.global_batch_size * chosen.sequence_length
        assert prediction.tokens_per_second * prediction.step_seconds == pytest.approx(tokens)
        assert not prediction.traced


@settings(max_examples=50)
@given(problems(), st.integers(2, 4))
def test_more_gpus_cost_memory_and_waiting(problem: Problem, num_gpus: int) -> None:
    """A replica among several also holds its gradients' buckets and waits for the others."""
    batch = problem.workload.global_batch_size // problem.workload.num_gpus
    posed = [
        replace(problem, workload=replace(problem.workload, num_gpus=count, global_batch_size=count * batch))
        for count in (1, num_gpus)
    ]

    alone, many = (candidates(p) for p in posed)

    for one, other in zip(alone, many, strict=True):
        assert one.prediction.communication_seconds == 0
        assert other.prediction.step_seconds >= one.prediction.step_seconds
        assert other.prediction.peak_allocated_bytes >= one.prediction.peak_allocated_bytes
        buckets = other.prediction.resident_bytes - one.prediction.resident_bytes
        assert (buckets > 0) == (other.prediction.communication_seconds > 0)


@given(workloads(), st.integers(10**6, 10**11), st.integers(0, 100), st.integers(0, 10**11))
def test_strategies_grow_with_memory_and_never_leave_what_fits(
    workload: Workload, num_parameters: int, outside_percent: int, more: int
) -> None:
    """A larger GPU allows what a smaller one did, and only weights that alone exceed the budget are left out."""
    outside = num_parameters * outside_percent // 100
    gpus = [T4, replace(T4, memory_bytes=T4.memory_bytes + more), replace(T4, memory_bytes=2**62)]

    small, large, every = (posing.strategies(workload, gpu, num_parameters, outside) for gpu in gpus)

    assert set(small) <= set(large) <= set(every)
    size = {"fp16": 2.0, "int8": 1.0, "nf4": 0.5}
    for strategy in every:
        weights = 2 * outside + size[strategy.weight_format] * (num_parameters - outside)
        assert (strategy in small) == (weights <= posing.budget_bytes(T4))
    wanted = {"any": {"fp16", "int8", "nf4"}}.get(workload.quantization, {workload.quantization})
    assert {strategy.weight_format for strategy in every} == wanted
