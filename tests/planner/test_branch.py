"""The search's answer is the enumeration's, its proof shows it, and a proof of anything better is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks import solver
from shallowflow.planner import branch, listing, open_ways
from shallowflow.planner.branch import BranchAndBound, solve
from shallowflow.planner.certificate import Node, Tree, lower_bound
from shallowflow.planner.chain import Chain, Choice, Group, Limits, backward_order, dominated, no_worse, taken
from shallowflow.planner.needs import Unproven
from shallowflow.planner.open_ways import OpenWays
from tests.planner.chains import MIB, best, chains, choices, limited, ways
from tests.strategies import STRATEGIES

EXACT = 1e-9


@settings(max_examples=400)
@given(limited())
def test_the_answer_is_the_enumerations(problem: tuple[Chain, Limits]) -> None:
    """Neither more nor less than the best score, or None precisely where nothing is within the limits."""
    chain, limits = problem

    found = solve(chain, limits)

    expected = best(chain, limits)
    if expected is None:
        assert found.best is None
        assert lower_bound(chain, limits, found.tree) is None
        return
    assert found.best is not None
    assert found.best.taken.score_picoseconds == expected.score_picoseconds
    assert found.best.taken == taken(chain, found.best.counts)
    assert found.best.taken.within(limits)
    shown = lower_bound(chain, limits, found.tree)
    assert shown is not None
    assert _nearly(expected.score_picoseconds, -2e-7) <= shown <= _nearly(expected.score_picoseconds, EXACT) + 1


@settings(max_examples=200)
@given(limited(), st.sampled_from([0, 3, 30]), st.sampled_from([0, 3, 30]))
def test_the_answer_is_the_same_however_few_ways_are_gone_through(
    problem: tuple[Chain, Limits], at_the_root: int, inside: int
) -> None:
    """What is too much to go through is divided, and the proof then shows the same."""
    chain, limits = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "MOST_PARTS", at_the_root)
        patch.setattr(branch, "MOST_PARTS_INSIDE", inside)
        found = solve(chain, limits)

    expected = best(chain, limits)
    assert (found.best and found.best.taken.score_picoseconds) == (expected and expected.score_picoseconds)
    shown = lower_bound(chain, limits, found.tree)
    if expected is None:
        assert shown is None
        return
    assert shown is not None
    assert _nearly(expected.score_picoseconds, -2e-7) <= shown <= _nearly(expected.score_picoseconds, EXACT) + 1


@pytest.mark.parametrize("num_layers", [32, 126])
def test_layers_alike_are_proved_to_the_picosecond_without_a_division(num_layers: int) -> None:
    """Of 36 strategies the prices leave so few ways open that each is looked at."""
    chain, limits = solver.alike(num_layers, seed=1, share=0.2)

    found = solve(chain, limits)

    assert found.best is not None
    assert len(found.tree.nodes) == 1
    assert lower_bound(chain, limits, found.tree) == found.best.taken.score_picoseconds


@settings(max_examples=150)
@given(limited(), st.data())
def test_a_leaf_is_gone_through_whatever_its_prices(problem: tuple[Chain, Limits], data: st.DataObject) -> None:
    """It shows the best score, and nothing above; anything, where nothing is within the limits."""
    chain, limits = problem
    found, expected = solve(chain, limits), best(chain, limits)
    leaves = [node for node in found.tree.nodes if node.split is None and not node.infeasible]
    leaf = data.draw(st.sampled_from([Node(), *leaves]))
    leaf = replace(leaf, prices=tuple(p for p in leaf.prices if p.choice is None and p.divisor is None))

    def shown(least: int) -> int | None:
        return lower_bound(chain, limits, replace(found.tree, nodes=(replace(leaf, at_least_picoseconds=least),)))

    if expected is None:
        assert shown(10**16) == 10**16
        return
    assert shown(expected.score_picoseconds) == expected.score_picoseconds
    with pytest.raises(Unproven, match="scores less than a leaf promises"):
        shown(expected.score_picoseconds + 1)


def test_a_leaf_that_leaves_too_much_open_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check ends, whatever a proof asks it to go through."""
    monkeypatch.setattr(open_ways, "MOST_PARTS", 20_000)
    chain, _ = solver.alike(32, seed=1, share=0.2)
    everything = tuple(tuple(None for _ in group.choices) for group in chain.groups)

    with pytest.raises(Unproven, match="leave more open"):
        lower_bound(
            chain, Limits(memory_bytes=1), Tree(nodes=(Node(at_least_picoseconds=2**60),), dominated=everything)
        )


