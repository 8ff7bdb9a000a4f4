"""Whether a plan is what it says: its proof, and what the proof must speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shallowflow.profiles import model_facts
from shallowflow.profiles.specs import GpuSpec, InstanceSpec

from . import allowed, money, problem, proof, proof_check, quality, staged_proof, wall_time
from .plan import Plan
from .strategies import PARTIAL

ROUNDED = 1e-9
"""What seconds may lose, as a share, where they are summed in another order."""


def doubts(plan: Plan, gpu: GpuSpec, instances: Sequence[InstanceSpec]) -> list[str]:
    """What is wrong with *plan* as the best for its workload on *gpu*, which *instances* have; nothing if it holds.

    What the proof takes for given is not looked into: the tables of what each strategy takes, and the bytes of the
    whole step, which come from traces; a run traces its step again.
    """
    found: list[str] = []
    divisible = not model_facts.changes_logits(plan.model_config)
    stages, parts = plan.configuration.num_stages, plan.configuration.parts_per_stage
    expected = allowed.cells(
        plan.workload,
        gpu,
        plan.configuration.rank,
        divisible_loss=divisible,
        num_stages=stages,
        num_parts=parts,
    )
    spoken, able = set(plan.proof.strategies), allowed.strategies(plan.workload, gpu)
    missing = [s for s in able if s not in spoken and s.activations not in PARTIAL]  # as some models' code refuses
    if missing:
        found.append(f"the proof does not speak of {missing[0]}")
    budget = allowed.budget_bytes(gpu, plan.workload)
    if plan.proof.budget_bytes != budget or plan.budget_bytes != budget:
        found.append(f"the memory to spend is {budget} bytes, the proof speaks of {plan.proof.budget_bytes}")
    if plan.prediction.peak_reserved_bytes > budget:
        found.append(f"the plan reserves {plan.prediction.peak_reserved_bytes} bytes of {budget}")
    found += [f"the workload does not allow {s}" for s in set(plan.configuration.strategies()) - set(able)]
    found += _decisions(plan)
    found += _limits(plan, gpu, instances)
    found += _weights(plan)
    if stages == 1:
        found += proof_check.verify(plan.proof, plan.configuration, expected)
    else:
        found += staged_proof.doubts(plan.proof, plan.configuration, expected, plan.workload.objective)
    return found or _seconds(plan)


def _decisions(plan: Plan) -> list[str]:
    """What is decided for all layers as the workload does not have it."""
    work, chosen = plan.workload, plan.configuration
    rank = work.rank if work.rank is not None or chosen.rank is None else max(work.min_rank, chosen.rank)
    asked: list[tuple[str, object, object]] = [
        ("adapter", work.adapter, chosen.adapter),
        ("target_modules", None if work.adapter == "full" else work.target_modules, chosen.target_modules),
        ("alpha", allowed.ALPHA[work.adapter], chosen.alpha),
        ("rank", rank, chosen.rank),
        ("num_gpus", work.num_gpus, chosen.num_gpus),
        ("sharding", chosen.sharding if work.sharding is None else work.sharding, chosen.sharding),
        ("packing", chosen.packing if work.packing is None else work.packing, chosen.packing),
        ("num_stages", chosen.num_stages if work.num_stages is None else work.num_stages, chosen.num_stages),
        ("parts_per_stage", work.parts_per_stage or chosen.parts_per_stage, chosen.parts_per_stage),
    ]
    return [f"{name} is {found}, the workload's is {wanted}" for name, wanted, found in asked if found != wanted]


def _limits(plan: Plan, gpu: GpuSpec, instances: Sequence[InstanceSpec]) -> list[str]:
    """Limits of the proof that are not the workload's."""
    harm = quality.most_harm(plan.workload.max_weight_error, plan.configuration.num_layers)
    if plan.configuration.num_stages > 1 and plan.weighed:
        harm = None  # measured errors keep the limit, of which the tables know nothing
    host = allowed.host_bytes(instances, plan.workload.gpus_per_machine)
    found = [
        f"the limit of {name} is {'none' if wanted is None else wanted}, the proof speaks of {said}"
        for name, wanted, said in (("harm", harm, plan.proof.harm), ("host memory", host, plan.proof.host_bytes))
        if said != wanted
    ]
    if not quality.is_within(plan.weight_error, plan.workload.max_weight_error):
        found.append(f"the weight error is {plan.weight_error:g}, and may be {plan.workload.max_weight_error:g}")
    return found + _time_limit(plan, gpu, instances)


def _time_limit(plan: Plan, gpu: GpuSpec, instances: Sequence[InstanceSpec]) -> list[str]:
    """Whether a step may take as long as the proof says, and the run ends in time.

    What a run takes beside its steps depends on what is chosen, so a proof's limit may be lower than is seen here.
    """
    work, said = plan.workload, plan.proof.step_picoseconds
    hours = [] if work.deadline_hours is None else [work.deadline_hours]
    if work.budget_usd is not None:
        paid = money.hours_for(work.budget_usd, instances, work)
        if paid is None:
            return [f"no instance in {work.region} has a price, and the run may cost {work.budget_usd:g} USD"]
        hours.append(paid)
    if not hours:
        return [] if said is None else [f"a step may take {said} picoseconds, and the workload has no deadline"]
    beside = wall_time.least_beside_seconds(plan.num_parameters, work.total_tokens, gpu.pcie_bytes_per_second)
    most = max(0.0, (min(hours) * 3600 - beside) / plan.num_steps) * problem.SECOND
    found: list[str] = []
    if said is None or said > most * (1 + ROUNDED):
        found.append(f"a step may take {most:.0f} picoseconds, the proof speaks of {said}")
    if plan.wall.total_seconds > min(hours) * 3600 * (1 + ROUNDED):
        found.append(f"the run takes {plan.wall.total_seconds / 3600:g} hours of {min(hours):g}")
    return found


def _weights(plan: Plan) -> list[str]:
    """Whether the plan's weight error and the proof's harms are those of the weights."""
    own = plan.weighed.layers if plan.weighed else ()
    counted = own if plan.configuration.num_stages == 1 else ()  # where a model is cut, all layers count alike
    harms = tuple(tuple(quality.harm(strategy, layer) for strategy in plan.proof.strategies) for layer in counted)
    found = [] if plan.proof.harms == harms else ["the proof counts other weight errors than the plan says"]
    error = quality.mean_error(plan.configuration.strategies(), own)
    if not math.isclose(plan.weight_error, error, rel_tol=1e-6, abs_tol=1e-9):
        found.append(f"the weight error is said to be {plan.weight_error:g}, and is {error:g}")
    return found


def _seconds(plan: Plan) -> list[str]:
    """Whether the step takes what the proof's tables say."""
    said = plan.prediction
    if plan.configuration.num_stages == 1:
        picoseconds = proof.weigh(plan.proof, plan.configuration)[1].step_picoseconds
    else:
        picoseconds = staged_proof.reckoned(plan.proof, plan.configuration).step_picoseconds
    seconds = picoseconds / problem.SECOND
    tokens = plan.configuration.global_batch_size * plan.configuration.sequence_length
    found = []
    if not math.isclose(said.step_seconds, seconds, rel_tol=1e-6, abs_tol=1e-6):
        found.append(f"a step is said to take {said.step_seconds:g} s, the proof's tables give {seconds:g} s")
    if not math.isclose(said.tokens_per_second * said.step_seconds, tokens, rel_tol=1e-6):
        found.append(f"{said.tokens_per_second:g} tokens a second are not {tokens} in {said.step_seconds:g} s")
    return found
