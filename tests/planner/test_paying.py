"""A plan for several GPUs says what one would take, by a plan for one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shallowflow.planner import paying, words
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planning import beside_one, make_plan
from shallowflow.profiles import load_gpu, load_instances
from tests.planner.planned import SHORT, T4, model, planned, with_budget

TWO = replace(SHORT, num_gpus=2, num_stages=1, sharding="none", total_tokens=10_000_000)


def test_one_gpu_is_planned_as_if_it_were_asked_for() -> None:
    """The hours and dollars in the note are those of the plan that one GPU gets, its own limits left out."""
    work = replace(TWO, budget_usd=100.0)
    alone = make_plan(model(), T4, replace(SHORT, total_tokens=work.total_tokens))

    made = beside_one(planned(work), model(), T4)

    assert made.notes[:-1] == planned(work).notes
    assert made == replace(planned(work), notes=made.notes)
    for plan in (alone, made):
        assert (
            f"{words.duration(plan.wall.total_seconds)} and {words.usd(plan.offers[0].on_demand_usd)}" in made.notes[-1]
        )


def test_a_plan_for_one_gpu_has_no_such_note() -> None:
    """It is the plan that it was."""
    assert beside_one(planned(SHORT), model(), T4) is planned(SHORT)


def timed(plan: Plan, seconds: float, usd: float | None) -> Plan:
    """*plan*, ending after *seconds* for *usd*."""
    made = replace(plan, wall=replace(plan.wall, training_seconds=seconds))
    made = replace(made, wall=replace(made.wall, training_seconds=2 * seconds - made.wall.total_seconds))
    offers = () if usd is None else (replace(plan.offers[0], on_demand_usd=usd),)
    return replace(made, offers=offers)


@pytest.mark.parametrize(
    ("one", "several", "said"),
    [
        ((7200.0, 1.0), (3600.0, 3.0), "would take 2.0 h and $1.00, these 2 take 60 min and $3.00: 2.0 times as fast "
         "for 3.00 times the dollars."),
        ((7200.0, None), (3600.0, None), "would take 2.0 h, these 2 take 60 min: 2.0 times as fast."),
        ((3600.0, 1.0), (3590.0, 3.0), "would take 60 min and $1.00, these 2 take 60 min and $3.00."),
        ((3600.0, 1.0), (7200.0, 8.0), "would take 60 min and $1.00, these 2 take 2.0 h and $8.00."),
    ],
)  # fmt: skip
def test_it_is_said_whether_they_pay(
    one: tuple[float, float | None], several: tuple[float, float | None], said: str
) -> None:
    """By hours first: more GPUs are asked for to be done sooner."""
    pays = several[0] < 0.95 * one[0]

    told = paying.note(timed(planned(TWO), *several), timed(planned(SHORT), *one))

    assert told == f"{'' if pays else '2 GPUs do not pay here. '}One GPU {said}"


def test_a_gpu_too_small_is_said_to_be() -> None:
    """Where nothing fits on one, and where its weights alone say so, nothing is compared."""
    least = planned(replace(TWO, quantization="fp16"))

    told = beside_one(least, model(), with_budget(2**21))

    assert told.notes[-1].startswith("Nothing that was asked for fits on one GPU.")
    assert paying.is_too_large(70_000_000_000, Workload(), load_gpu("t4"))
    assert not paying.is_too_large(8_000_000_000, Workload(), load_gpu("t4"))
    assert paying.is_too_large(8_000_000_000, Workload(quantization="fp16"), load_gpu("t4"))


@pytest.mark.parametrize(("name", "said"), [("g4dn.12xlarge", "4 GPUs, which are all paid, 2 are idle."), ("g", None)])
def test_gpus_that_are_paid_and_idle_are_said(name: str, said: str | None) -> None:
    """Of the instance that the dollars are for."""
    plan = planned(TWO)
    priced = replace(plan, offers=(replace(plan.offers[0], instance=name),))

    for one in (planned(SHORT), None):
        note = paying.note(priced, one, load_instances("t4"))
        assert said is None or note.endswith(f" Of {name}'s {said}")
        assert ("idle" in note) == (said is not None)
