"""The search is exhaustive: its answer is the enumeration's, and it says None precisely when nothing fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from unittest import mock

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shallowflow.planner import quality, solver
from shallowflow.planner.plan import Candidate, MemoryPart, Prediction, Workload
from shallowflow.planner.problem import HEADROOM, Problem, candidates
from shallowflow.planner.solver import (
    MOST_TRIED,
    NUM_ALTERNATIVES,
    SAME_SPEED,
    Solution,
    TracedPeak,
    preference,
    smallest,
    solve,
)
from shallowflow.planner.strategies import Configuration, Strategy
from tests.planner.tiny import configuration
from tests.strategies import STRATEGIES, T4, problems

MIB = 2**20


FINE = Strategy(weight_format="fp16", activations="recompute")


COARSE = Strategy(weight_format="nf4", activations="save")


SLACKS = st.fixed_dictionaries({strategy: st.sampled_from([1.0, 1.3, 2.0]) for strategy in STRATEGIES})
"""What a whole trace reserves per byte that composition allocates, by strategy; never less."""


class Tracer:
    """A stand-in for tracing whole steps: every strategy fragments memory in its own proportion."""

    def __init__(self, problem: Problem, known: list[Candidate], slack: dict[Strategy, float]) -> None:
        self.budget_bytes = int(problem.gpu.memory_bytes * (1 - HEADROOM)) - problem.gpu.context_bytes
        self.known = {c.configuration: c for c in known}
        self.slack = slack
        self.traced: list[Configuration] = []

    def reserved(self, candidate: Candidate) -> int:
        """What the whole trace of *candidate* would say."""
        strategy = candidate.configuration.layers[0].strategy
        return math.ceil(candidate.prediction.peak_allocated_bytes * self.slack[strategy])

    def fitting(self) -> list[Candidate]:
        """By enumeration, every candidate whose whole trace fits."""
        return [c for c in self.known.values() if self.reserved(c) <= self.budget_bytes]

    def __call__(self, chosen: Configuration) -> TracedPeak:
        """Trace one."""
        self.traced.append(chosen)
        found = self.known[chosen]
        reserved = self.reserved(found)
        return TracedPeak(
            resident_bytes=found.prediction.resident_bytes,
            peak_allocated_bytes=found.prediction.peak_allocated_bytes,
            peak_reserved_bytes=reserved,
            parts=(MemoryPart(category="all", num_bytes=reserved + T4.context_bytes),),
            attention="SDPA",
        )


@dataclass(frozen=True)
class Search:
    """A problem of a few candidates that are given instead of predicted, and what tracing them would say."""

    problem: Problem
    candidates: list[Candidate]
    slack: dict[Strategy, float]

    def run(self) -> tuple[Solution | None, Tracer]:
        """The solver's answer, and what it asked for."""
        tracer = Tracer(self.problem, self.candidates, self.slack)
        with mock.patch.object(solver, "candidates", return_value=self.candidates):
            return solve(self.problem, tracer), tracer

    def order(self, solution: Solution) -> list[tuple[float, ...]]:
        """How the objective ranks the answer and its alternatives, by their predictions."""
        rank = preference(self.problem.workload.objective)
        known = {c.configuration: rank(c) for c in self.candidates}
        return [known[c.configuration] for c in (solution.best, *solution.alternatives)]


def candidate(strategy: Strategy, seconds: float, num_bytes: int = 1, rank: int = 8) -> Candidate:
    """One that takes so long and allocates so much."""
    prediction = Prediction(
        resident_bytes=num_bytes // 2,
        peak_allocated_bytes=num_bytes,
        peak_reserved_bytes=num_bytes,
        peak_process_bytes=num_bytes + T4.context_bytes,
        step_seconds=seconds,
        communication_seconds=0,
        tokens_per_second=1 / seconds,
        traced=False,
    )
    return Candidate(
        configuration=configuration(strategy.weight_format, strategy.activations, rank=rank),
        prediction=prediction,
        weight_error=quality.WEIGHT_ERROR[strategy.weight_format],
    )


def problem_of(budget: int, workload: Workload) -> Problem:
    """A problem with so much to reserve."""
    memory = math.ceil((budget + T4.context_bytes) / (1 - HEADROOM))
    return Problem(workload, 3, replace(T4, memory_bytes=memory), {})


