"""Whether several GPUs pay: what they give beside one, in hours and dollars."""

from __future__ import annotations

from collections.abc import Sequence

from shallowflow.profiles.specs import GpuSpec, InstanceSpec

from . import allowed, words
from .plan import Plan, Workload

LEAST_GAIN = 0.05
"""The share of one GPU's hours that several must save; with less they are said not to pay."""


def is_too_large(num_parameters: int, workload: Workload, gpu: GpuSpec) -> bool:
    """Whether one GPU cannot even hold the weights in the smallest format that is allowed."""
    bytes_per_weight = min(allowed.BYTES_PER_WEIGHT[s.weight_format] for s in allowed.strategies(workload, gpu))
    return num_parameters * bytes_per_weight > allowed.budget_bytes(gpu, workload)


def note(several: Plan, one: Plan | None, instances: Sequence[InstanceSpec] = ()) -> str:
    """What *several* GPUs give beside *one*, which is None where nothing fits on it, and which are paid and idle."""
    if one is None:
        return f"Nothing that was asked for fits on one GPU.{_idle(several, instances)}"
    return f"{_compared(several, one)}{_idle(several, instances)}"


def _idle(plan: Plan, instances: Sequence[InstanceSpec]) -> str:
    """Of the cheapest of *instances* that the plan was priced on, GPUs that are left over."""
    used = plan.workload.gpus_per_machine
    cheapest = next((one for one in instances if plan.offers and one.name == plan.offers[0].instance), None)
    if cheapest is None or cheapest.num_gpus == used:
        return ""
    return f" Of {cheapest.name}'s {cheapest.num_gpus} GPUs, which are all paid, {cheapest.num_gpus - used} are idle."


def _compared(several: Plan, one: Plan) -> str:
    number = several.workload.num_gpus
    told = f"One GPU would take {_spent(one)}, these {number} take {_spent(several)}"
    gain = one.wall.total_seconds / several.wall.total_seconds
    if gain < 1 / (1 - LEAST_GAIN):
        return f"{number} GPUs do not pay here. {told}."
    if not (one.offers and several.offers):
        return f"{told}: {gain:.1f} times as fast."
    ratio = several.offers[0].on_demand_usd / one.offers[0].on_demand_usd
    return f"{told}: {gain:.1f} times as fast for {ratio:.2f} times the dollars."


def _spent(plan: Plan) -> str:
    """Its time, and its dollars where a price is known."""
    time = words.duration(plan.wall.total_seconds)
    return f"{time} and {words.usd(plan.offers[0].on_demand_usd)}" if plan.offers else time
