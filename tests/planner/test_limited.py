"""Plans in stages that must keep a deadline or a weight error: what is found keeps them, and its proof holds."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import event, given
from hypothesis import strategies as st

from shallowflow.planner import quality, staged_plan, staged_proof
from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.pipelined import Memory, StagedSearch
from shallowflow.planner.plan import Workload
from shallowflow.planner.problem import SECOND, Problem
from shallowflow.planner.staged import Staging, repriced
from shallowflow.planner.strategies import Configuration, Strategy
from shallowflow.profiles import load_gpu
from tests.planner.chains import GIGA
from tests.planner.test_staged import stagings, ways

PLAIN = Strategy(weight_format="fp16", activations="save")
COARSE = Strategy(weight_format="nf4", activations="save")
FORGETFUL = Memory(recall=lambda _asked: None, keep=lambda _asked, _told: None)


def honest(staging: Staging, price: int) -> Staging:
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
    (found,) = repriced([replace(staging, groups=tuple(groups))], price)
    return found


def search_of(staging: Staging, workload: Workload) -> StagedSearch:
    """The search in one cell, in which stages that are traced take what they may."""

    def trace(_configuration: Configuration, _stage: int) -> TracedPeak:
        return TracedPeak(resident_bytes=0, peak_allocated_bytes=0, peak_reserved_bytes=0, parts=(), attention="SDPA")

    kinds = (0,) * staging.num_layers
    posed = Problem(workload, load_gpu("t4"), kinds, {}, {}, staging.cell.rank)
    return StagedSearch(posed, trace, [staging], FORGETFUL)


@given(stagings(), st.data())
def test_limits_are_kept_and_proven(drawn: Staging, data: st.DataObject) -> None:
    """Whatever step or error of some way is the most that may be, what is found has no more."""
    staging = honest(drawn, data.draw(st.sampled_from([10, 10**3, 10**5])))
    every = [
        (sum(choice.harm for choice in way), score - sum(choice.penalty_picoseconds for choice in way))
        for (_, way), _, score in ways(staging)
    ]
    workload = Workload(num_gpus=staging.num_stages, sequence_length=16, total_tokens=16, global_batch_size=1)
    if data.draw(st.booleans()):
        harm = data.draw(st.sampled_from(sorted({row[0] for row in every})))
        error = (harm / quality.HARM / staging.num_layers) ** 0.5
        workload = replace(workload, max_weight_error=error * (1 + 1e-9))
    else:
        step = data.draw(st.sampled_from(sorted({row[1] for row in every}))) + GIGA
        workload = replace(workload, deadline_hours=max(step, 1) / SECOND / 3600)

    search = search_of(staging, workload)
    found = staged_plan.solution(search, 1)

    limits = search.problem.limits
    is_best = search.best()
    assert is_best is not None
    event("missed" if found is None else "usual" if found.best.configuration == is_best.configuration else "other")
    if found is None:
        return
    assert staged_proof.doubts(found.proof, found.best.configuration, [staging.cell]) == []
    taken = staged_proof.reckoned(found.proof, found.best.configuration)
    assert limits.harm is None or taken.harm <= limits.harm
    assert limits.step_picoseconds is None or taken.step_picoseconds <= limits.step_picoseconds
    assert (found.proof.harm, found.proof.step_picoseconds) == (limits.harm, limits.step_picoseconds)
    for other in found.alternatives:
        at = staged_proof.reckoned(found.proof, other.configuration)
        assert limits.harm is None or at.harm <= limits.harm
