"""What interrupted runs come to: against runs that are lived through, closed forms, and the laws of more and less."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner.sessions import Sessions
from shallowflow.planner.spot import (
    Job,
    best_interval,
    daly_seconds,
    expectation,
    expected_seconds,
    means,
    young_seconds,
)
from tests.planner.simulated_runs import lived_runs

HOUR = 3600.0
EIGHT_B = Job(
    num_steps=306,
    step_seconds=71.7,
    first_seconds=700.0,
    again_seconds=720.0,
    last_seconds=30.0,
    checkpoint_seconds=5.0,
    upload_seconds=2.0,
    waiting_seconds=300.0,
    interruptions_per_second=1 / (1.83 * HOUR),
)
"""An 8B model on a T4 under the interruptions of the 2020 trace."""

JOBS = {
    "often interrupted": EIGHT_B,
    "seldom interrupted": replace(EIGHT_B, interruptions_per_second=1 / (24 * HOUR)),
    "half noticed": replace(EIGHT_B, noticed_share=0.5),
    "all noticed": replace(EIGHT_B, noticed_share=1.0),
    "a long evaluation": replace(EIGHT_B, last_seconds=2500.0),
    "slow uploads": replace(EIGHT_B, upload_seconds=70.0, noticed_share=0.7),
    "more checkpoints than states": replace(
        EIGHT_B, num_steps=900, step_seconds=20.0, checkpoint_seconds=0.1, upload_seconds=15.0, last_seconds=500.0
    ),
    "four machines together": replace(EIGHT_B, num_machines=4, interruptions_per_second=1 / (0.9 * HOUR)),
    "sessions within the free hour": replace(EIGHT_B, num_steps=20, interruptions_per_second=1 / 1500),
}

jobs = st.builds(
    Job,
    num_steps=st.integers(1, 300),
    step_seconds=st.floats(1, 200),
    first_seconds=st.floats(10, 2000),
    again_seconds=st.floats(10, 2000),
    last_seconds=st.floats(0, 2000),
    checkpoint_seconds=st.floats(0.01, 60),
    upload_seconds=st.floats(0, 100),
    waiting_seconds=st.floats(0, 3600),
    interruptions_per_second=st.floats(1e-7, 1 / HOUR),
    noticed_share=st.sampled_from([0.0, 0.5, 1.0]),
)
plain = jobs.map(lambda job: replace(job, noticed_share=0.0, upload_seconds=0.0))


@pytest.mark.parametrize("name", JOBS)
def test_ten_thousand_runs_come_to_what_is_expected(name: str) -> None:
    """Means of hours, billed hours and interruptions within 2 %, what nine of ten runs keep within 2 %."""
    job = JOBS[name]
    every = best_interval(job)
    found, runs = expectation(job), lived_runs(job, every, 10_000)

    assert found.seconds == pytest.approx(mean(run.seconds for run in runs), rel=0.02)
    assert found.billed_seconds == pytest.approx(mean(run.billed_seconds for run in runs), rel=0.02)
    assert found.instance_seconds == pytest.approx(mean(run.instance_seconds for run in runs), rel=0.02)
    assert found.interruptions == pytest.approx(mean(run.interruptions for run in runs), rel=0.05)
    ninth = int(0.9 * len(runs))
    assert found.nine_of_ten_seconds == pytest.approx(sorted(run.seconds for run in runs)[ninth], rel=0.02)
    assert found.nine_of_ten_billed_seconds == pytest.approx(
        sorted(run.billed_seconds for run in runs)[ninth], rel=0.02
    )


@given(plain, st.integers(1, 300))
def test_without_uploads_and_notices_it_is_dalys_total(job: Job, interval: int) -> None:
    """Session by session, and in one formula, the same expected hours."""
    steps = min(interval, job.num_steps)

    assert means(job, steps).seconds == pytest.approx(float(expected_seconds(job, np.array([steps]))[0]), rel=1e-6)


@settings(max_examples=25)
@given(plain)
def test_the_best_interval_is_that_of_trying_all(job: Job) -> None:
    """No number of steps between checkpoints ends sooner."""
    found = best_interval(job)
    tried = [means(job, steps).seconds for steps in range(1, min(job.num_steps, 40) + 1)]
    tried += [means(job, job.num_steps).seconds]

    assert means(job, found).seconds <= min(tried) * (1 + 1e-6)


def test_the_best_interval_is_near_youngs_and_dalys() -> None:
    """Where a checkpoint is short beside the time between interruptions, all three agree to 5 %, Daly's better."""
    job = replace(EIGHT_B, step_seconds=1.0, num_steps=100_000, upload_seconds=0.0)
    best = best_interval(job) * job.step_seconds

    assert young_seconds(job) == pytest.approx(best, rel=0.05)
    assert daly_seconds(job) == pytest.approx(best, rel=0.05)
    assert abs(daly_seconds(job) - best) <= abs(young_seconds(job) - best)


