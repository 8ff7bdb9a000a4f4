"""Everything that a run checks before it trains, and what it would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.planner.wall_time import SAVE_SECONDS

from .attempts import promised
from .promise import Promise
from .request import RunError, RunRequest, device_of
from .run import prepared
from .watch import Silent
from .weights import check_config
from .work import Work


class _Telling(Silent):
    """Passes the stages on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def stage(self, message: str, total: int | None = None) -> None:
        """Tell of a stage."""
        self.tell(message)


def rehearse(plan: Plan, request: RunRequest, tell: Callable[[str], None] = lambda _message: None) -> list[str]:
    """Check data, weights' configuration, output folder and the traced step, and say in lines what a run would do.

    Nothing is written and no weights are read. A device that this machine lacks is said, not refused.

    Raises:
        RunError, DataError, WeightsError: as the run would.
    """
    watcher = _Telling(tell)
    try:
        device, missing = device_of(plan), []
    except RunError as error:
        device, missing = torch.device("cpu"), [f"not here: {error}"]
    work = prepared(plan, request, watcher, device)
    check_config(work.source, plan.model_config)
    every = [promised(plan, None, watcher, stage) for stage in range(plan.configuration.num_stages)]
    kept = min(every, key=lambda each: each.evaluation_micro_batch_size)
    notes = dict.fromkeys(note for each in every for note in each.notes)
    return [*_lines(work, replace(kept, notes=tuple(notes))), *notes, *missing]


def _lines(work: Work, kept: Promise) -> list[str]:
    plan, request, prediction = work.plan, work.request, kept.candidate.prediction
    targets = sum(window.num_targets for window in work.windows)
    seconds = work.total * plan.mean_step_seconds
    price = "" if request.usd_per_hour is None else f", ${seconds / 3600 * request.usd_per_hour:,.2f}"
    longer = " or more" if plan.configuration.is_full else ""  # where writing them takes a minute
    saves = f"{request.save_every} steps" if request.save_every else f"{words.duration(SAVE_SECONDS)}{longer}"
    places = [str(request.output), *([request.store] if request.store else [])]
    found = [
        f"{plan.model_name} on {plan.gpu}: {words.summary(plan.configuration)}",
        "the step, traced: as planned, to the byte" if not kept.notes else "the step, traced: fits",
        f"memory: {words.gib(prediction.peak_process_bytes)} of {words.gib(plan.memory_bytes)}",
        f"data: {words.counted(len(work.windows), 'sequence')}, {targets:,} tokens to learn",
        f"training: {words.counted(work.total, 'step')} of {plan.configuration.global_batch_size} sequences, "
        f"{words.duration(seconds)}{price}",
        f"checkpoints: every {saves}, in {' and '.join(places)}",
    ]
    if work.eval_windows:
        every = f"every {words.counted(request.eval_every, 'step')} and " if request.eval_every else ""
        stop = f", stopping after {request.patience} without improvement" if request.patience else ""
        found.append(
            f"evaluation: {words.counted(len(work.eval_windows), 'sequence')}, {every}before and after training, "
            f"{kept.evaluation_micro_batch_size} at a time in {words.gib(kept.evaluation_peak_bytes)}{stop}"
        )
    if work.prompts:
        found.append(f"samples: {words.counted(len(work.prompts), 'prompt')}, before and after training")
    return found
