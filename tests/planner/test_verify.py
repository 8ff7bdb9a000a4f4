"""A plan's proof must be of the limits and the decisions that its workload has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.proof import CellProof
from shallowflow.planner.strategies import StrategyRun
from shallowflow.planner.verify import doubts
from shallowflow.profiles.load import load_instances
from tests.planner.planned import T4, planned

INSTANCES = load_instances(T4.name)
FREE = Workload(sequence_length=64, global_batch_size=2, total_tokens=100_000, rank=8, num_stages=1)
BOUNDED = replace(FREE, max_weight_error=0.05, deadline_hours=1.0, budget_usd=0.4, packing=False)


def said(plan: Plan) -> list[str]:
    """What is wrong with *plan*."""
    return doubts(plan, T4, INSTANCES)


@pytest.mark.parametrize(
    "work",
    [
        FREE,
        BOUNDED,
        replace(FREE, deadline_hours=1.0, packing=True),
        replace(FREE, rank=None, num_gpus=2, optimizer="adamw8bit", adapter="rslora", budget_usd=1.0),
        replace(FREE, num_gpus=2, sharding="weights"),
    ],
)
def test_a_plan_has_the_limits_of_its_workload(work: Workload) -> None:
    """Whatever is bounded or fixed, the plan's own proof holds."""
    assert said(planned(work)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_weight_error": 0.001},
        {"max_weight_error": None},
        {"deadline_hours": 1e-6},
        {"budget_usd": 1e-6},
        {"deadline_hours": None, "budget_usd": None},
        {"adapter": "dora"},
        {"target_modules": "attention"},
        {"packing": True},
        {"rank": 64},
        {"rank": None, "min_rank": 64},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"optimizer": "adamw8bit"},
        {"optimizer": "adamw"},
        {"quantization": "nf4", "double_quantization": True, "activations": "offload"},
        {"region": "nowhere"},
        {"num_gpus": 2, "global_batch_size": 4},
        {"num_gpus": 2, "global_batch_size": 4, "sharding": "weights"},
    ],
    ids=str,
)
def test_a_proof_for_another_workload_is_caught(change: dict[str, Any]) -> None:
    """A limit or a decision that the workload has, and the plan was not searched with."""
    plan = planned(BOUNDED)

    assert said(replace(plan, workload=replace(plan.workload, **change)))


@pytest.mark.parametrize(
    "change",
    [{"harm": None}, {"harm": 0}, {"host_bytes": None}, {"host_bytes": 1}, {"step_picoseconds": None}],
    ids=str,
)
def test_a_proof_with_other_limits_is_caught(change: dict[str, Any]) -> None:
    """A space that is smaller than the workload's, or a limit that was left out."""
    plan = planned(BOUNDED)

    assert said(replace(plan, proof=replace(plan.proof, **change)))


def test_a_proof_with_a_tighter_deadline_than_none_is_caught() -> None:
    """A limit of a step's time that no deadline set."""
    plan = planned(FREE)

    assert said(replace(plan, proof=replace(plan.proof, step_picoseconds=2**60)))


def test_cells_are_those_of_the_workload_once_each() -> None:
    """Of a cell that is there twice, whoever weighs and whoever bounds might take another; none has more memory."""
    plan = planned(FREE)
    proof = plan.proof
    roomy = tuple(replace(cell, memory_bytes=proof.budget_bytes + 1) for cell in proof.cells)
    strange = replace(proof.cells[0], cell=replace(proof.cells[0].cell, rank=3))

    def fails(cells: tuple[CellProof, ...], unfragmented: tuple[CellProof, ...] = ()) -> list[str]:
        return said(replace(plan, proof=replace(proof, cells=cells, unfragmented=unfragmented)))

    assert "twice" in fails((*proof.cells, proof.cells[0]))[0]
    assert "twice" in fails(proof.cells, 2 * proof.cells[:1])[0]
    assert "not among those" in fails((*proof.cells, strange))[0]
    assert "more than the budget" in fails(roomy)[0]


def test_every_table_has_the_plans_layers() -> None:
    """A cell of fewer layers bounds nothing of the plan's."""
    plan = planned(FREE)
    longer = tuple((*table[:-1], replace(table[-1], num_layers=2)) for table in plan.proof.tables)

    found = said(replace(plan, proof=replace(plan.proof, tables=(plan.proof.tables[0], *longer))))

    assert "a table of its proof another number" in found[0]


def test_a_strategy_that_is_not_allowed_is_caught() -> None:
    """The plan's layers, too, have strategies that the workload allows."""
    plan = planned(FREE)
    chosen = plan.configuration
    strategy = replace(chosen.layers[0].strategy, weight_format="bf16")
    layers = (StrategyRun(first=0, last=chosen.num_layers - 1, strategy=strategy),)

    found = said(replace(plan, configuration=replace(chosen, layers=layers)))

    assert any("the workload does not allow bf16" in doubt for doubt in found)
