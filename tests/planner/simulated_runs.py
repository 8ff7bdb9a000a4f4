"""A run on instances that are interrupted, lived through second by second of its events: nothing of the formulas."""

from __future__ import annotations

import random
from dataclasses import dataclass

from shallowflow.planner.spot import Job


@dataclass(frozen=True, slots=True)
class Lived:
    """What one run came to."""

    seconds: float
    billed_seconds: float
    instance_seconds: float
    interruptions: int


@dataclass(slots=True)
class Instance:
    """One instance's life: when training reaches which step, and when which checkpoint is safe."""

    job: Job
    interval_steps: int
    begins_with: float
    notice_at: float
    clock: float
    seen_at_notice: float
    uploads: list[tuple[float, float]]

    def train(self, until: float) -> bool:
        """Train to the end or to *until*; whether the end was reached."""
        at = self.begins_with
        while self.clock <= until:
            stop = min(at + self.interval_steps, self.job.num_steps)
            lasted = (stop - at) * self.job.step_seconds
            if self.clock < self.notice_at:
                self.seen_at_notice = at + min(self.notice_at - self.clock, lasted) / self.job.step_seconds
            at = stop
            self.clock += lasted
            if at >= self.job.num_steps:
                self.clock += self.job.last_seconds
                return self.clock <= until
            self.clock += self.job.checkpoint_seconds
            self.uploads.append((self.clock + self.job.upload_seconds, at))
        return False


def lived(job: Job, interval_steps: int, chance: random.Random) -> Lived:
    """One run: it draws when it is interrupted, writes checkpoints, loses work, starts again, and is billed."""
    done = wall = billed = live = 0.0
    stops = 0
    while True:
        end = chance.expovariate(job.interruptions_per_second)
        has_notice = chance.random() < job.noticed_share
        setup = job.first_seconds if done == 0 else job.again_seconds
        instance = Instance(job, interval_steps, done, end - 120, setup, done, [])
        if instance.train(end):
            return Lived(wall + instance.clock, billed + instance.clock, live + instance.clock, stops)
        stops += 1
        wall += end + job.waiting_seconds
        live += end
        billed += end if end >= 3600 else end * (job.num_machines - 1) / job.num_machines
        done = max([done, *(number for at, number in instance.uploads if at <= end)])
        if has_notice and job.checkpoint_seconds + job.upload_seconds <= 120:
            done = max(done, instance.seen_at_notice)


def lived_runs(job: Job, interval_steps: int, number: int, seed: int = 0) -> list[Lived]:
    """So many runs, the same for the same *seed*."""
    chance = random.Random(seed)
    return [lived(job, interval_steps, chance) for _ in range(number)]
