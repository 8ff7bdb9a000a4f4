"""A run ends before it costs more than its budget, over all its sessions, and goes on with a higher one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from shallowflow.planner.plan import Plan
from shallowflow.runtime.guard import Guard
from shallowflow.runtime.meter import Stopwatch
from shallowflow.runtime.run import RunError, RunRequest, Silent, train
from shallowflow.runtime.watch import Money

Requests = Callable[..., RunRequest]
STEP_SECONDS = 10.0


class Hearing(Silent):
    """Keeps what was said of money."""

    def __init__(self) -> None:
        self.told: list[Money] = []

    def money(self, money: Money) -> None:
        """Hear of dollars."""
        self.told.append(money)


@pytest.fixture
def _ten_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a session have lasted ten seconds for each of its steps."""
    monkeypatch.setattr(Stopwatch, "seconds", lambda _watch: STEP_SECONDS)
    monkeypatch.setattr(Guard, "session_seconds", lambda guard: STEP_SECONDS * guard._num_steps)


@pytest.mark.usefixtures("_ten_seconds_a_step")
def test_a_budget_ends_a_run(plans: dict[str, Plan], request_for: Requests) -> None:
    """At a dollar a second: three steps of ten for $35, no more for $39, all six for $65, as in one go."""
    whole = train(plans["fp16"], request_for(num_steps=6, output=request_for().output.with_name("whole")))
    request, watcher = request_for(num_steps=6, usd_per_hour=3600.0, budget_usd=35.0), Hearing()

    first = train(plans["fp16"], request, watcher)
    nothing = train(plans["fp16"], replace(request, resume=True, budget_usd=39.0))
    last = train(plans["fp16"], replace(request, resume=True, budget_usd=65.0))

    assert (first.outcome, len(first.steps), first.budget_usd) == ("out of budget", 3, 35.0)
    assert first.notes == (
        "ended after 3 steps: $30.0000 are spent, and another step would pass the budget of $35.0000",
    )
    assert first.projected_usd == pytest.approx(60)
    assert [money.usd for money in watcher.told] == pytest.approx([10, 20, 30])
    assert [money.projected_usd for money in watcher.told] == pytest.approx([60, 60, 60])
    assert (nothing.outcome, len(nothing.steps)) == ("out of budget", 3)
    assert (last.outcome, last.interruptions) == ("completed", 1)  # a session that learned nothing leaves no trace
    assert [step.loss for step in last.steps] == [step.loss for step in whole.steps]


def test_a_budget_that_is_spent_begins_nothing(plans: dict[str, Plan], request_for: Requests) -> None:
    """One line that says what was spent, and no folder."""
    request = request_for(usd_per_hour=1e9, budget_usd=0.01)

    with pytest.raises(RunError, match=r"the budget of \$0.0100 is spent: .*; give a higher --budget-usd"):
        train(plans["fp16"], request)

    assert not request.output.exists()


def test_money_is_in_the_record(plans: dict[str, Plan], request_for: Requests) -> None:
    """All sessions' dollars, the budget, and interruptions; a run that is done has none."""
    request = request_for(num_steps=2, usd_per_hour=3600.0, budget_usd=1e6)
    first = train(plans["fp16"], request)
    record = train(plans["fp16"], replace(request, num_steps=3, resume=True))

    assert first.usd is not None and record.usd is not None
    assert first.usd == pytest.approx(first.seconds)
    assert record.usd > first.usd
    told = json.loads((request.output / "run.json").read_text(encoding="utf-8"))
    assert (told["budget_usd"], told["interruptions"], told["projected_usd"]) == (1e6, 0, None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"budget_usd": 1.0}, "--budget-usd needs the machine's price; give it with --usd-per-hour"),
        ({"budget_usd": 0.0, "usd_per_hour": 1.0}, "the budget is 0.0 dollars"),
        ({"store": "bucket/run"}, "'bucket/run' is no store; give one such as s3://bucket/prefix"),
    ],
)
def test_what_cannot_be_is_told(
    changes: dict[str, object], told: str, plans: dict[str, Plan], request_for: Requests
) -> None:
    """Before anything is loaded."""
    with pytest.raises(RunError, match=told):
        train(plans["fp16"], request_for(**changes))
