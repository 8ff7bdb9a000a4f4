"""The training loop: one record per optimizer update."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from .batches import Group, micro_batch
from .meter import MeasuredPeak, Stopwatch, measure_peak
from .record import StepRecord
from .step import StepOutcome, Trainee

MEASURED_STEP = 1
"""The step whose memory is measured: the second, when the optimizer's state exists, or the first after resuming.

A step whose micro-batches are trimmed is not the planned one, and is not measured.

Its time does not count.
"""


def train(
    trainee: Trainee,
    steps: Iterable[Sequence[Group]],
    device: torch.device,
    *,
    on_peak: Callable[[MeasuredPeak], None],
    usd_per_hour: float | None = None,
    seed: int = 0,
    first: int = 0,
) -> Iterator[StepRecord]:
    """Run one optimizer update per item of *steps*, yielding what happened; *on_peak* hears the measured memory.

    Numbers start at *first*. What a micro-batch draws at random depends on *seed*, its step and its number in it, and
    not on the process that runs it.
    """
    for index, chosen in enumerate(steps, start=first):
        watch = Stopwatch(device)
        batches = [
            replace(micro_batch(group.windows, device, group.length), seed=_mixed(seed, index, number))
            for number, group in trainee.ranks.share(list(enumerate(chosen)))
        ]
        num_targets = sum(window.num_targets for group in chosen for window in group.windows)
        measured = index == max(MEASURED_STEP, first) and all(group.is_whole for group in chosen)
        if measured:
            tokens = [tensor for batch in batches for tensor in batch.tensors()]
            run = functools.partial(trainee.step, batches, num_targets)
            outcome, peak = measure_peak(run, [*trainee.resident(), *tokens], device)
            on_peak(peak)
        else:
            outcome = trainee.step(batches, num_targets)
        yield _record(index, outcome, trainee, num_targets, watch.seconds(), usd_per_hour, measured)


def _mixed(*numbers: int) -> int:
    """A seed for these *numbers*, which others do not share."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def _record(
    index: int,
    outcome: StepOutcome,
    trainee: Trainee,
    num_targets: int,
    seconds: float,
    usd_per_hour: float | None,
    measured: bool,
) -> StepRecord:
    return StepRecord(
        index=index,
        loss=outcome.loss,
        gradient_norm=outcome.gradient_norm,
        loss_scale=trainee.loss_scale.value,
        skipped=outcome.skipped,
        num_target_tokens=num_targets,
        seconds=seconds,
        usd=None if usd_per_hour is None else seconds / 3600 * usd_per_hour,
        memory_measured=measured,
    )
