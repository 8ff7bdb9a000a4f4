"""The search problem: which strategies and cells there are, and that a chain takes what composition says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner import allowed, quality
from shallowflow.planner.allowed import LOSS_CHUNKS, OPTIMIZERS, cells, configured
from shallowflow.planner.arrangement import arranged
from shallowflow.planner.chain import taken
from shallowflow.planner.plan import Quantization, Workload
from shallowflow.planner.problem import Problem, chains, predict
from shallowflow.planner.strategies import Strategy
from shallowflow.profiles import load_gpu
from tests.strategies import STRATEGIES, T4, problems, workloads

CPU = load_gpu("cpu")
FORMATS: dict[str, Quantization] = {"fp16": "fp16", "int8": "int8", "nf4": "nf4"}


@given(workloads(), st.booleans())
def test_cells_divide_the_global_batch(workload: Workload, divisible: bool) -> None:
    """Every micro-batch that divides a GPU's share comes once with all else, and makes up the batch."""
    found = cells(workload, T4, 16, divisible_loss=divisible)

    share = workload.global_batch_size // workload.num_gpus
    divisors = {n for n in range(1, share + 1) if share % n == 0}
    chunks = {n for n in LOSS_CHUNKS if n == 1 or (divisible and workload.sequence_length % n == 0)}
    assert {cell.micro_batch_size * cell.gradient_accumulation_steps for cell in found} == {share}
    shardings = (
        {"none"} if workload.num_gpus == 1 else {workload.sharding} if workload.sharding else {"none", "weights"}
    )
    ways = {(cell.micro_batch_size, cell.loss_chunks, cell.optimizer, cell.sharding) for cell in found}
    assert ways == set(product(divisors, chunks, OPTIMIZERS, shardings))
    assert len(found) == len(ways)


@given(workloads(), st.data())
def test_what_is_fixed_is_all_there_is(workload: Workload, data: st.DataObject) -> None:
    """A pinned micro-batch, loss, optimizer, sharding, policy or format is the only one."""
    whole = cells(workload, T4, 16)
    one = data.draw(st.sampled_from(whole))
    pinned = replace(
        workload,
        micro_batch_size=one.micro_batch_size,
        loss_chunks=one.loss_chunks,
        optimizer=one.optimizer,
        sharding=one.sharding if workload.num_gpus > 1 else None,
    )
    assert cells(pinned, T4, 16) == (one,)

    strategy = data.draw(st.sampled_from(allowed.strategies(workload, T4)))
    wanted = replace(
        workload,
        quantization=FORMATS[strategy.weight_format],
        activations=strategy.activations,
        double_quantization=strategy.double_quantization,
    )
    assert allowed.strategies(wanted, T4) == (strategy,)


@given(workloads())
def test_8_bits_are_for_gpus(workload: Workload) -> None:
    """A CPU's optimizer is AdamW, unless another is asked for."""
    assert {cell.optimizer for cell in cells(workload, CPU, 16)} == {"adamw"}
    assert {cell.optimizer for cell in cells(replace(workload, optimizer="adamw8bit"), CPU, 16)} == {"adamw8bit"}


@given(workloads())
def test_strategies_are_those_of_the_format_and_the_device(workload: Workload) -> None:
    """Every format that is wanted comes with every policy; nothing is offloaded where host and device are one."""
    found = {gpu.name: allowed.strategies(workload, gpu) for gpu in (T4, CPU)}

    wanted = {"any": {"fp16", "int8", "nf4"}}.get(workload.quantization, {workload.quantization})
    assert {strategy.weight_format for strategy in found["t4"]} == wanted
    assert len(set(found["t4"])) == len(found["t4"]) == 5 * (len(wanted) + ("nf4" in wanted))
    assert not any(strategy.activations == "offload" for strategy in found["cpu"])


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_a_chain_takes_what_composition_says(problem: Problem, data: st.DataObject) -> None:
    """Bytes to the byte and seconds to the rounding, for any mix; only workspaces may be counted lower."""
    considered = cells(problem.workload, problem.gpu, problem.rank)
    cell = data.draw(st.sampled_from(considered))
    chain = chains(problem, considered)[cell]
    counts = []
    for group in chain.groups:
        picks = [data.draw(st.integers(0, len(group.choices) - 1)) for _ in range(group.num_layers)]
        counts.append(tuple(picks.count(index) for index in range(len(group.choices))))

    layers = arranged(chain, tuple(counts), problem.limits).strategies
    configuration = allowed.configured(problem.workload, cell, layers)

    found, composed = taken(chain, tuple(counts)), predict(problem, configuration)
    assert configuration.cell == cell
    assert found.peak_bytes == composed.peak_allocated_bytes
    assert found.step_picoseconds / 1e12 == pytest.approx(composed.step_seconds, rel=1e-9, abs=1e-9)
    assert found.harm == sum(quality.harm(strategy) for strategy in configuration.strategies())


