"""Over all cells: the answer is the enumeration's, what is chosen fits when traced whole, and its proof holds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shallowflow.planner import allowed, proof_check
from shallowflow.planner import problem as posing
from shallowflow.planner import proof as proving
from shallowflow.planner.chain import taken
from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.needs import Unproven
from shallowflow.planner.plan import MemoryPart
from shallowflow.planner.problem import Problem
from shallowflow.planner.single import smallest
from shallowflow.planner.solver import solve
from shallowflow.planner.strategies import Cell, Configuration
from tests.planner.chains import ways
from tests.planner.tiny import configuration
from tests.strategies import problems


class Tracer:
    """A stand-in for tracing whole steps: every loss and micro-batch fragments memory in its own proportion."""

    def __init__(self, problem: Problem, slack: dict[int, float], of_mixes: float = 1.0) -> None:
        self.problem, self.slack, self.of_mixes = problem, slack, of_mixes
        self.traced: list[Configuration] = []

    def reserved(self, chosen: Configuration) -> int:
        """What the whole trace of *chosen* would say."""
        composed = posing.predict(self.problem, chosen).peak_allocated_bytes
        return int(composed * self.slack[chosen.loss_chunks] * (self.of_mixes if len(chosen.layers) > 1 else 1.0))

    def __call__(self, chosen: Configuration) -> TracedPeak:
        """Trace one."""
        self.traced.append(chosen)
        composed = posing.predict(self.problem, chosen)
        reserved = self.reserved(chosen)
        return TracedPeak(
            resident_bytes=composed.resident_bytes,
            peak_allocated_bytes=composed.peak_allocated_bytes,
            peak_reserved_bytes=reserved,
            parts=(MemoryPart(category="all", num_bytes=reserved + self.problem.gpu.context_bytes),),
            attention="SDPA",
        )


NONE = {1: 1.0, 4: 1.0, 16: 1.0}
SLACKS = st.fixed_dictionaries({chunks: st.sampled_from([1.0, 1.05, 1.3]) for chunks in NONE})


def considered(problem: Problem) -> tuple[Cell, ...]:
    """All cells of *problem*, at most six."""
    return allowed.cells(problem.workload, problem.gpu, problem.rank)[:6]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_answer_is_the_best_of_all_cells(problem: Problem) -> None:
    """Where nothing is fragmented, nothing in any cell scores less, and None is said precisely where nothing fits."""
    found = solve(problem, considered(problem), Tracer(problem, NONE))

    scores = [
        needs.score_picoseconds
        for chain in posing.chains(problem, considered(problem)).values()
        for _, needs in itertools.islice(ways(chain), 20_000)
        if needs.within(problem.limits)
    ]
    if found is None:
        assert not scores
        return
    assert found.proof.score_picoseconds == min(scores)
    assert found.proof.status == "optimal"
    assert proof_check.verify(found.proof, found.best.configuration, considered(problem)) == []


@settings(max_examples=60, deadline=None)
@given(problems(), SLACKS)
def test_what_is_chosen_fits_when_it_is_traced(problem: Problem, slack: dict[int, float]) -> None:
    """The best and every alternative reserve no more than the budget; all are different; the proof still holds."""
    tracer = Tracer(problem, slack)

    found = solve(problem, considered(problem), tracer)

    assume(found is not None)
    assert found is not None
    shown = [found.best, *found.alternatives]
    assert all(c.prediction.traced for c in shown)
    assert all(c.prediction.peak_reserved_bytes == tracer.reserved(c.configuration) for c in shown)
    assert all(c.prediction.peak_reserved_bytes <= problem.budget_bytes for c in shown)
    assert len({c.configuration for c in shown}) == len(shown)
    assert found.num_traced == len(tracer.traced) == len(set(tracer.traced))
    assert found.proof.gap <= found.proof.unfragmented_gap + 1e-12
    assert proof_check.verify(found.proof, found.best.configuration, considered(problem)) == []


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([1.02, 1.1, 2.0]))
def test_no_single_strategy_that_fits_is_better(problem: Problem, of_mixes: float) -> None:
    """Even where only mixes are fragmented, and their cells' memory is cut by that; the proof still holds."""
    tracer = Tracer(problem, NONE, of_mixes)

    found = solve(problem, considered(problem), tracer)

    scores = [
        taken(chain, counts).score_picoseconds
        for chain in posing.chains(problem, considered(problem)).values()
        for strategy in {strategy for strategy, _ in problem.profiles}
        for counts in [tuple(tuple(g.num_layers * (c.strategy == strategy) for c in g.choices) for g in chain.groups)]
        if taken(chain, counts).within(problem.limits)
    ]
    if found is None:
        assert not scores
        return
    assert found.proof.score_picoseconds <= min(scores, default=found.proof.score_picoseconds)
    assert found.best.prediction.peak_reserved_bytes <= problem.budget_bytes
    assert proof_check.verify(found.proof, found.best.configuration, considered(problem)) == []


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(2, 20))
def test_the_next_rank_takes_the_step_of_its_best_plan(problem: Problem, times: int) -> None:
    """In the plan's own cell, harm being worth there what it is worth in the plan, with memory enough for either."""
    roomier = replace(problem.gpu, memory_bytes=times * problem.gpu.memory_bytes)
    problem = replace(problem, gpu=roomier, workload=replace(problem.workload, rank=None))
    found = solve(problem, considered(problem), Tracer(problem, NONE))
    assume(found is not None)
    assert found is not None
    told = found.sensitivity
    assume(told.next_rank is not None and told.next_rank_seconds is not None)
    assert told.next_rank is not None and told.next_rank_seconds is not None

    price = posing.harm_price(posing.chains(problem, considered(problem))[found.best.configuration.cell].groups)
    cell = replace(found.best.configuration.cell, rank=told.next_rank)
    (chain,) = posing.chains(replace(problem, rank=told.next_rank), (cell,), price).values()
    fitting = [needs for _, needs in itertools.islice(ways(chain), 20_000) if needs.within(problem.limits)]
    least = min(needs.score_picoseconds for needs in fitting)
    best = {needs.step_picoseconds for needs in fitting if needs.score_picoseconds == least}
    assert round(told.next_rank_seconds * posing.SECOND) in best


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_a_planted_wrong_answer_is_caught(problem: Problem, data: st.DataObject) -> None:
    """Another plan, a better score, a missing cell, more memory, or tables that were changed: the proof then fails."""
    cells = considered(problem)
    found = solve(problem, cells, Tracer(problem, NONE))
    assume(found is not None)
    assert found is not None
    proof, chosen = found.proof, found.best.configuration
    score = proof.score_picoseconds
    assume(score > 10**6)

    def fails(changed: proving.Proof, configuration: Configuration = chosen) -> bool:
        return bool(proof_check.verify(changed, configuration, cells))

    assert fails(replace(proof, score_picoseconds=score - 10**5))
    assert fails(replace(proof, budget_bytes=proof.budget_bytes + 1))
    assert fails(proof, replace(chosen, micro_batch_size=chosen.micro_batch_size + 1))
    if len(cells) > 1:
        assert fails(replace(proof, cells=proof.cells[1:]))
    worse = next((c for c in found.alternatives if c.configuration.cell in cells), None)
    if worse is not None:
        _, weighed = proving.weigh(proof, worse.configuration)
        assume(weighed.score_picoseconds > score * (1 + 1e-5))
        assert fails(replace(proof, score_picoseconds=weighed.score_picoseconds), worse.configuration)
    own, weighed = proving.weigh(proof, chosen)
    cut = tuple(replace(c, memory_bytes=weighed.peak_bytes - 1) if c == own else c for c in proof.cells)
    assert fails(replace(proof, cells=cut))
    row = data.draw(st.sampled_from([(), (7,), (0, 0, 0), (1, 0, 9, 0, 0, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0, 0, 0)]))
    broken = tuple(replace(c, nodes=(row,)) for c in proof.cells)
    assert fails(replace(proof, cells=broken))


def test_a_proof_of_other_layers_is_refused() -> None:
    """What the tables do not hold cannot be weighed."""
    empty = proving.Proof(
        status="optimal",
        gap=0.0,
        unfragmented_gap=0.0,
        score_picoseconds=1,
        bound_picoseconds=1,
        budget_bytes=1,
        harm=None,
        host_bytes=None,
        step_picoseconds=None,
        strategies=(),
        tables=(),
        cells=(),
        unfragmented=(),
    )
    with pytest.raises(Unproven, match="does not speak of the plan's own"):
        proving.weigh(empty, configuration("nf4", "save"))


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_smallest_needs_no_more_than_any_single_strategy(problem: Problem) -> None:
    """Of one strategy for all layers, in any cell."""
    least = smallest(problem, considered(problem))

    assert least is not None
    needs = posing.predict(problem, least).peak_allocated_bytes
    for cell in considered(problem):
        for strategy in {strategy for strategy, _ in problem.profiles}:
            other = allowed.configured(problem.workload, cell, [strategy] * problem.num_layers)
            assert needs <= posing.predict(problem, other).peak_allocated_bytes