@st.composite
def searches(draw: st.DrawFn) -> Search:
    """Few numbers and few strategies, so that ties, near misses and rejections are common."""
    seconds = st.sampled_from([1.0, 1.001, 1.5, 2.0, 4.0])
    sizes = st.integers(1, 12).map(lambda n: n * MIB)
    chosen = draw(st.lists(st.sampled_from(STRATEGIES), unique=True, min_size=1, max_size=3))
    made = st.builds(candidate, st.sampled_from(chosen), seconds, sizes, st.integers(8, 24))
    fewest = draw(st.sampled_from([1, 6, 10]))
    known = draw(st.lists(made, min_size=fewest, max_size=12, unique_by=lambda c: c.configuration))
    budget = draw(st.sampled_from(known)).prediction.peak_allocated_bytes
    workload = Workload(objective=draw(st.sampled_from(["time", "cost", "quality"])))
    return Search(problem_of(budget, workload), known, draw(SLACKS))


@given(searches())
def test_solver_matches_enumeration(search: Search) -> None:
    """The solver is exact, and says None precisely when nothing fits."""
    solution, tracer = search.run()

    possible = tracer.fitting()
    assert (solution is None) == (not possible)
    if solution is not None:
        assert search.order(solution)[0] == min(map(preference(search.problem.workload.objective), possible))


@settings(max_examples=50)
@given(problems(), SLACKS)
def test_solver_matches_enumeration_of_profiles(problem: Problem, slack: dict[Strategy, float]) -> None:
    """So it is when the candidates are composed from profiles."""
    tracer = Tracer(problem, candidates(problem), slack)

    solution = solve(problem, tracer)

    rank = preference(problem.workload.objective)
    best = min(map(rank, tracer.fitting()), default=None)
    assert (solution and rank(tracer.known[solution.best.configuration])) == best


@given(searches())
def test_the_answer_was_traced_and_fits(search: Search) -> None:
    """What is answered is the first that was traced and fits, and all numbers are the traces'."""
    solution, tracer = search.run()

    assume(solution is not None)
    assert solution is not None
    best, budget = solution.best, search.problem.budget_bytes
    fits = [c for c in tracer.traced if tracer.reserved(tracer.known[c]) <= budget]
    assert fits[0] == best.configuration
    assert {c.configuration for c in solution.alternatives} == set(fits[1:])
    assert all(c.prediction.peak_reserved_bytes == tracer.reserved(c) for c in solution.alternatives)
    assert all(c.prediction.traced for c in solution.alternatives)
    assert best.prediction.traced
    assert best.prediction.peak_reserved_bytes == solution.peak.peak_reserved_bytes <= budget
    assert best.prediction.peak_process_bytes == solution.peak.peak_reserved_bytes + T4.context_bytes
    assert best.prediction.peak_allocated_bytes == solution.peak.peak_allocated_bytes


@given(searches())
def test_what_was_rejected_is_never_answered(search: Search) -> None:
    """What was traced and did not fit is neither the answer nor an alternative, and nothing is traced twice."""
    solution, tracer = search.run()

    rejected = [c for c in tracer.traced if tracer.reserved(tracer.known[c]) > search.problem.budget_bytes]
    assert len(set(tracer.traced)) == len(tracer.traced)
    assert not {c.configuration for c in tracer.fitting()} & set(rejected)
    if solution is not None:
        offered = [solution.best, *solution.alternatives]
        assert not {candidate.configuration for candidate in offered} & set(rejected)
        assert (solution.num_traced, solution.num_rejected) == (len(tracer.traced), len(rejected))


@example(
    Search(
        problem_of(10 * MIB, Workload()),
        [candidate(FINE, 1.0, 8 * MIB, 8), candidate(COARSE, 1.5, 5 * MIB), candidate(FINE, 2.0, 9 * MIB, 9)],
        {FINE: 1.5, COARSE: 1.0},
    )
)
@given(searches())
def test_no_alternative_needs_as_much_as_what_was_rejected(search: Search) -> None:
    """If one candidate of a strategy did not fit, another that allocates as much is not offered either."""
    solution, tracer = search.run()

    assume(solution is not None)
    assert solution is not None
    budget = search.problem.budget_bytes
    for refused in (c for c in tracer.traced if tracer.reserved(tracer.known[c]) > budget):
        for other in solution.alternatives:
            as_much = tracer.reserved(tracer.known[other.configuration]) >= tracer.reserved(tracer.known[refused])
            assert not (other.configuration.layers == refused.layers and as_much)


