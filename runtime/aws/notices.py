"""Notices of a spot instance's end, from the instance's metadata service, version 2; silent anywhere else."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field

from shallowflow.runtime.spot import Inbox, Notice, deadline

ENDPOINTS = {"IPv4": "http://169.254.169.254", "IPv6": "http://[fd00:ec2::254]"}
POLL_SECONDS = 5.0
"""Between two questions, as AWS recommends."""
TOKEN_SECONDS = 21_600
"""How long a token is good for: six hours, the most that the service gives."""
PROBE_SECONDS, ANSWER_SECONDS = 1.0, 2.0
"""To wait for the first answer, which comes at once or never, and for any other."""
INTERRUPTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class Unanswered(Exception):
    """The service does not answer, or not as it should."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service said, and what its clock showed then, where it told."""

    content: bytes
    now: datetime.datetime | None


@dataclass(slots=True)
class Metadata:
    """The service at *endpoint*, asked with a token that is renewed before it ends, and when it is refused."""

    endpoint: str
    clock: Callable[[], float] = time.perf_counter
    _token: str = ""
    _good_until: float = 0.0

    def read(self, path: str, timeout_seconds: float = ANSWER_SECONDS) -> Answer | None:
        """What is at *path*; None where there is nothing.

        Raises:
            Unanswered: the service is not there, or refuses.
        """
        for _ in range(2):
            if self.clock() >= self._good_until:
                self.renew(timeout_seconds)
            status, answer = self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token}, timeout_seconds)
            if status == 200:
                return answer
            if status == 404:
                return None
            if status != 401:
                break
            self._good_until = 0.0
        raise Unanswered(f"status {status}")

    def renew(self, timeout_seconds: float = ANSWER_SECONDS) -> None:
        """Get a token.

        Raises:
            Unanswered: there is none.
        """
        wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        asked = self.clock()
        status, answer = self._ask("PUT", "/latest/api/token", wanted, timeout_seconds)
        if status != 200:
            raise Unanswered(f"status {status}")
        self._token, self._good_until = answer.content.decode("latin-1"), asked + 0.9 * TOKEN_SECONDS

    def _ask(self, method: str, path: str, headers: dict[str, str], timeout_seconds: float) -> tuple[int, Answer]:
        parts = urllib.parse.urlsplit(self.endpoint)
        made = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:  # by no proxy, whatever the environment says
            connection = made(parts.hostname or "", parts.port, timeout=timeout_seconds)
            try:
                connection.request(method, parts.path.rstrip("/") + path, headers=headers)
                response = connection.getresponse()
                return response.status, Answer(response.read(), _date(response.getheader("Date")))
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(type(error).__name__) from None


def _date(told: str | None) -> datetime.datetime | None:
    if told is None:
        return None
    try:
        found = email.utils.parsedate_to_datetime(told)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


@dataclass(slots=True)
class Listener:
    """Asks *metadata* for notices and puts them into *inbox*."""

    inbox: Inbox
    metadata: Metadata
    clock: Callable[[], float] = time.perf_counter
    wall: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)
    poll_seconds: float = POLL_SECONDS
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Listen in a thread that nobody waits for."""
        threading.Thread(target=self.listen, name="notices", daemon=True).start()

    def listen(self) -> None:
        """Ask until stopped; where nobody answers the first question, never again."""
        try:
            self.metadata.renew(PROBE_SECONDS)
        except Unanswered:
            return
        while not self.stopped.is_set():
            self.poll()
            self.stopped.wait(self.poll_seconds)

    def poll(self) -> None:
        """Ask once; what goes wrong may go well the next time."""
        for path, hear in ((INTERRUPTION, self._interruption), (REBALANCE, self._rebalance)):
            try:
                answer = self.metadata.read(path)
                if answer is not None:
                    hear(answer)
            except (Unanswered, ValueError, KeyError, TypeError):
                continue

    def _interruption(self, answer: Answer) -> None:
        received, now = self.clock(), answer.now or self.wall()
        told = json.loads(answer.content)
        action, when = str(told["action"]), str(told["time"])
        known = self.inbox.interruption
        if known is not None and known.time == when:
            return
        self.inbox.interrupt(
            Notice(action=action, time=when, received=received, deadline=deadline(_instant(when), now, received))
        )

    def _rebalance(self, answer: Answer) -> None:
        self.inbox.rebalance(str(json.loads(answer.content)["noticeTime"]))


def _instant(told: str) -> datetime.datetime:
    found = datetime.datetime.fromisoformat(told)
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def endpoint() -> str | None:
    """Where the environment says that the service is; None where it says that nobody shall ask."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    mode = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv4").lower()
    usual = ENDPOINTS["IPv6" if mode == "ipv6" else "IPv4"]
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual


def listening(inbox: Inbox) -> Listener | None:
    """A listener that has started; None where the environment forbids it."""
    where = endpoint()
    if where is None:
        return None
    made = Listener(inbox, Metadata(where))
    made.start()
    return made
