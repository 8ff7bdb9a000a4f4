"""The record of a run that has ended, one way or another."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch

from shallowflow.planner.plan import Plan, Prediction
from shallowflow.planner.profiler import cache

from . import compare
from .progress import Progress
from .promise import Promise
from .record import RUN_FORMAT_VERSION, RunRecord, SampleRecord
from .request import RunRequest
from .work import Work


def record_of(work: Work, progress: Progress, kept: Promise) -> RunRecord:
    """What the run of *work* has come to, the last part of it as *kept*."""
    plan, request = work.plan, work.request
    prediction = _of_the_mean_step(plan, kept.candidate.prediction)
    seconds = progress.seconds()
    positions = len(work.windows) * plan.configuration.sequence_length
    padding_share = 1 - sum(len(window.input_ids) for window in work.windows) / positions
    under = progress.steps[progress.began_at :]
    before = [e.perplexity for e in progress.evaluations if e.step == 0]
    result = len(progress.steps) if request.patience is None else progress.best_step
    after = [e.perplexity for e in progress.evaluations if e.step == result]
    left = max(0, work.total - len(progress.steps))
    ended = progress.outcome in ("completed", "stopped early")
    return RunRecord(
        format_version=RUN_FORMAT_VERSION,
        model_name=plan.model_name,
        device=_device_name(plan),
        outcome=progress.outcome,
        started=progress.started,
        seconds=seconds,
        usd=_usd(work, progress, seconds),
        budget_usd=request.budget_usd,
        projected_usd=None if work.guard.spend is None or ended else work.guard.projected_usd(left),
        interruptions=progress.interruptions + (progress.outcome == "interrupted"),
        peaks=tuple(progress.peaks),
        comparisons=compare.comparisons(prediction, progress.peak, under, on_cpu=plan.gpu == "cpu"),
        perplexity_before=before[0] if before else None,
        perplexity_after=after[0] if after and ended else None,
        padding_share=padding_share,
        num_skipped=sum(step.skipped for step in progress.steps),
        steps=tuple(progress.steps),
        versions=cache.versions(),
        notes=(
            *progress.notes,
            *compare.skipped_notes(progress.steps),
            *([progress.failure] if progress.failure else []),
        ),
        causes=tuple(
            compare.causes(plan, prediction, progress.peak, under, progress.evaluations, seconds, padding_share)
        ),
        evaluations=tuple(progress.evaluations),
        samples=_samples(request, progress),
        fallbacks=tuple(progress.fallbacks),
        dequantizing=progress.dequantizing,
        configuration=kept.candidate.configuration,
        evaluation_micro_batch_size=kept.evaluation_micro_batch_size if work.eval_windows else None,
        evaluation_peak_bytes=kept.evaluation_peak_bytes if work.eval_windows else None,
        best_step=progress.best_step if request.patience is not None and ended else None,
    )


def _usd(work: Work, progress: Progress, seconds: float) -> float | None:
    """Of a run that has lasted *seconds* on the wall; sessions that left no checkpoint behind are paid all the same."""
    spend = work.guard.spend
    return None if spend is None else spend.usd(seconds - progress.earlier_seconds)


def _of_the_mean_step(plan: Plan, prediction: Prediction) -> Prediction:
    """*prediction* for steps whose micro-batches are trimmed as much as the plan counts on."""
    share = plan.mean_step_seconds / plan.prediction.step_seconds
    return replace(prediction, step_seconds=prediction.step_seconds * share)


def _samples(request: RunRequest, progress: Progress) -> tuple[SampleRecord, ...]:
    found = []
    for index, prompt in enumerate(request.samples):
        before, after = (given[index] if index < len(given) else None for given in (progress.before, progress.after))
        found.append(SampleRecord(prompt=prompt, before=before, after=after))
    return tuple(found)


def _device_name(plan: Plan) -> str:
    if plan.gpu != "cpu":
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
