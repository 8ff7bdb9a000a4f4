"""Models cut into stages: what is shown of them holds for every cut, and what is found is what it says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from shallowflow.planner import schedule, staged_bound, staged_limits, staged_proof
from shallowflow.planner.chain import Choice, Group, Limits
from shallowflow.planner.cuts import FAR
from shallowflow.planner.cutting import Cutting, StagedChoice, bounds_of
from shallowflow.planner.needs import Unproven
from shallowflow.planner.proof import NUMBERS, Proof, Tables
from shallowflow.planner.reckoning import reckoned
from shallowflow.planner.staged import Staging, repriced
from shallowflow.planner.strategies import Cell, Configuration, StrategyRun
from tests.planner.chains import MIB, choices, sizes, times


@st.composite
def stagings(draw: st.DrawFn) -> Staging:
    """A few layers, of one kind or of several, with two choices each, in two or three stages, whole or interleaved."""
    layers = draw(st.sampled_from([(4,), (1, 2, 1), (2, 2), (1, 3, 1), (6,), (1, 4, 1)]))
    stages, each = draw(st.integers(2, 3)), sum(layers)
    micro_batches = draw(st.integers(stages, 8))
    parts = draw(st.sampled_from(schedule.parts_per_stage(each, stages, micro_batches)))
    cell = Cell(
        micro_batch_size=1,
        gradient_accumulation_steps=micro_batches,
        rank=8,
        loss_chunks=1,
    )
    return Staging(
        cell=cell,
        num_stages=stages,
        num_parts=parts,
        groups=tuple(Group(num_layers=n, choices=(draw(choices(0)), draw(choices(1)))) for n in layers),
        fixed_bytes=tuple(draw(sizes) for _ in range(stages)),
        head_high_bytes=draw(sizes),
        head_change_bytes=draw(sizes) // 8,
        device_picoseconds=draw(times),
        host_picoseconds=draw(times),
        update_high_bytes=draw(sizes) // 4,
        update_picoseconds=draw(times) // 100,
        message_bytes=draw(sizes) // 8,
        message_picoseconds=draw(times) // 100,
    )


Way = tuple[tuple[int, ...], tuple[Choice, ...]]


def ways(staging: Staging) -> Iterator[tuple[Way, list[int], int]]:
    """Every cut with every choice for each layer: the peaks of its stages, and its score."""
    number, of = staging.num_layers, staging.num_stages
    inners = itertools.combinations(range(1, number), of - 1)
    even = tuple(range(number // of, number, number // of))[: of - 1]
    for inner in inners if staging.num_parts == 1 else (even,):
        starts = (0, *inner)
        spans = [range(a, b) for a, b in itertools.pairwise((*starts, number))]
        stages = [list(stage_ways(staging, stage, layers)) for stage, layers in enumerate(spans)]
        update = staging.update_picoseconds * max(map(len, spans))
        for picked in itertools.product(*stages):
            chosen, peaks, busy, penalties = zip(*picked, strict=True)
            once = sum(one // staging.num_parts for one in busy) - max(busy) // staging.num_parts
            score = once + staging.num_micro_batches * max(busy) + update + sum(penalties)
            yield (starts, tuple(itertools.chain(*chosen))), list(peaks), score


def stage_ways(staging: Staging, stage: int, layers: range) -> Iterator[tuple[tuple[Choice, ...], int, int, int]]:
    """Every choice for each of a stage's layers, with its peak, its micro-batch's time and its penalties."""
    chain = staging.chain(stage, layers, 1)
    each = [group.choices for group in chain.groups for _ in range(group.num_layers)]
    for picked in itertools.product(*each):
        found = reckoned(chain, picked)
        yield picked, found.peak_bytes, found.step_picoseconds, found.score_picoseconds - found.step_picoseconds


def proof_of(staging: Staging, memory_bytes: int, score: int = 0) -> Proof:
    """What a plan of *staging* would carry."""
    tables = Tables()
    staged = (staging.told(tables.table(staging.groups)),)
    return Proof(
        status="feasible",
        gap=0.0,
        unfragmented_gap=0.0,
        score_picoseconds=score,
        bound_picoseconds=0,
        budget_bytes=memory_bytes,
        harm=None,
        host_bytes=None,
        step_picoseconds=None,
        strategies=tuple(tables.strategies),
        tables=tuple(tables.tables),
        cells=(),
        unfragmented=(),
        staged=staged,
    )


@given(stagings(), st.data())
def test_no_cut_scores_less_than_is_shown(staging: Staging, data: st.DataObject) -> None:
    """Whatever memory there is: of all cuts and choices that fit, the best is no better than the bound."""
    every = [(max(peaks), score) for _, peaks, score in ways(staging)]
    memory = data.draw(st.sampled_from(sorted({peak for peak, _ in every}))) + data.draw(st.sampled_from([0, MIB]))
    least = min(score for peak, score in every if peak <= memory)

    proof = proof_of(staging, memory)
    shown = staged_bound.bound(proof, proof.staged[0])

    assert shown is not None and shown <= least
    cut = bounds_of(staging, None).cut([memory] * staging.num_stages)
    assert cut is not None and cut.total == shown


@given(stagings(), st.data())
def test_what_is_chosen_fits_and_is_what_it_says(staging: Staging, data: st.DataObject) -> None:
    """Strategies of every stage within its memory, and a score by the proof's tables, no better than the best.

    The search is bounded and may miss what fits, which is why a plan tells its gap; here it is asked for what it finds.
    """
    every = [(max(peaks), score) for _, peaks, score in ways(staging)]
    memory = data.draw(st.sampled_from(sorted({peak for peak, _ in every})))
    least = min(score for peak, score in every if peak <= memory)

    found = Cutting(
        staging, bounds_of(staging, None), Limits(memory_bytes=memory), [memory] * staging.num_stages
    ).best()

    event("found" if found is not None else "missed")
    if found is None:
        return
    assert found.score_picoseconds >= least
    taken = staged_proof.reckoned(proof_of(staging, memory), configuration_of(found))
    assert taken.score_picoseconds == found.score_picoseconds
    assert taken.step_picoseconds == found.step_picoseconds
    assert max(taken.peak_bytes) <= memory


def configuration_of(found: StagedChoice) -> Configuration:
    """The configuration that a choice stands for."""
    cell = found.staging.cell
    return Configuration(
        layers=tuple(StrategyRun(first=n, last=n, strategy=s) for n, s in enumerate(found.strategies)),
        rank=cell.rank,
        alpha=8,
        sequence_length=16,
        micro_batch_size=cell.micro_batch_size,
        gradient_accumulation_steps=cell.gradient_accumulation_steps,
        num_gpus=len(found.starts),
        loss_chunks=cell.loss_chunks,
        stages=tuple(found.staging.order()[place] for place in found.starts),
        parts_per_stage=found.staging.num_parts,
    )


@given(stagings(), st.data())
def test_no_plan_within_limits_scores_less_than_is_shown(staging: Staging, data: st.DataObject) -> None:
    """Whatever price of harm the tables have: by the score's, of all that keep both limits."""
    usual, price = data.draw(st.sampled_from([100, 10**4, 10**5])), data.draw(st.sampled_from([0, 1000, 10**5, 10**6]))
    own = at_price(staging, price)
    every = [
        (max(peaks), sum(choice.harm for choice in way), score - sum(choice.penalty_picoseconds for choice in way))
        for (_, way), peaks, score in ways(own)
    ]
    memory, harm, step = (data.draw(st.sampled_from(sorted({row[n] for row in every}))) for n in range(3))
    bounded = data.draw(st.booleans())
    within = [row for row in every if row[0] <= memory and row[1] <= harm and (row[2] <= step or not bounded)]
    assume(within)

    proof = replace(proof_of(own, memory), harm_price=usual, harm=harm, step_picoseconds=step if bounded else None)
    shown = staged_limits.least_score(proof)

    least = min(seconds + usual * lost for _, lost, seconds in within)
    event("exact" if shown == least else "below")
    assert shown is not None and shown <= least


