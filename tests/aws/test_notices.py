"""Notices are heard from the metadata service as it is documented, and nobody else is asked anything."""

from __future__ import annotations

import datetime
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shallowflow.runtime.aws import notices
from shallowflow.runtime.aws.notices import Listener, Metadata, Unanswered
from shallowflow.runtime.guard import Guard
from shallowflow.runtime.spend import Spend
from shallowflow.runtime.spot import MOST_SECONDS, Costs, Inbox, Notice, Wish, deadline, wish
from tests.aws import metadata
from tests.aws.metadata import Service


@pytest.fixture
def service() -> Iterator[Service]:
    """A metadata service without a notice."""
    with metadata.serving() as made:
        yield made


def listener(service: Service) -> Listener:
    """One that has asked nothing yet."""
    return Listener(Inbox(), Metadata(service.endpoint))


def test_a_notice_is_heard(service: Service) -> None:
    """Nothing before it, and then its action and two minutes or what is left of them."""
    ear = listener(service)
    ear.poll()
    before = ear.inbox.interruption
    service.notice(90, "stop")
    ear.poll()
    heard = ear.inbox.interruption

    assert before is None
    assert heard is not None and heard.action == "stop"
    assert 85 <= heard.deadline - heard.received <= 91
    assert [one for one in service.asked if one[0] == "PUT"] == [("PUT", "/latest/api/token", 200)]


def test_a_stale_token_is_replaced(service: Service) -> None:
    """401 asks for a new one, once, and the same question again."""
    ear = listener(service)
    ear.poll()
    service.forget_tokens()
    service.notice()
    ear.poll()

    assert ear.inbox.interruption is not None
    paths = [status for _, path, status in service.asked if path == metadata.INTERRUPTION]
    assert paths == [404, 401, 200]


def test_a_token_is_renewed_before_it_ends(service: Service) -> None:
    """No question is asked with a token that may have ended."""
    now = [0.0]
    made = Metadata(service.endpoint, clock=lambda: now[0])
    for now[0] in (0.0, 100.0, notices.TOKEN_SECONDS - 1.0):
        made.read(metadata.INTERRUPTION)

    assert [method for method, _, _ in service.asked] == ["PUT", "GET", "GET", "PUT", "GET"]


def test_advice_is_heard_once(service: Service) -> None:
    """A recommendation that stays is one."""
    ear = listener(service)
    service.advise()
    ear.poll()
    ear.poll()

    assert ear.inbox.num_rebalances == 1 and ear.inbox.interruption is None


@pytest.mark.parametrize("hours", [-25, -1, 0, 1, 25])
def test_the_services_own_clock_counts(service: Service, hours: float) -> None:
    """A machine whose clock is wrong hears the same deadline."""
    service.clock_ahead = datetime.timedelta(hours=hours)
    service.notice(60)
    ear = listener(service)
    ear.poll()
    heard = ear.inbox.interruption

    assert heard is not None
    assert 55 <= heard.deadline - heard.received <= 61


@pytest.mark.parametrize(("minutes", "least", "most"), [(-10, 0, 0), (0, 55, 61), (10, MOST_SECONDS, MOST_SECONDS)])
def test_without_it_the_machines_clock_does(service: Service, minutes: float, least: float, most: float) -> None:
    """A wrong one makes the deadline at once, or two minutes, and never later."""
    service.notice(60)
    service.clock_ahead = None
    ear = listener(service)
    ear.wall = lambda: datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)
    ear.poll()
    heard = ear.inbox.interruption

    assert heard is not None
    assert least <= round(heard.deadline - heard.received, 6) <= most


@pytest.mark.parametrize("told", [{}, {"action": "stop"}, {"action": "stop", "time": "soon"}])
def test_what_is_no_notice_is_passed_over(service: Service, told: dict[str, str]) -> None:
    """And the next one is heard."""
    ear = listener(service)
    service.told[metadata.INTERRUPTION] = told
    ear.poll()
    assert ear.inbox.interruption is None
    service.notice()
    ear.poll()
    assert ear.inbox.interruption is not None


