"""Replaying a trace: where its nodes are lost at a steady rate, runs come to what is expected of them."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean

import pytest

from benchmarks.spot_replay import JOB, lives, replayed, run
from shallowflow.planner.spot import means

HOUR = 3600.0


def test_a_steady_trace_is_what_is_expected() -> None:
    """Four thousand nodes that each live for an hour on average, one after another."""
    chance, now, rows = random.Random(0), 0.0, []
    for number in range(4000):
        rows.append((now, "add", number))
        rows.append((now + chance.expovariate(1 / HOUR), "remove", number))
        now += 600.0
    lines = [f"{1000 * at:.0f},{event},n{number}" for at, event, number in sorted(rows)]
    nodes, end = lives(lines)
    job = replace(JOB, num_steps=360, interruptions_per_second=1 / HOUR)

    assert len(nodes) == 4000
    assert mean(replayed(job, 60, nodes, end)) == pytest.approx(means(job, 60).seconds, rel=0.03)


def test_a_run_is_lived_through_as_written() -> None:
    """A node for 1000 seconds, of which 420 are set-up: two checkpoints are safe; the next node does the rest."""
    job = replace(JOB, num_steps=60)
    first = (0.0, 420 + 2 * 204 + 1.0)  # the second upload ends with the node

    assert run(job, 20, [first, (5000.0, 9000.0)], 0) == pytest.approx(first[1] + 425 + 200 + 5)
    assert run(job, 20, [(0.0, first[1] - 0.5), (5000.0, 9000.0)], 0) == pytest.approx(first[1] - 0.5 + 425 + 404 + 5)
    assert run(job, 20, [first], 0) is None