@given(jobs, st.floats(1.0, 5.0))
def test_more_interruptions_are_never_faster(job: Job, times: float) -> None:
    """In expectation, with the same checkpoints; nor are longer waits."""
    every = best_interval(job)
    before = means(job, every)

    more = means(replace(job, interruptions_per_second=job.interruptions_per_second * times), every)
    slower = means(replace(job, waiting_seconds=job.waiting_seconds * times), every)

    for other in (more, slower):
        assert other.seconds >= before.seconds * (1 - 1e-3)
        assert other.instance_seconds >= before.instance_seconds * (1 - 1e-3)
    assert more.interruptions >= before.interruptions * (1 - 1e-3)


@given(jobs)
def test_notices_never_harm(job: Job) -> None:
    """The more of them work, the sooner a run is expected to end, where what was saved takes no longer to take up."""
    every = best_interval(job)
    times = [
        means(replace(job, again_seconds=job.first_seconds, noticed_share=share), every).seconds
        for share in (0.0, 0.5, 1.0)
    ]

    assert times[0] >= times[1] * (1 - 1e-3) and times[1] >= times[2] * (1 - 1e-3)


@settings(max_examples=25)
@given(jobs)
def test_nine_of_ten_are_more_than_half(job: Job) -> None:
    """A greater share never keeps less, no run is faster than one alone, and what is billed was run."""
    sessions = Sessions(job, best_interval(job))
    half, ninth = sessions.quantiles(0.5), sessions.quantiles(0.9)
    wall, billed, live, interruptions = sessions.means()

    assert ninth[0] >= half[0] >= sessions.undisturbed_seconds * (1 - 1e-9)
    assert ninth[1] >= half[1] * (1 - 1e-9)
    assert billed <= live * (1 + 1e-9) and live <= wall * (1 + 1e-9)
    assert wall - live == pytest.approx(interruptions * job.waiting_seconds, rel=1e-6, abs=1e-6)


@given(jobs)
def test_without_interruptions_every_run_is_the_same(job: Job) -> None:
    """On demand nothing is lost, waited for, or saved on the way."""
    found = expectation(replace(job, interruptions_per_second=0.0))

    assert found.interruptions == 0 and found.interval_steps is None
    alone = job.first_seconds + job.num_steps * job.step_seconds + job.last_seconds
    for seconds in (found.seconds, found.billed_seconds, found.nine_of_ten_seconds, found.nine_of_ten_billed_seconds):
        assert seconds == pytest.approx(alone)


@given(jobs)
def test_hardly_any_interruptions_are_hardly_any_matter(job: Job) -> None:
    """As they get rare, a run comes to what it takes on demand, whatever the interval."""
    found = expectation(replace(job, interruptions_per_second=1e-12))

    assert found.seconds == pytest.approx(job.undisturbed_seconds, rel=1e-4)
    assert found.nine_of_ten_seconds == pytest.approx(found.seconds, rel=1e-4)


def test_uploads_keep_up() -> None:
    """No checkpoint is begun before the last one is safe."""
    job = replace(EIGHT_B, step_seconds=1.0, num_steps=5000, checkpoint_seconds=1.0, upload_seconds=600.0)

    assert best_interval(job) * job.step_seconds + job.checkpoint_seconds >= 600


def test_a_run_that_cannot_end_never_does() -> None:
    """Infinite hours, not a number that looks like one, where hardly a session gets to its first checkpoint."""
    hopeless = replace(EIGHT_B, again_seconds=1e5, first_seconds=1e5, interruptions_per_second=1e-2)

    assert math.isinf(expectation(hopeless).seconds)
    assert math.isinf(expectation(hopeless).nine_of_ten_seconds)