@given(searches())
def test_alternatives_fit_and_differ(search: Search) -> None:
    """They are a few, all within the budget, none the answer or twice there, and in the order of preference."""
    solution, _ = search.run()

    assume(solution is not None)
    assert solution is not None
    found = solution.alternatives
    configurations = [solution.best.configuration, *(c.configuration for c in found)]
    assert len(found) <= min(NUM_ALTERNATIVES, solution.num_fitting - 1)
    assert sum(c.configuration.layers == solution.best.configuration.layers for c in found) <= 1
    layers = {c.configuration.layers for c in search.candidates}
    if len(layers) == len(search.candidates) <= MOST_TRIED and len(found) < NUM_ALTERNATIVES:
        assert len(found) == solution.num_fitting - 1
    assert len(set(configurations)) == len(configurations)
    assert all(c.prediction.peak_reserved_bytes <= search.problem.budget_bytes for c in found)
    shown = list(map(preference(search.problem.workload.objective), found))
    assert shown == sorted(shown)
    assert all(search.order(solution)[0][:-1] <= other[:-1] for other in shown)  # tracing changes bytes alone


@given(searches())
def test_other_strategies_come_before_other_batches(search: Search) -> None:
    """Of the strategies that are left, the alternatives show as many as there is room for."""
    solution, tracer = Search(search.problem, search.candidates, dict.fromkeys(STRATEGIES, 1.0)).run()

    assume(solution is not None)
    assert solution is not None
    others = {c.configuration.layers for c in tracer.fitting()} - {solution.best.configuration.layers}
    offered = {c.configuration.layers for c in solution.alternatives} - {solution.best.configuration.layers}
    assert len(offered) == min(len(others), NUM_ALTERNATIVES)


@given(searches(), st.integers(0, 16 * MIB))
def test_more_memory_never_makes_it_worse(search: Search, more: int) -> None:
    """With more memory the answer is as good or better, and no slower than what counts as the same speed."""
    gpu = replace(search.problem.gpu, memory_bytes=search.problem.gpu.memory_bytes + more)
    larger = replace(search, problem=replace(search.problem, gpu=gpu))

    small, large = search.run()[0], larger.run()[0]

    assume(small is not None)
    assert small is not None and large is not None
    assert search.order(large)[0] <= search.order(small)[0]
    if search.problem.workload.objective != "quality":
        assert large.best.prediction.step_seconds <= small.best.prediction.step_seconds * (1 + SAME_SPEED)


@given(searches())
def test_quality_takes_the_finest_weights_that_fit(search: Search) -> None:
    """By quality the weights' error comes first, then the rank, and time last."""
    workload = replace(search.problem.workload, objective="quality")
    solution, tracer = replace(search, problem=replace(search.problem, workload=workload)).run()

    assume(solution is not None)
    assert solution is not None
    possible, best = tracer.fitting(), solution.best
    finest = min(c.weight_error for c in possible)
    assert best.weight_error == finest
    assert best.configuration.rank == max(c.configuration.rank for c in possible if c.weight_error == finest)


@given(st.integers(-2000, 2000), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_within_the_same_speed_finer_weights_win(step: int, fine: float, coarse: float) -> None:
    """In one step of SAME_SPEED the weights decide, whichever is a little faster."""
    candidates_ = [
        candidate(strategy, (1 + SAME_SPEED) ** (step + part)) for strategy, part in ((COARSE, coarse), (FINE, fine))
    ]

    best = min(candidates_, key=preference("time"))

    assert best.weight_error == 0


@given(st.floats(1e-3, 1e4), st.floats(1 + SAME_SPEED, 100))
def test_beyond_the_same_speed_the_faster_wins(seconds: float, ratio: float) -> None:
    """One step of SAME_SPEED or more apart, no finer weights make up for time."""
    slow, fast = candidate(FINE, seconds * ratio * (1 + 1e-9)), candidate(COARSE, seconds)

    assert min(slow, fast, key=preference("time")) is fast
    assert min(slow, fast, key=preference("cost")) is fast
    assert min(slow, fast, key=preference("quality")) is slow


@settings(max_examples=50)
@given(problems())
def test_the_smallest_has_the_lowest_peak(problem: Problem) -> None:
    """Nothing that is proposed needs less than what is called smallest."""
    found = smallest(problem)

    assert found is not None
    assert found.prediction.peak_reserved_bytes == min(c.prediction.peak_reserved_bytes for c in candidates(problem))


def test_without_strategies_there_is_no_answer() -> None:
    """No profiles, no candidates, nothing smallest and nothing to trace."""
    empty = Problem(Workload(), 3, T4, {})

    def trace(_configuration: Configuration) -> TracedPeak:
        raise AssertionError("there is nothing to trace")

    assert solve(empty, trace) is None
    assert smallest(empty) is None


def test_the_solution_is_a_value() -> None:
    """Nobody changes an answer after the fact."""
    assert Solution.__dataclass_params__.frozen  # type: ignore[attr-defined]
