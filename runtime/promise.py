"""That a run is exactly its plan: the built step, traced on ``meta`` before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.plan import Candidate, Plan, Prediction, StageMemory
from shallowflow.planner.profiler import cache
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.simulate import traced_peak
from shallowflow.planner.strategies import Configuration
from shallowflow.profiles import load_gpu

from .request import RunError
from .simulated import make_stage_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What was seen of a step before it is run.

    Attributes:
        evaluation_micro_batch_size: the most sequences up to a micro-batch whose evaluation fits.
        evaluation_peak_bytes: the most that an evaluation of so many has allocated.
        notes: how far the prediction has moved, where other versions trace another step.
    """

    candidate: Candidate
    evaluation_micro_batch_size: int
    evaluation_peak_bytes: int
    notes: tuple[str, ...] = ()


def kept(plan: Plan, candidate: Candidate, rank: int = 0) -> Promise:
    """Trace the step of *candidate*, which *plan* holds, and compare it with what was predicted, byte by byte.

    Where the model is cut, that is the step of the stage that the process *rank* has.

    Raises:
        RunError: they differ though the versions are the plan's, or the step no longer fits the plan's budget.
    """
    stage = rank % candidate.configuration.num_stages
    traced = trace(plan, candidate.configuration, stage=stage)
    told = candidate.prediction.stages
    moved = differences(told[stage] if told else candidate.prediction, traced)
    changed = changed_versions(plan.versions, cache.versions())
    if moved and not changed:
        raise RunError(
            f"the step built from the plan is not the predicted one: {moved[0]}, with the versions it was made "
            "with; the plan file was altered, or this program was: plan again"
        )
    notes = (f"with {', '.join(changed)} the prediction has moved: {'; '.join(moved)}",) if moved else ()
    size = candidate.configuration.micro_batch_size
    if traced.peak_reserved_bytes > plan.budget_bytes:
        alone = _smaller_evaluation(plan, candidate.configuration, traced, stage)
        if alone is None:
            raise RunError(
                f"with {', '.join(changed) or 'this budget'} the plan's step reserves {traced.peak_reserved_bytes:,} "
                f"bytes of {plan.budget_bytes:,}; plan again"
            )
        size, traced = alone
        notes = (*notes, f"evaluations run {size} sequences at a time: more do not fit")
    return Promise(
        candidate=candidate,
        evaluation_micro_batch_size=size,
        evaluation_peak_bytes=traced.evaluation_allocated_bytes,
        notes=notes,
    )


def trace(
    plan: Plan, configuration: Configuration, evaluation_micro_batch_size: int | None = None, stage: int = 0
) -> TracedPeak:
    """The step of *configuration* and an evaluation after it on ``meta``; nothing is read from a cache."""
    gpu = load_gpu(plan.gpu)
    step = make_stage_step(plan.model_config, configuration, plan.compute_dtype, stage)
    step.evaluation_micro_batch_size = evaluation_micro_batch_size
    return traced_peak(step, Target.of(gpu), gpu.context_bytes)


def differences(prediction: Prediction | StageMemory, traced: TracedPeak) -> list[str]:
    """Where *traced* is not what was predicted."""
    pairs = {
        "resident between steps": (prediction.resident_bytes, traced.resident_bytes),
        "peak allocated": (prediction.peak_allocated_bytes, traced.peak_allocated_bytes),
        "peak reserved": (prediction.peak_reserved_bytes, traced.peak_reserved_bytes),
    }
    return [
        f"{name} {found:,} bytes, {found - expected:+,} from the plan's {expected:,}"
        for name, (expected, found) in pairs.items()
        if found != expected
    ]


def changed_versions(planned: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Each package that is not as *planned*, as ``torch 2.13 (planned with 2.12)``."""
    return [
        f"{name} {number} (planned with {planned.get(name, 'none')})"
        for name, number in here.items()
        if planned.get(name) != number
    ]


def _smaller_evaluation(
    plan: Plan, configuration: Configuration, whole: TracedPeak, stage: int
) -> tuple[int, TracedPeak] | None:
    """The largest half, quarter and so on of a micro-batch that can be evaluated; None where the step is too large."""
    size = configuration.micro_batch_size // 2
    while size and whole.evaluation_allocated_bytes > whole.peak_allocated_bytes:
        found = trace(plan, configuration, size, stage)
        if found.peak_reserved_bytes <= plan.budget_bytes:
            return size, found
        size //= 2
    return None
