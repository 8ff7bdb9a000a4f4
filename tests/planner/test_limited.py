"""Plans in stages that must keep a deadline or a weight error: what is found keeps them, and its proof holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from shallowflow.planner import quality, schedule, staged_plan, staged_proof
from shallowflow.planner.chain import Choice, Group
from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.pipelined import Memory, StagedSearch
from shallowflow.planner.plan import Objective, Workload
from shallowflow.planner.problem import SECOND, Problem
from shallowflow.planner.proof import NUMBERS, Proof
from shallowflow.planner.staged import Staging, repriced
from shallowflow.planner.staged_price import usual_price
from shallowflow.planner.strategies import Cell, Configuration, Strategy
from shallowflow.profiles import load_gpu
from tests.planner.test_staged import stagings, ways

PLAIN = Strategy(weight_format="fp16", activations="save")
MIDDLE = Strategy(weight_format="int8", activations="save")
COARSE = Strategy(weight_format="nf4", activations="save")
FORGETFUL = Memory(recall=lambda _asked: None, keep=lambda _asked, _told: None)


def at_usual_price(staging: Staging) -> Staging:
    """*staging* with the price of harm that a search for time has."""
    (found,) = repriced([staging], usual_price("time", [(staging.told(0), staging.layers())]))
    return found


def honest(staging: Staging) -> Staging:
    """*staging* whose layers are stored as they are, or in nf4, which is faster here, each with its own harm."""
    groups = []
    for group in staging.groups:
        first, second = group.choices
        slow = max(1, first.device_picoseconds, second.device_picoseconds)
        fast = max(1, min(first.device_picoseconds, second.device_picoseconds))
        made = (
            replace(first, strategy=PLAIN, device_picoseconds=slow, host_picoseconds=0, harm=0),
            replace(second, strategy=COARSE, device_picoseconds=fast, host_picoseconds=0, harm=quality.harm(COARSE)),
        )
        groups.append(replace(group, choices=made))
    return at_usual_price(replace(staging, groups=tuple(groups)))


def search_of(staging: Staging, workload: Workload) -> StagedSearch:
    """The search in one cell, in which stages that are traced take what they may."""

    def trace(_configuration: Configuration, _stage: int) -> TracedPeak:
        return TracedPeak(resident_bytes=0, peak_allocated_bytes=0, peak_reserved_bytes=0, parts=(), attention="SDPA")

    kinds = (0,) * staging.num_layers
    posed = Problem(workload, load_gpu("t4"), kinds, {}, {}, staging.cell.rank)
    return StagedSearch(posed, trace, [staging], FORGETFUL)


def rows(staging: Staging) -> list[tuple[int, int]]:
    """Of every way, what it loses and the step it takes."""
    return [
        (sum(choice.harm for choice in way), score - sum(choice.penalty_picoseconds for choice in way))
        for (_, way), _, score in ways(staging)
    ]


def workload_of(staging: Staging, harm: int | None, step: int | None) -> Workload:
    """One step of *staging*, which may lose and take so much."""
    work = Workload(num_gpus=staging.num_stages, sequence_length=16, total_tokens=16, global_batch_size=1)
    if harm is not None:
        work = replace(work, max_weight_error=(harm / quality.HARM / staging.num_layers) ** 0.5 * (1 + 1e-9))
    return work if step is None else replace(work, deadline_hours=(step + 1000) / SECOND / 3600)


@given(stagings(), st.data())
def test_limits_are_kept_and_proven(drawn: Staging, data: st.DataObject) -> None:
    """Whatever step or error of some way is the most that may be, or both, what is found has no more."""
    staging = honest(drawn)
    every = rows(staging)
    harm, step = data.draw(st.sampled_from(every))
    kind = data.draw(st.sampled_from(["harm", "step", "both"]))
    workload = workload_of(staging, None if kind == "step" else harm, None if kind == "harm" else step)

    search = search_of(staging, workload)
    found = staged_plan.solution(search, 1)

    limits = search.problem.limits
    is_best = search.best()
    assert is_best is not None
    told = "missed" if found is None else "usual" if found.best.configuration == is_best.configuration else "other"
    event(f"{kind}: {told}")
    if found is None:
        assert kind == "both"  # of either limit alone the end is always looked at
        return
    assert staged_proof.doubts(found.proof, found.best.configuration, [staging.cell], workload.objective) == []
    assert (found.proof.harm, found.proof.step_picoseconds) == (limits.harm, limits.step_picoseconds)
    for one in (found.best, *found.alternatives):
        taken = staged_proof.reckoned(found.proof, one.configuration)
        assert limits.harm is None or taken.harm <= limits.harm
        assert limits.step_picoseconds is None or taken.step_picoseconds <= limits.step_picoseconds


def layered(*seconds: tuple[Strategy, float]) -> Staging:
    """Eight layers alike in two stages, with what a layer takes under each strategy."""
    cell = Cell(micro_batch_size=1, gradient_accumulation_steps=4, rank=8, loss_chunks=1)
    choices = tuple(
        Choice(
            strategy=strategy,
            resident_bytes=0,
            forward_high_bytes=0,
            forward_change_bytes=0,
            release_bytes=0,
            backward_high_bytes=0,
            backward_change_bytes=0,
            device_picoseconds=round(each * SECOND),
            host_picoseconds=0,
            harm=quality.harm(strategy),
        )
        for strategy, each in seconds
    )
    made = Staging(
        cell=cell,
        num_stages=2,
        groups=(Group(num_layers=8, choices=choices),),
        fixed_bytes=(0, 0),
        head_high_bytes=0,
        head_change_bytes=0,
        device_picoseconds=0,
        host_picoseconds=0,
        update_high_bytes=0,
        update_picoseconds=0,
        message_bytes=0,
        message_picoseconds=0,
    )
    return at_usual_price(made)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_what_keeps_both_limits_is_found(scale: float) -> None:
    """int8 between nf4, which is too coarse, and fp16, which is too slow, at whatever seconds."""
    staging = layered((COARSE, 0.010 * scale), (MIDDLE, 0.011 * scale), (PLAIN, 0.012 * scale))
    (step,) = {step for harm, step in uniform(staging) if harm == 8 * quality.harm(MIDDLE)}

    found = staged_plan.solution(search_of(staging, workload_of(staging, 8 * quality.harm(MIDDLE), step)), 0)

    assert found is not None
    assert set(found.best.configuration.strategies()) == {MIDDLE}
    assert staged_proof.doubts(found.proof, found.best.configuration, [staging.cell], "time") == []


@pytest.mark.parametrize("slower", [1.5, 2.0, 3.0, 10.0])
def test_finer_weights_are_found_however_slow(slower: float) -> None:
    """Where int8 is too coarse for any layer."""
    staging = layered((MIDDLE, 0.01), (PLAIN, 0.01 * slower))

    found = staged_plan.solution(search_of(staging, workload_of(staging, 0, None)), 0)

    assert found is not None and set(found.best.configuration.strategies()) == {PLAIN}


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e2])
def test_between_too_slow_and_fastest_there_is_more(scale: float) -> None:
    """Some layers stay fine where the deadline leaves time for them, whatever a step takes."""
    staging = layered((COARSE, 0.0100 * scale), (PLAIN, 0.0101 * scale))
    fast, slow = (step for _, step in sorted(uniform(staging), key=lambda row: row[1]))

    found = staged_plan.solution(search_of(staging, workload_of(staging, None, (fast + slow) // 2)), 0)

    assert found is not None
    assert set(found.best.configuration.strategies()) == {COARSE, PLAIN}
    assert found.proof.gap < 0.01


def uniform(staging: Staging) -> list[tuple[int, int]]:
    """What every strategy for all layers loses, and the step it takes."""
    return [
        (8 * c.harm, schedule.step_picoseconds([4 * c.device_picoseconds] * 2, staging.num_micro_batches, 1))
        for c in staging.groups[0].choices
    ]


def test_a_price_or_a_harm_that_was_changed_is_caught() -> None:
    """Neither is taken on trust, whatever the gap says."""
    staging = layered((COARSE, 0.0100), (PLAIN, 0.0101))
    fast, slow = (step for _, step in sorted(uniform(staging), key=lambda row: row[1]))
    found = staged_plan.solution(search_of(staging, workload_of(staging, None, (fast + slow) // 2)), 0)
    assert found is not None
    configuration, proof = found.best.configuration, found.proof

    def doubts(changed: Proof, objective: Objective = "time") -> str:
        return "; ".join(staged_proof.doubts(changed, configuration, [staging.cell], objective))

    assert "a unit of harm is held to be worth" in doubts(proof, "quality")
    assert doubts(replace(proof, harm_price=1)) != ""
    for name, value in (("harm", 0), ("harm", -5), ("penalty_picoseconds", -7)):
        ((group, *others),) = proof.tables
        table = [list(row) for row in group.choices]
        for row in table:
            row[1 + NUMBERS.index(name)] = value
        changed = replace(group, choices=tuple(map(tuple, table)))
        assert doubts(replace(proof, tables=((changed, *others),))) != ""