def at_price(staging: Staging, price: int) -> Staging:
    """*staging* with *price* for a unit of harm."""
    (found,) = repriced([staging], price)
    return found


@given(stagings())
def test_tables_at_no_one_price_show_nothing(staging: Staging) -> None:
    """A penalty that was changed, and a price above the score's where nothing limits harm."""
    assume(any(choice.harm for group in staging.groups for choice in group.choices))
    dear = replace(proof_of(at_price(staging, 2000), FAR), harm_price=1000)
    ((first, *others),) = dear.tables
    row = list(first.choices[0])
    row[1 + NUMBERS.index("penalty_picoseconds")] += 1
    changed = replace(first, choices=(tuple(row), *first.choices[1:]))

    with pytest.raises(Unproven, match="nothing limits it"):
        staged_limits.least_score(dear)
    with pytest.raises(Unproven, match="not its harm at one price"):
        staged_limits.least_score(replace(dear, tables=((changed, *others),)))


@given(stagings())
def test_what_fits_in_no_way_is_told(staging: Staging) -> None:
    """With no memory there is no cut, and no bound."""
    lean = replace(staging, fixed_bytes=tuple(MIB for _ in staging.fixed_bytes))
    proof = proof_of(lean, 0)

    assert staged_bound.bound(proof, proof.staged[0]) is None
    assert bounds_of(lean, None).cut([0] * lean.num_stages) is None
    assert FAR > 0
