"""Whether a plan is what it says: its proof, and what the proof must speak of."""

from __future__ import annotations

import math

from shallowflow.profiles import model_facts
from shallowflow.profiles.specs import GpuSpec

from . import allowed, problem, proof, quality
from .plan import Plan

PARTIAL = ("recompute attention", "recompute mlp")
"""Policies that some models' code does not allow, so that a proof need not speak of them."""


def doubts(plan: Plan, gpu: GpuSpec) -> list[str]:
    """What is wrong with *plan* as the best for its workload on *gpu*; nothing if its proof holds.

    What the proof takes for given is not looked into: the tables of what each strategy takes, and the bytes of the
    whole step, which come from traces; a run traces its step again.
    """
    found: list[str] = []
    divisible = not model_facts.changes_logits(plan.model_config)
    expected = allowed.cells(plan.workload, gpu, plan.configuration.rank, divisible_loss=divisible)
    spoken = set(plan.proof.strategies)
    missing = [s for s in allowed.strategies(plan.workload, gpu) if s not in spoken and s.activations not in PARTIAL]
    if missing:
        found.append(f"the proof does not speak of {missing[0]}")
    budget = allowed.budget_bytes(gpu, plan.workload)
    if plan.proof.budget_bytes != budget or plan.budget_bytes != budget:
        found.append(f"the memory to spend is {budget} bytes, the proof speaks of {plan.proof.budget_bytes}")
    if plan.prediction.peak_reserved_bytes > budget:
        found.append(f"the plan reserves {plan.prediction.peak_reserved_bytes} bytes of {budget}")
    found += _weights(plan)
    found += proof.verify(plan.proof, plan.configuration, expected)
    return found or _seconds(plan)


def _weights(plan: Plan) -> list[str]:
    """Whether the plan's weight error and the proof's harms are those of the weights."""
    own = plan.weighed.layers if plan.weighed else ()
    harms = tuple(tuple(quality.harm(strategy, layer) for strategy in plan.proof.strategies) for layer in own)
    found = [] if plan.proof.harms == harms else ["the proof counts other weight errors than the plan says"]
    error = quality.mean_error(plan.configuration.strategies(), own)
    if not math.isclose(plan.weight_error, error, rel_tol=1e-6, abs_tol=1e-9):
        found.append(f"the weight error is said to be {plan.weight_error:g}, and is {error:g}")
    return found


def _seconds(plan: Plan) -> list[str]:
    """Whether the step takes what the proof's tables say."""
    _, weighed = proof.weigh(plan.proof, plan.configuration)
    seconds, said = weighed.step_picoseconds / problem.SECOND, plan.prediction
    tokens = plan.configuration.global_batch_size * plan.configuration.sequence_length
    found = []
    if not math.isclose(said.step_seconds, seconds, rel_tol=1e-6, abs_tol=1e-6):
        found.append(f"a step is said to take {said.step_seconds:g} s, the proof's tables give {seconds:g} s")
    if not math.isclose(said.tokens_per_second * said.step_seconds, tokens, rel_tol=1e-6):
        found.append(f"{said.tokens_per_second:g} tokens a second are not {tokens} in {said.step_seconds:g} s")
    return found
