"""Where layers differ in what formats do to them, the best by counts and prices bounds the best there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shallowflow.planner import problem as posing
from shallowflow.planner import proof_check, quality, solver
from shallowflow.planner.arrangement import Prices, arranged, least_harm, prices, repriced
from shallowflow.planner.chain import Chain, Counts, Group, Limits, Taken, taken
from shallowflow.planner.problem import Problem
from shallowflow.planner.solver import solve
from shallowflow.planner.strategies import Strategy
from shallowflow.planner.weighed import LayerErrors
from tests.planner.chains import ways
from tests.planner.test_solver import NONE, Tracer, considered
from tests.strategies import problems

ROUNDING = 2
"""What whole prices may cost a layer's harm."""
errors = st.floats(0.001, 0.3)
layers = st.builds(LayerErrors, int8=errors, nf4=errors, double_quantized=errors)


@st.composite
def weighed(draw: st.DrawFn) -> Problem:
    """A problem whose layers' weights were measured, alike or not, perhaps with a bound on their error."""
    posed = draw(problems())
    each = draw(st.lists(layers, min_size=posed.num_layers, max_size=posed.num_layers))
    if draw(st.booleans()):
        each = [each[0]] * posed.num_layers
    work = replace(posed.workload, max_weight_error=draw(st.none() | errors))
    return replace(posed, weighed=tuple(each), workload=work)


def orders(problem: Problem, chain: Chain) -> Iterator[tuple[tuple[Strategy, ...], Taken]]:
    """Every way to give each layer a strategy, and what it takes by that layer's own harm."""
    choices = [group.choices for group in chain.groups for _ in range(group.num_layers)]
    alone = replace(chain, groups=tuple(Group(num_layers=1, choices=each) for each in choices))
    for picks in itertools.product(*(range(len(each)) for each in choices)):
        counts = [tuple(int(i == p) for i in range(len(each))) for each, p in zip(choices, picks, strict=True)]
        needs = taken(alone, tuple(counts))
        given = tuple(each[pick].strategy for each, pick in zip(choices, picks, strict=True))
        harm = sum(quality.harm(one, own) for one, own in zip(given, problem.weighed, strict=True))
        score = needs.step_picoseconds + chain.harm_price * harm
        yield given, replace(needs, harm=harm, score_picoseconds=score)


@settings(max_examples=40)
@given(weighed())
def test_the_proof_is_of_the_best_order_of_layers(problem: Problem) -> None:
    """Nothing that each layer may be given scores less than the proof's bound, and what is found is as it says."""
    assume(problem.num_layers < 5)
    cells = considered(problem)[:3]

    found = solve(problem, cells, Tracer(problem, NONE), num_alternatives=0)

    scores = [
        needs.score_picoseconds
        for chain in posing.chains(problem, cells).values()
        for _, needs in orders(problem, chain)
        if needs.within(problem.limits)
    ]
    if found is None:
        assert problem.workload.max_weight_error is not None or not scores
        return
    proof = found.proof
    assert proof.bound_picoseconds <= min(scores) <= proof.score_picoseconds
    assert proof.score_picoseconds * (1 - proof.gap) <= min(scores) * (1 + 1e-9)
    assert proof_check.verify(proof, found.best.configuration, cells) == []
    given = found.best.configuration.strategies()
    assert found.best.weight_error == pytest.approx(quality.mean_error(given, problem.weighed))


@settings(max_examples=40)
@given(weighed(), st.data())
def test_whatever_the_prices_counts_promise_no_more_than_is_true(problem: Problem, data: st.DataObject) -> None:
    """By any prices of harm, counts score no more than every order of theirs; by those they support, as the best."""
    assume(problem.num_layers < 5)
    cell = considered(problem)[0]
    chain = posing.chains(problem, (cell,))[cell]
    counts, _ = data.draw(st.sampled_from(list(itertools.islice(ways(chain), 500))))
    amounts = st.integers(-(10**8), 10**8)
    told: Prices = tuple({f: data.draw(amounts) for f in each} for each in prices(chain, counts))

    least = min(n.harm for given, n in orders(problem, chain) if counted(chain, given) == counts)

    assert taken(repriced(chain, told), counts).harm <= least
    supported = taken(repriced(chain, prices(chain, counts)), counts).harm
    assert least - problem.num_layers * ROUNDING <= supported <= least
    assert arranged(chain, counts, Limits(memory_bytes=2**62)).taken.harm == least


