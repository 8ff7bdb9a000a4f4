"""Ways side by side: order, limits, and the limits that would leave one."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shallowflow.planner import comparison_view as view
from shallowflow.planner.comparison import Comparison, OutOfReach, ordered, within
from shallowflow.planner.outlook import Outlook

numbers = st.floats(0.01, 1e4)
ways = st.builds(
    Outlook,
    instance=st.sampled_from(["g4dn.xlarge", "g4dn.12xlarge", "p4de.24xlarge"]),
    region=st.sampled_from(["us-east-1", "ap-southeast-1"]),
    market=st.sampled_from(["on demand", "spot"]),
    gpu=st.just("t4"),
    num_gpus=st.sampled_from([1, 4]),
    num_machines=st.just(1),
    what_if=st.sampled_from(["", "rank=8"]),
    hours=numbers,
    nine_of_ten_hours=numbers,
    usd=numbers,
    nine_of_ten_usd=numbers,
    storage_usd=st.just(0.0),
    disk_is_priced=st.booleans(),
    low_usd=numbers,
    high_usd=numbers,
    interruptions=st.floats(0, 50),
    interval_steps=st.none() | st.integers(1, 99),
    interval_seconds=st.none() | numbers,
    tokens_per_usd=st.floats(1, 1e9),
    usd_per_hour=numbers,
    price_date=st.just("2026-01-01"),
    price_source=st.just("a list"),
    hazard_source=st.just("a guess"),
)
several = st.lists(ways, min_size=1, max_size=20)


def compared(outlooks: list[Outlook]) -> Comparison:
    """All of *outlooks*, by money."""
    return Comparison(
        model_name="tiny",
        total_tokens=1000,
        by="money",
        outlooks=ordered(outlooks, "money"),
        num_ways=len(outlooks),
        plans=(),
        unplanned=(),
        notes=(),
    )


@given(several)
def test_ways_are_ordered_by_what_is_asked(outlooks: list[Outlook]) -> None:
    """By money or by time, and none is lost."""
    by_money, by_time = ordered(outlooks, "money"), ordered(outlooks, "time")

    assert [o.usd for o in by_money] == sorted(o.usd for o in outlooks)
    assert [o.hours for o in by_time] == sorted(o.hours for o in outlooks)
    assert sorted(map(repr, by_money)) == sorted(map(repr, by_time)) == sorted(map(repr, outlooks))


@given(several, st.none() | numbers, st.none() | numbers)
def test_limits_leave_what_keeps_them_or_say_which_would(
    outlooks: list[Outlook], hours: float | None, usd: float | None
) -> None:
    """Nine of ten runs are within what is left; where nothing is, every offered limit leaves something."""

    def keeps(outlook: Outlook) -> bool:
        return outlook.nine_of_ten_hours <= (hours or math.inf) and outlook.nine_of_ten_usd <= (usd or math.inf)

    if any(map(keeps, outlooks)):
        assert list(within(outlooks, hours, usd)) == [outlook for outlook in outlooks if keeps(outlook)]
        return
    with pytest.raises(OutOfReach) as caught:
        within(outlooks, hours, usd)
    assert caught.value.options
    for option, outlook in caught.value.options:
        said = {name: float(value) for name, value in re.findall(r"--(deadline-hours|budget-usd) (\S+)", option)}
        assert outlook in within(outlooks, said.get("deadline-hours", hours), said.get("budget-usd", usd))
        assert option in str(caught.value)
    assert len(caught.value.as_dict()["remedies"]) == len(caught.value.options)


@given(several)
def test_distances_are_to_the_least(outlooks: list[Outlook]) -> None:
    """The cheapest and the fastest are none away, all others some."""
    found = compared(outlooks)

    assert min(map(found.over_cheapest, found.outlooks)) == min(map(found.over_fastest, found.outlooks)) == 0
    for outlook in found.outlooks:
        row = found.row(outlook)
        assert row["over_cheapest"] == pytest.approx(outlook.usd / found.outlooks[0].usd - 1)


@given(several)
def test_the_best_region_stands_for_its_instance(outlooks: list[Outlook]) -> None:
    """One of each instance, market, number of GPUs and change, the cheapest."""
    found = compared(outlooks)

    def kind(outlook: Outlook) -> tuple[object, ...]:
        return outlook.instance, outlook.market, outlook.num_gpus, outlook.what_if

    for best in found.best_regions():
        assert best.usd == min(other.usd for other in outlooks if kind(other) == kind(best))
    assert {kind(best) for best in found.best_regions()} == set(map(kind, outlooks))
    shown = view.few(found)
    assert min(o.usd for o in shown) == min(o.usd for o in outlooks)
    assert min(o.hours for o in shown) == min(o.hours for o in outlooks)
    assert {o.market for o in shown} == {o.market for o in outlooks}


@given(several)
def test_the_table_fits_80_columns(outlooks: list[Outlook]) -> None:
    """Every row has all its numbers and breaks nowhere."""
    usual = [replace(o, what_if="", tokens_per_usd=1.2e6) for o in outlooks]
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(view.shown(compared(usual), everything=True))
    lines = captured.get().splitlines()

    assert all(len(line) <= 80 for line in lines)
    for outlook in usual:
        assert any(line.split() == [cell for cell in view.cells(outlook) if cell] for line in lines)


@given(ways, ways)
def test_what_never_ends_is_said_to(outlook: Outlook, other: Outlook) -> None:
    """No infinite dollars are shown, and no share of them."""
    endless: dict[str, Any] = dict.fromkeys(
        ("hours", "nine_of_ten_hours", "usd", "nine_of_ten_usd", "interruptions"), math.inf
    )
    never = replace(outlook, **endless)
    for others in ([never], [never, other]):
        told = " ".join([*view.cells(never), *view.details(compared(others), never)])
        assert told.count("never") >= 4 and "inf" not in told and "nan" not in told