@settings(max_examples=50, deadline=None)
@given(problems(), st.data())
def test_predictions_add_up(problem: Problem, data: st.DataObject) -> None:
    """Reserved covers allocated, the process adds the context, time adds communication, and tokens come of time."""
    cell = data.draw(st.sampled_from(cells(problem.workload, problem.gpu, problem.rank)))
    strategy = next(iter(problem.profiles))[0]
    chosen = configured(problem.workload, cell, [strategy] * problem.num_layers)

    prediction = predict(problem, chosen)

    assert prediction.resident_bytes <= prediction.peak_allocated_bytes <= prediction.peak_reserved_bytes
    assert prediction.peak_process_bytes == prediction.peak_reserved_bytes + problem.gpu.context_bytes
    assert 0 <= prediction.communication_seconds <= prediction.step_seconds
    tokens = chosen.global_batch_size * chosen.sequence_length
    assert prediction.tokens_per_second * prediction.step_seconds == pytest.approx(tokens)
    assert not prediction.traced


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(2, 4))
def test_more_gpus_cost_waiting_alone(problem: Problem, num_gpus: int) -> None:
    """A replica among several waits for the others, and needs no more memory."""
    batch = problem.workload.global_batch_size // problem.workload.num_gpus
    strategy = next(iter(problem.profiles))[0]
    found = []
    for count in (1, num_gpus):
        work = replace(problem.workload, num_gpus=count, global_batch_size=count * batch, sharding=None)
        posed = replace(problem, workload=work)
        cell = cells(work, problem.gpu, problem.rank)[0]
        found.append(predict(posed, configured(work, cell, [strategy] * problem.num_layers)))

    one, other = found
    assert one.communication_seconds == 0
    assert other.step_seconds >= one.step_seconds
    assert (other.peak_allocated_bytes, other.resident_bytes) == (one.peak_allocated_bytes, one.resident_bytes)


@given(st.integers(1, 10**12), st.integers(1, 10**8), st.integers(1, 300), st.integers(0, 10**10))
def test_a_rank_is_enough_or_the_largest(tokens: int, per_rank: int, at_least: int, at_any: int) -> None:
    """More tokens never need less, and the rank chosen is the smallest that holds what they teach, or the largest."""
    rank = quality.enough_rank(tokens, per_rank, at_least, at_any)

    def holds(some: int) -> bool:
        bits = (some * per_rank + at_any) * quality.BITS_PER_PARAMETER
        return bits >= tokens * quality.BITS_PER_TOKEN

    assert rank >= at_least
    assert quality.enough_rank(2 * tokens, per_rank, at_least, at_any) >= rank
    assert holds(rank) or rank == max(quality.RANKS[-1], at_least)
    assert not any(holds(some) for some in quality.RANKS if at_least <= some < rank)


def test_harm_adds_up_to_the_error() -> None:
    """Of a mix it is the mean of squares; double quantization is a little worse than nf4 alone."""
    nf4, twice = (Strategy(weight_format="nf4", activations="save", double_quantization=d) for d in (False, True))
    int8 = Strategy(weight_format="int8", activations="save")

    assert quality.mean_error((nf4, nf4)) == pytest.approx(0.091)
    assert quality.mean_error((nf4, int8)) ** 2 == pytest.approx((0.091**2 + 0.009**2) / 2)
    assert quality.harm(nf4) < quality.harm(twice) < 1.05 * quality.harm(nf4)
    assert [quality.harm(s) for s in STRATEGIES if s.weight_format == "fp16"] == [0] * 5