def test_where_nobody_answers_nobody_is_asked_again() -> None:
    """Refused at once: the thread ends by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ear = Listener(Inbox(), Metadata(f"http://127.0.0.1:{free.getsockname()[1]}"), poll_seconds=0.0)
    began = time.monotonic()
    ear.listen()

    assert time.monotonic() - began < 5


def test_a_service_that_is_slow_delays_nothing() -> None:
    """One that takes the connection and says nothing is given up after a second, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ear = Listener(Inbox(), Metadata(f"http://127.0.0.1:{silent.getsockname()[1]}"), poll_seconds=0.0)
        with pytest.raises(Unanswered):
            ear.metadata.renew(0.05)
        thread = threading.Thread(target=ear.listen)
        thread.start()
        thread.join(20)

        assert not thread.is_alive()


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """As boto3's own reading of it."""
    for name in ("AWS_EC2_METADATA_DISABLED", "AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert notices.endpoint() == "http://169.254.169.254"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6")
    assert notices.endpoint() == "http://[fd00:ec2::254]"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1/")
    assert notices.endpoint() == "http://127.0.0.1:1/"
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "True")
    assert notices.endpoint() is None and notices.listening(Inbox()) is None


# What a notice asks for


def test_a_deadline_is_never_later_than_two_minutes_and_never_past() -> None:
    """Whatever clocks say."""
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    for seconds, expected in ((-5000, 10.0), (30, 40.0), (120, 130.0), (5000, 130.0)):
        assert deadline(now + datetime.timedelta(seconds=seconds), now, 10.0) == expected


def test_the_time_until_the_deadline_is_used_and_no_more() -> None:
    """At random durations: saved at once, then trained on, and the last save and upload end before the deadline."""
    chance = random.Random(0)
    went_on = 0
    for _ in range(300):
        costs = Costs(chance.uniform(0, 20), chance.uniform(0, 10), chance.uniform(0, 40))
        left = chance.choice([0.0, chance.uniform(0, 120), 120.0])
        notice = Notice(action="stop", time="", received=100.0, deadline=100.0 + left)
        now = 100.0
        assert wish(notice, answered=False, now=now, costs=costs) is Wish.SAVE
        now += costs.save_seconds
        trained = 0.0
        while wish(notice, answered=True, now=now, costs=costs) is Wish.GO_ON:
            step = chance.uniform(0.1, 1) * costs.between_seconds + 0.01
            now, trained = now + step, trained + step
        went_on += trained > 0
        if trained:
            assert now + costs.save_seconds + costs.upload_seconds < notice.deadline
        if left > 2 * costs.needed_seconds + costs.save_seconds:
            assert trained > 0

    assert went_on > 50


def test_a_guard_saves_once_and_then_stops(service: Service) -> None:
    """One save at the notice, going on between, a stop in time; advice saves and goes on."""
    now = [1000.0]
    guard = Guard(clock=lambda: now[0])
    assert guard.wish() is Wish.GO_ON
    guard.inbox.rebalance("then")
    assert guard.wish() is Wish.SAVE and guard.wish() is Wish.GO_ON
    guard.inbox.interrupt(Notice(action="stop", time="12:00", received=1000.0, deadline=1100.0))
    assert guard.wish() is Wish.SAVE
    guard.saved(Path("x"), 1, 3.0)
    wishes: list[Wish] = []
    while not wishes or wishes[-1] is Wish.GO_ON:
        now[0] += 4.0
        wishes.append(guard.wish())

    assert wishes[-1] is Wish.STOP and len(wishes) > 10
    assert now[0] + 4.0 + 3.0 < 1100.0
    assert guard.news()[1] == "notice: this spot instance will stop at 12:00"


def test_another_machines_process_has_all_end_at_once() -> None:
    """One that does not save can only ask for the end."""
    guard = Guard(leads=False)
    guard.inbox.rebalance("then")
    assert guard.wish() is Wish.GO_ON
    guard.inbox.interrupt(Notice(action="stop", time="", received=0.0, deadline=1e9))
    assert guard.wish() is Wish.STOP


def test_a_budget_ends_a_run_before_a_step_that_would_pass_it() -> None:
    """At the beginning of the step, and within one that takes longer than any before."""
    lasted = [0.0]
    guard = Guard(began=0.0, clock=lambda: lasted[0], spend=Spend(3600.0, 100.0, earlier_usd=40.0))
    guard.stepped(10.0)
    for lasted[0], begins, expected in ((49.0, True, Wish.GO_ON), (51.0, False, Wish.GO_ON), (51.0, True, Wish.STOP)):
        guard.step_begins = begins
        assert guard.wish() is expected
    guard.step_begins = False
    lasted[0] = 60.5
    assert guard.wish() is Wish.STOP and guard.outcome == "out of budget"
