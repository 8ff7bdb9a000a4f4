"""A run on instances that may be interrupted: how long it is expected to take, and what part of that is billed.

An instance is interrupted as likely at any moment as at any other (a Poisson process), the work since the last
checkpoint that is safe is lost, and a replacement starts over from there. What a run comes to is worked out backwards
from its end: what is left to do from a checkpoint on is a sum over where the next interruption finds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sessions import NOTICE_SECONDS, Sessions

NINE_OF_TEN = 0.9
MOST_TRIED = 50_000
"""Intervals, and numbers of parts, that are all looked at."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, in seconds of an instance, or of all that work together.

    Attributes:
        num_steps, step_seconds: of training.
        first_seconds: from an instance's start to the first step.
        again_seconds: from a replacement's start to the step it goes on with.
        last_seconds: after the last step.
        checkpoint_seconds: for which a checkpoint holds training up.
        upload_seconds: for which it is not safe yet, while training goes on.
        waiting_seconds: from an interruption to the replacement's start, billed to nobody.
        interruptions_per_second: while an instance runs, of any of them.
        noticed_share: of the interruptions, those whose notice comes in time for a checkpoint.
        num_machines: that work together and are all replaced when one is interrupted; only that one's first hour is
            free.
    """

    num_steps: int
    step_seconds: float
    first_seconds: float
    again_seconds: float
    last_seconds: float
    checkpoint_seconds: float
    upload_seconds: float
    waiting_seconds: float
    interruptions_per_second: float
    noticed_share: float = 0.0
    num_machines: int = 1

    @property
    def saved_by_notice(self) -> float:
        """The share of interruptions before which a checkpoint is saved: none where two minutes are too short."""
        in_time = self.checkpoint_seconds + self.upload_seconds <= NOTICE_SECONDS
        return self.noticed_share if in_time else 0.0

    @property
    def undisturbed_seconds(self) -> float:
        """All of it, if nothing interrupts and no checkpoint is written on the way."""
        return self.first_seconds + self.num_steps * self.step_seconds + self.last_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a run comes to.

    Attributes:
        interval_steps: between two checkpoints; None where none is worth its time.
        seconds, instance_seconds, billed_seconds: expected, on the wall, of all instances, and of those billed.
        nine_of_ten_seconds, nine_of_ten_billed_seconds: that nine of ten runs do not exceed.
        interruptions: expected.
    """

    interval_steps: int | None
    seconds: float
    instance_seconds: float
    billed_seconds: float
    nine_of_ten_seconds: float
    nine_of_ten_billed_seconds: float
    interruptions: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Expected seconds on the wall, of all instances, and of those billed, and expected interruptions."""

    seconds: float
    instance_seconds: float
    billed_seconds: float
    interruptions: float


def means(job: Job, interval_steps: int) -> Means:
    """What *job* is expected to come to with a checkpoint every *interval_steps*."""
    steps = min(interval_steps, job.num_steps)
    if job.interruptions_per_second == 0:
        alone = _alone_seconds(job, steps)
        return Means(seconds=alone, instance_seconds=alone, billed_seconds=alone, interruptions=0.0)
    wall, billed, live, interruptions = Sessions(job, steps).means()
    return Means(seconds=wall, instance_seconds=live, billed_seconds=billed, interruptions=interruptions)


def expectation(job: Job, interval_steps: int | None = None) -> Expectation:
    """What *job* comes to with a checkpoint every *interval_steps*, or as often as is best."""
    steps = best_interval(job) if interval_steps is None else min(interval_steps, job.num_steps)
    found = means(job, steps)
    if job.interruptions_per_second == 0:
        most_wall = most_billed = found.seconds
    else:
        most_wall, most_billed = Sessions(job, steps).quantiles(NINE_OF_TEN)
    return Expectation(
        interval_steps=None if steps >= job.num_steps else steps,
        seconds=found.seconds,
        instance_seconds=found.instance_seconds,
        billed_seconds=found.billed_seconds,
        nine_of_ten_seconds=most_wall,
        nine_of_ten_billed_seconds=most_billed,
        interruptions=found.interruptions,
    )


def _alone_seconds(job: Job, interval_steps: int) -> float:
    saves = -(-job.num_steps // interval_steps) - 1
    return job.undisturbed_seconds + saves * job.checkpoint_seconds


def best_interval(job: Job) -> int:
    """The steps between checkpoints under which a run is expected to end the soonest, of all numbers of them.

    Uploads must keep up: no checkpoint is begun before the last one is safe. That a checkpoint is not safe until it is
    uploaded costs as much at any interval and is left out of the choice, and so are interruptions that a checkpoint
    precedes, which lose as little at any.
    """
    every = _intervals(job.num_steps)
    seconds = expected_seconds(job, every)
    if job.upload_seconds > job.checkpoint_seconds:
        least = math.ceil((job.upload_seconds - job.checkpoint_seconds) / max(job.step_seconds, 1e-9))
        seconds[every < min(least, job.num_steps)] = math.inf
    return int(every[int(np.argmin(seconds))])


def _intervals(num_steps: int) -> npt.NDArray[np.int64]:
    """All numbers of steps; of very many, those that part them evenly, because no uneven parting is better."""
    small = np.arange(1, min(num_steps, MOST_TRIED) + 1)
    return small if num_steps <= MOST_TRIED else np.union1d(small, -(-num_steps // small))


def young_seconds(job: Job) -> float:
    """The best training between checkpoints to the first order: sqrt(2 C M) (Young, 1974)."""
    return math.sqrt(2 * job.checkpoint_seconds / job.interruptions_per_second)


def daly_seconds(job: Job) -> float:
    """The best training between checkpoints to a higher order, up to the next one's start (Daly, 2006)."""
    between, saving = 1 / job.interruptions_per_second, job.checkpoint_seconds
    if saving >= 2 * between:
        return between
    share = math.sqrt(saving / (2 * between))
    return young_seconds(job) * (1 + share / 3 + share**2 / 9) - saving


def expected_seconds(job: Job, interval_steps: npt.NDArray[np.int64]) -> Floats:
    """On the wall, for each interval, uploads and notices left out: Daly's total with a last part of its own length.

    A part of s seconds that starts over when it is interrupted, after a wait D and a restart of R seconds that may be
    interrupted as well, takes (exp(s / M) - 1) exp(R / M) (M + D) with M seconds between interruptions (Daly, A higher
    order estimate of the optimum checkpoint interval for restart dumps, 2006, for D = 0). The first part begins with
    the first instance's own set-up, each time.
    """
    rate = job.interruptions_per_second * (1 - job.saved_by_notice)
    parts = -(-job.num_steps // interval_steps)
    whole = interval_steps * job.step_seconds + job.checkpoint_seconds
    rest = (job.num_steps - (parts - 1) * interval_steps) * job.step_seconds + job.last_seconds
    if rate == 0:
        undisturbed: Floats = (parts - 1) * whole + rest + job.first_seconds
        return undisturbed
    several = parts > 1
    with np.errstate(over="ignore", invalid="ignore"):
        first = np.expm1(rate * (job.first_seconds + np.where(several, whole, rest)))
        later = np.maximum(parts - 2, 0) * np.expm1(rate * whole) + several * np.expm1(rate * rest)
        found: Floats = (1 / rate + job.waiting_seconds) * (first + later * np.exp(rate * job.again_seconds))
    found[np.isnan(found)] = math.inf
    return found