def test_layers_whose_choice_is_certain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of more layers than may be followed is not built, however few of them are left to choose."""
    monkeypatch.setattr(open_ways, "MOST_PARTS", 20_000)
    chain, _ = solver.alike(32, seed=1, share=0.2)
    chain = replace(chain, groups=(replace(chain.groups[1], num_layers=20_001),))
    nodes = (Node(split=(0, 0, 20_000), children=(1, 2)), Node(), Node(at_least_picoseconds=2**60))

    with pytest.raises(Unproven, match="leave more open"):
        lower_bound(chain, Limits(memory_bytes=1), Tree(nodes=nodes, dominated=_nothing(chain)))


def test_several_trees_share_what_may_be_followed() -> None:
    """Of ways that are open in one tree there are as many fewer for the next."""
    chain, limits = solver.alike(32, seed=1, share=0.2)
    found = solve(chain, limits)
    opened = OpenWays()

    lower_bound(chain, limits, found.tree, opened)
    once = opened.followed
    lower_bound(chain, limits, found.tree, opened)

    assert opened.followed == 2 * once > 0


def test_a_tree_whose_parts_share_a_child_is_refused() -> None:
    """Sixty nodes do not have 2**30 leaves."""
    chain, limits = solver.alike(32, seed=1, share=0.2)
    nodes = [Node(split=(0, 0, 0), children=(n + 1, n + 1)) for n in range(40)]

    with pytest.raises(Unproven, match="child that is another's"):
        lower_bound(chain, limits, Tree(nodes=(*nodes, Node()), dominated=_nothing(chain)))


def _nearly(score: int, share: float) -> float:
    """*score* and so much more or less of its size; it may be below zero where harm has prices."""
    return score + share * abs(score)


def _nothing(chain: Chain) -> tuple[tuple[None, ...], ...]:
    """That no choice is dominated."""
    return tuple(tuple(None for _ in group.choices) for group in chain.groups)


@settings(max_examples=150)
@given(limited(), st.integers(0, 40))
def test_a_proof_that_is_cut_short_shows_less_and_nothing_wrong(problem: tuple[Chain, Limits], nodes: int) -> None:
    """However early a search ends, no choice within the limits scores less than its bound."""
    chain, limits = problem
    search = BranchAndBound(chain, limits)

    found = search.search(most_nodes=nodes)

    expected = best(chain, limits)
    for tree in (found.tree, search.root):
        shown = lower_bound(chain, limits, tree)
        if expected is not None:
            assert shown is not None
            assert shown <= _nearly(expected.score_picoseconds, EXACT) + 1


@settings(max_examples=150)
@given(limited(), st.data())
def test_a_cutoff_leaves_out_only_what_is_no_better(problem: tuple[Chain, Limits], data: st.DataObject) -> None:
    """Called again with a higher cutoff, a search finds what it left out."""
    chain, limits = problem
    expected = best(chain, limits)
    assume(expected is not None and expected.score_picoseconds > 0)
    assert expected is not None
    seconds = expected.score_picoseconds / 1e12
    search = BranchAndBound(chain, limits)

    low = search.search(seconds * data.draw(st.sampled_from([0.5, 0.99])))
    high = search.search(seconds * 1.01)

    assert low.best is None
    assert high.best is not None
    assert high.best.taken.score_picoseconds == expected.score_picoseconds


@settings(max_examples=150)
@given(limited())
def test_a_better_bound_than_is_true_is_not_shown(problem: tuple[Chain, Limits]) -> None:
    """Whatever prices a leaf has, what they show holds; a leaf said to be infeasible must show it."""
    chain, limits = problem
    found = solve(chain, limits)
    expected = best(chain, limits)
    assume(expected is not None)
    assert expected is not None

    for number, node in enumerate(found.tree.nodes):
        if node.split is not None:
            continue
        dearer = tuple(replace(price, amount=2 * price.amount + 1) for price in node.prices)
        for changed in (replace(node, prices=dearer), replace(node, device_share=node.device_share // 2)):
            nodes = (*found.tree.nodes[:number], changed, *found.tree.nodes[number + 1 :])
            try:
                shown = lower_bound(chain, limits, replace(found.tree, nodes=nodes))
            except Unproven:
                continue
            assert shown is not None
            assert shown <= _nearly(expected.score_picoseconds, EXACT) + 1


@given(limited())
def test_a_planted_infeasible_leaf_is_caught(problem: tuple[Chain, Limits]) -> None:
    """That nothing is within the limits cannot be said of a chain of which something is."""
    chain, limits = problem
    assume(best(chain, limits) is not None)
    everything = tuple(tuple(None for _ in group.choices) for group in chain.groups)

    for prices in ((), solve(chain, limits).tree.nodes[0].prices):
        with pytest.raises(Unproven, match="infeasible"):
            lower_bound(chain, limits, Tree(nodes=(Node(prices=prices, infeasible=True),), dominated=everything))


@given(chains())
def test_more_memory_is_never_slower(chain: Chain) -> None:
    """The best score falls or stays as the limit grows."""
    peaks = sorted({found.peak_bytes for _, found in ways(chain)})
    scores: list[float] = []
    for peak in peaks[:: max(1, len(peaks) // 5)]:
        found = solve(chain, Limits(memory_bytes=peak)).best
        scores.append(float("inf") if found is None else found.taken.score_picoseconds)

    assert scores == sorted(scores, reverse=True)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6).flatmap(lambda n: st.tuples(*(choices(i) for i in n))))
def test_what_is_dominated_can_be_replaced(group: tuple[Choice, ...]) -> None:
    """Whatever dominates is no worse, and is dominated by nothing itself."""
    by = dominated(group)

    for index, better in enumerate(by):
        if better is not None:
            assert by[better] is None
            assert no_worse(group[better], group[index])
    assert any(better is None for better in by)


@settings(max_examples=60)
@given(chains(), st.data())
def test_no_order_of_a_groups_layers_has_a_lower_backward_peak(chain: Chain, data: st.DataObject) -> None:
    """Layers that free come first, then those that leave something; no permutation of them does better."""
    group = chain.groups[0].choices
    made = [group[data.draw(st.integers(0, len(group) - 1))] for _ in range(4)]

    def peak(order: list[Choice]) -> int:
        level = highest = 1000 * MIB
        for choice in order:
            highest = max(highest, level + choice.backward_high_bytes)
            level += choice.backward_change_bytes
        return highest

    ordered = [made[i] for i in backward_order(made)]
    shuffled = data.draw(st.permutations(made))
    assert peak(ordered) <= peak(shuffled)


def test_no_part_is_gone_through_twice() -> None:
    """Where all that is followed scores more than up to where it was: what is followed next is more, not the same."""
    rows = [(0, 0, 5632, 1000960), (0, 390_000, 399872, 197632), (215_266_127, 390_000, 11264, 2560)]
    more = [(0, 0, 4096, 2048), (0, 390_000, 30720, 76288), (50_003_708_029, 390_000, 6656, 911872)]
    chain = Chain(
        groups=tuple(Group(num_layers=1, choices=tuple(map(lean, range(3), table))) for table in (rows, more)),
        gradient_accumulation_steps=1,
        fixed_bytes=10_005_345,
        head_high_bytes=5120,
        head_change_bytes=512,
        update_high_bytes=0,
        device_picoseconds=3_000_020,
        host_picoseconds=39_000_000,
        update_picoseconds=0,
        harm_price=390,
    )
    limits = Limits(memory_bytes=10_608_480, harm=None, host_bytes=None, step_picoseconds=None)
    followed: list[object] = []
    real = listing.ways_below

    def noted(relaxation: object, point: object, bounds: object, below: float, most: int) -> object:
        followed.append((str(bounds), below))
        return real(relaxation, point, bounds, below, most)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "ways_below", noted)
        found = solve(chain, limits)

    least = best(chain, limits)
    assert found.best is not None and least is not None
    assert found.best.taken.score_picoseconds == least.score_picoseconds
    assert len(followed) == len(set(followed)) > 1


def lean(number: int, row: tuple[int, int, int, int]) -> Choice:
    """A choice of (device, penalty, forward, backward)."""
    device, penalty, forward, backward = row
    return Choice(
        strategy=STRATEGIES[number],
        resident_bytes=2048 if penalty else 512,
        forward_high_bytes=forward,
        forward_change_bytes=forward,
        release_bytes=0,
        backward_high_bytes=backward,
        backward_change_bytes=1024 - forward,
        device_picoseconds=device,
        host_picoseconds=39_000_000 if device > 10**9 else 228_000_000 if device else 0,
        penalty_picoseconds=penalty,
        harm=1000 if penalty else 0,
        host_bytes=0,
    )
