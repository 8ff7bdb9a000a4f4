"""How often instances are interrupted: buckets, histories, and one's own figure."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.hazard import (
    HOURS_PER_MONTH,
    WORST_PER_HOUR,
    BadHistory,
    Hazard,
    of_bucket,
    of_history,
    of_own,
)
from shallowflow.profiles import load_instances

BUCKETS = ("<5%", "5-10%", "10-15%", "15-20%", ">20%")


def bucket(text: str) -> Hazard:
    """The rate of a bucket that is one."""
    found = of_bucket(text, "a list")
    assert found is not None
    return found


@pytest.mark.parametrize("text", BUCKETS[:-1])
def test_a_months_share_is_that_of_its_bucket(text: str) -> None:
    """An instance that runs for a month at either end's rate is interrupted with the probability at that end."""
    ends = [float(number) / 100 for number in re.findall(r"\d+", text)]
    least, most = ends if len(ends) == 2 else (0.0, ends[0])
    found = bucket(text)

    for rate, share in ((found.low, least), (found.middle, (least + most) / 2), (found.high, most)):
        assert 1 - math.exp(-rate * HOURS_PER_MONTH) == pytest.approx(share)


def test_the_open_bucket_ends_at_the_worst_that_was_recorded() -> None:
    """Over 20 % begins where 15-20 % ends, and ends at a trace's rate, one in two hours."""
    found = bucket(">20%")

    assert found.low == pytest.approx(bucket("15-20%").high)
    assert found.high == WORST_PER_HOUR == pytest.approx(0.545, abs=0.001)
    assert found.middle == pytest.approx(math.sqrt(found.low * found.high))


def test_buckets_follow_each_other() -> None:
    """A worse bucket is worse in every case."""
    for better, worse in pairwise(map(bucket, BUCKETS)):
        assert better.low < worse.low and better.middle < worse.middle and better.high < worse.high
        assert better.high == pytest.approx(worse.low)


def test_every_shipped_bucket_is_one() -> None:
    """No price's interruptions are passed over."""
    shipped = {p.interruption_bucket for instance in load_instances() for p in instance.prices}

    assert shipped - {None} == set(BUCKETS)


@pytest.mark.parametrize("text", ["", "often", "10%", "20-10%", ">100%", "95-100%", "5--10%"])
def test_what_is_no_bucket_is_none(text: str) -> None:
    """Rather than a rate that nobody stated."""
    assert of_bucket(text, "a list") is None


@given(st.floats(0, 240))
def test_ones_own_figure_is_taken_as_it_is(per_day: float) -> None:
    """The same in every case."""
    found = of_own(per_day)

    assert found.low == found.middle == found.high == pytest.approx(per_day / 24)


def history(rate_per_hour: float, nodes: int, hours: float, seed: int) -> list[str]:
    """Nodes that each stay until they are removed at random, or the history ends."""
    chance = random.Random(seed)
    lives = [chance.expovariate(rate_per_hour) for _ in range(nodes)]
    rows = [(0.0, f"0,add,n{number}") for number in range(nodes)]
    rows += [(life, f"{life * 3.6e6:.0f},remove,n{n}") for n, life in enumerate(lives) if life < hours]
    rows.append((hours, f"{hours * 3.6e6:.0f},add,last"))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def test_a_historys_rate_is_that_of_its_making() -> None:
    """Nodes that are still there at its end count for their hours; in four of five histories the ends hold the rate."""
    found = [of_history(history(0.2, 40, 3.0, seed), "made") for seed in range(200)]

    assert sum(one.middle for one in found) / len(found) == pytest.approx(0.2, rel=0.05)
    assert 0.75 <= sum(one.low <= 0.2 <= one.high for one in found) / len(found) <= 0.9
    assert all(one.low < one.middle < one.high for one in found)


def test_the_hours_of_nodes_are_counted() -> None:
    """One removed after an hour, one that stays for two: one removal in three hours."""
    found = of_history(["0,add,a", "0,add,b", "3600000,remove,a", "7200000,add,c"], "two nodes")

    assert found.middle == pytest.approx(1 / 3)
    assert found.source == "two nodes: 1 nodes removed in 3.0 hours of nodes"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["0,add,a", "5,add,b"], "no node was removed"),
        ([], "no node was removed"),
        (["0,remove,a"], "line 1"),
        (["0,add,a", "1,add,a"], "line 2"),
        (["9,add,a", "1,remove,a"], "line 2"),
        (["soon,add,a"], "line 1"),
        (["nan,add,a"], "line 1"),
        (["0,add"], "line 1"),
        (["0,left,a"], "line 1"),
    ],
)
def test_a_history_that_tells_no_rate_is_refused(rows: list[str], told: str) -> None:
    """In one line, with the row."""
    with pytest.raises(BadHistory, match=told) as caught:
        of_history(rows, "history.csv")
    assert "\n" not in str(caught.value)