def counted(chain: Chain, given: tuple[Strategy, ...]) -> Counts:
    """How often each group's choices are in *given*."""
    rest = list(given)
    found = []
    for group in chain.groups:
        own, rest = rest[: group.num_layers], rest[group.num_layers :]
        found.append(tuple(own.count(choice.strategy) for choice in group.choices))
    return tuple(found)


@settings(max_examples=60)
@given(weighed(), st.data())
def test_an_order_keeps_to_the_memory(problem: Problem, data: st.DataObject) -> None:
    """Where the order for the lowest peak fits, so does the one chosen, which never harms more."""
    cell = considered(problem)[0]
    chain = posing.chains(problem, (cell,))[cell]
    counts, needs = data.draw(st.sampled_from(list(itertools.islice(ways(chain), 500))))

    found = arranged(chain, counts, Limits(memory_bytes=needs.peak_bytes))

    assert found.taken.peak_bytes <= needs.peak_bytes
    assert counted(chain, found.strategies) == counts
    assert found.taken.harm >= needs.harm
    both = zip(found.strategies, problem.weighed, strict=True)
    assert found.taken.harm == sum(quality.harm(strategy, own) for strategy, own in both)


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4), min_size=1, max_size=6), st.data())
def test_formats_are_handed_out_at_the_least_harm(harms: list[tuple[int, ...]], data: st.DataObject) -> None:
    """No permutation of the formats given sums to less."""
    given = data.draw(st.lists(st.integers(0, 3), min_size=len(harms), max_size=len(harms)))

    found = least_harm(harms, given)

    def total(chosen: tuple[int, ...] | list[int]) -> int:
        return sum(row[c] for row, c in zip(harms, chosen, strict=True))

    assert sorted(found) == sorted(given)
    assert total(found) == min(map(total, itertools.permutations(given)))


@settings(max_examples=30)
@given(weighed(), st.data())
def test_a_layers_harm_that_was_changed_is_caught(problem: Problem, data: st.DataObject) -> None:
    """A proof whose layers' own harms are smaller, or whose price of harm is another, does not hold."""
    cells = considered(problem)[:3]
    found = solve(problem, cells, Tracer(problem, NONE), num_alternatives=0)
    assume(found is not None)
    assert found is not None
    proof, chosen = found.proof, found.best.configuration
    layer = data.draw(st.integers(0, problem.num_layers - 1))
    place = proof.strategies.index(chosen.strategies()[layer])
    assume(proof.harms[layer][place] > 0 and proof.harm_price > 0)
    smaller = tuple(h // 2 if i == place else h for i, h in enumerate(proof.harms[layer]))
    harms = (*proof.harms[:layer], smaller, *proof.harms[layer + 1 :])

    for changed in (replace(proof, harms=harms), replace(proof, harm_price=proof.harm_price + 1)):
        assert proof_check.verify(changed, chosen, cells)


@settings(max_examples=25, deadline=None)
@given(weighed())
def test_looking_for_less_harm_uses_up_no_trace(problem: Problem) -> None:
    """Where nothing is fragmented, one trace is enough for the plan that many find."""
    cells = considered(problem)[:3]
    many = solve(problem, cells, Tracer(problem, NONE), num_alternatives=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "MOST_TRACES", 1)
        one = solve(problem, cells, Tracer(problem, NONE), num_alternatives=0)

    assert (one and one.best) == (many and many.best)
