"""Runs of a tiny learner whose machine is killed, paused, cheated and cut off at random; what must hold is checked.

The learner's state after a step is the SHA-256 of the one before: whoever goes on from anything but a state that was
saved comes to another end. Store, guard, books and notices are the real ones, over HTTP; time is the learner's own.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from shallowflow.runtime.aws import s3
from shallowflow.runtime.aws.notices import Listener, Metadata
from shallowflow.runtime.aws.s3 import Place, S3Objects
from shallowflow.runtime.guard import Guard
from shallowflow.runtime.spend import BEAT_SECONDS, Ledger, Spend
from shallowflow.runtime.spot import Wish
from shallowflow.runtime.storage import StoreError, Superseded, Vault
from tests.aws.metadata import Service
from tests.aws.proxy import Way

NUM_MICRO_BATCHES = 4
PADDING = 40_000
"""Bytes of one file, which goes in several parts."""
REQUEST = {"plan": "tiny"}


class Killed(BaseException):
    """The machine is gone."""


class Mortal(S3Objects):
    """Dies before or after one of its requests is answered."""

    dies_in: int | None = None
    chance: random.Random

    def _ask(self, name: str, take: Callable[[Any], Any] = lambda answer: answer, **arguments: Any) -> Any:
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                if self.chance.random() < 0.5:
                    super()._ask(name, take, **arguments)
                raise Killed
        return super()._ask(name, take, **arguments)


def state_after(num_steps: int) -> bytes:
    """What a learner is after so many steps, whatever happened to it."""
    state = b"began"
    for _ in range(num_steps):
        state = hashlib.sha256(state).digest()
    return state


@dataclass
class Case:
    """One run, over all its sessions.

    Attributes:
        seconds: that really passed in them, which is what is paid.
        stored: updates in the newest checkpoint whose saving was reported done.
        damaged: whether one that was changed may be met, which is there until another is saved.
        lost: whether that was the newest, which nobody has passed over yet.
        found: what happened, for people.
    """

    bucket: str
    prefix: str
    folder: Path
    way: Way
    service: Service
    chance: random.Random
    interval: int = 3
    total: int = 24
    step_seconds: float = 10.0
    usd_per_hour: float = 3600.0
    budget_usd: float | None = None
    seconds: float = 0.0
    longest_step: float = 0.0
    stored: int = 0
    damaged: bool = False
    lost: bool = False
    zombies: list[tuple[Vault, int, bytes]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    number: int = 0

    # A session

    def session(self, *, kill: bool) -> str:
        """Begin on an empty disk and learn until something ends it; returns what."""
        self.number += 1
        machine = _Machine(self, self.folder / f"disk-{self.number}", kill=kill)
        try:
            return machine.run()
        except Killed:
            return "killed"
        finally:
            self.seconds += machine.now

    def damage_newest(self) -> None:
        """Change what is stored, behind everybody's back, and by a way of one's own, to which nothing happens."""
        share, self.way.share = self.way.share, 0.0
        try:
            self._damage_newest()
        finally:
            self.way.share = share

    def _damage_newest(self) -> None:
        vault = Vault.look(S3Objects(Place(self.bucket, self.prefix)))
        if self.damaged or vault.latest is None or len(vault.latest.checkpoints) < 2:
            return
        client = boto3.client("s3")
        key = f"{self.prefix}{vault.latest.checkpoints[0].prefix}{self.chance.choice(['state', 'padding', 'manifest'])}"
        body = bytearray(client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        body[self.chance.randrange(len(body))] ^= 1 << self.chance.randrange(8)
        client.put_object(Bucket=self.bucket, Key=key, Body=bytes(body))
        self.damaged = self.lost = True

    def wake_zombies(self) -> None:
        """Let who was thought dead go on: none of them may get anything into the store."""
        for vault, num_steps, state in self.zombies:
            vault.objects.dies_in = None  # type: ignore[attr-defined]
            folder = self.folder / f"zombie-{vault.writer}"
            write(folder, num_steps + 1, hashlib.sha256(state + b"of a zombie").digest())
            try:
                vault.save(folder, num_steps + 1)
            except Superseded:
                continue
            except StoreError:
                continue
            raise AssertionError("an older instance has overwritten its successor")
        self.zombies = []


class _Machine:
    """One session of a case, on a disk of its own, with its own clock from 0."""

    def __init__(self, case: Case, disk: Path, *, kill: bool) -> None:
        self.case, self.disk, self.now = case, disk, 0.0
        self.objects = Mortal(Place(case.bucket, case.prefix), sleep=lambda _seconds: None)
        self.objects.chance = case.chance
        self.kill_at = self.killed_in = None
        if kill and case.chance.random() < 0.5:
            self.objects.dies_in = case.chance.randrange(90)
        elif kill:
            self.kill_at = case.chance.uniform(0, case.total * case.step_seconds)
        self.guard = Guard(began=0.0, clock=lambda: self.now)
        wrong = datetime.timedelta(hours=case.chance.choice([0, 0, -30, 30]))
        self.ear = Listener(
            self.guard.inbox,
            Metadata(case.service.endpoint),
            clock=lambda: self.now,
            wall=lambda: datetime.datetime.now(datetime.UTC) + wrong,
        )
        self.written = 0.0

    def pass_time(self, seconds: float) -> None:
        """Let it pass, with an entry into the books whenever one is due, as their thread makes them."""
        until = self.now + seconds
        while self.now < until:
            due = self.written + BEAT_SECONDS
            self.now = min(until, due, until if self.kill_at is None else self.kill_at)
            if self.now == self.kill_at:
                raise Killed
            if self.now == due:
                self.written = due
                if self.guard.ledger is not None:
                    self.guard.ledger.write()

    def run(self) -> str:
        case = self.case
        vault = Vault.look(self.objects)
        vault.claim(REQUEST)
        case.wake_zombies()
        doubts = vault.fetch(self.disk, 0, lambda _path: None)
        num_steps, state = read(self.disk)
        assert state == state_after(num_steps), "a checkpoint was believed that nobody saved"
        lowest = case.stored if not case.lost else max(0, case.stored - case.interval)
        assert num_steps >= lowest, f"{case.stored} steps were stored, {num_steps} came back"
        assert bool(doubts) <= case.damaged, doubts
        case.lost, case.stored = False, num_steps
        if case.budget_usd is not None:
            self.guard.spend = Spend(case.usd_per_hour, case.budget_usd)
            self.guard.ledger = Ledger(
                vault.writer, case.usd_per_hour, self.guard.session_seconds, self.disk, self.objects
            )
            self.guard.spend.take_over(self.guard.ledger.books(), 0.0)
            if self.guard.spend.forbids(0.0, 0.0):
                return "out of budget"
            self.guard.ledger.write()
        try:
            return self.learn(vault, num_steps, state)
        except Killed:
            if case.chance.random() < 0.3:  # it was only cut off
                case.zombies.append((vault, num_steps, state))
            raise

    def learn(self, vault: Vault, num_steps: int, state: bytes) -> str:
        case = self.case
        self.guard.step_begins = True
        while num_steps < case.total:
            step = case.step_seconds * case.chance.uniform(0.7, 1.3)
            for _ in range(NUM_MICRO_BATCHES):
                self.disturb()
                wish = self.guard.wish()
                if wish is not Wish.GO_ON:
                    self.save(vault, num_steps, state)
                    assert self.guard.inbox.interruption is None or self.now < self.guard.inbox.interruption.end
                if wish is Wish.STOP:
                    return self.end(self.guard.outcome)
                self.pass_time(step / NUM_MICRO_BATCHES)
            state, num_steps = hashlib.sha256(state).digest(), num_steps + 1
            case.longest_step = max(case.longest_step, step)
            self.guard.stepped(step)
            self.guard.step_begins = True
            if num_steps % case.interval == 0:
                self.save(vault, num_steps, state)
        self.save(vault, num_steps, state)
        return self.end("completed")

    def end(self, outcome: str) -> str:
        if self.guard.ledger is not None:
            self.guard.ledger.write(ended=True)
        return outcome

    def disturb(self) -> None:
        """Let the service speak, or forget its tokens, now and then."""
        chance = self.case.chance
        if chance.random() < 0.02:
            self.case.service.forget_tokens()
        if chance.random() < 0.01:
            self.case.service.notice(chance.choice([20, 60, 120]))
        if chance.random() < 0.05 or self.case.service.told:
            self.ear.poll()

    def save(self, vault: Vault, num_steps: int, state: bytes) -> None:
        if num_steps == self.case.stored:
            return
        folder = self.disk / f"saved-{num_steps}"
        write(folder, num_steps, state)
        while True:
            try:
                vault.save(folder, num_steps)
                break
            except Superseded:
                raise
            except StoreError as error:
                self.case.found.append(str(error))
        self.case.stored, self.case.damaged, self.case.lost = num_steps, False, False


def write(folder: Path, num_steps: int, state: bytes) -> None:
    """A learner's checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_bytes(state)
    (folder / "steps").write_text(str(num_steps))
    (folder / "padding").write_bytes((state * (PADDING // len(state) + 1))[:PADDING])


def read(disk: Path) -> tuple[int, bytes]:
    """What a learner goes on from."""
    found = sorted(disk.glob("step-*"))
    if not found:
        return 0, state_after(0)
    folder = found[-1]
    state = (folder / "state").read_bytes()
    assert (folder / "padding").read_bytes() == (state * (PADDING // len(state) + 1))[:PADDING]
    return int((folder / "steps").read_text()), state


def run_case(number: int, bucket: str, folder: Path, way: Way, service: Service) -> Case:
    """Random sessions of one run, all that must hold checked; with a budget in every second case."""
    chance = random.Random(number)
    case = Case(bucket, f"case-{number}/", folder / str(number), way, service, chance)
    way.chance, way.share = random.Random(number), (0.2, 0.05, 0.0)[number % 3]
    case.step_seconds = chance.choice([2.0, 10.0, 40.0])
    if number % 2:
        case.budget_usd = case.total * case.step_seconds * chance.uniform(0.5, 3)
    service.clock_ahead = chance.choice([datetime.timedelta(), datetime.timedelta(hours=-5), None])
    for session in range(12):
        service.told.clear()
        outcome = case.session(kill=session < 8)
        case.found.append(outcome)
        if outcome in ("completed", "out of budget"):
            break
        if chance.random() < 0.3:
            case.damage_newest()
    way.share = 0.0
    if case.budget_usd is not None:
        spent = case.seconds / 3600 * case.usd_per_hour
        assert spent <= case.budget_usd + case.longest_step / 3600 * case.usd_per_hour, (spent, case.budget_usd)
    return case


assert s3.PART_BYTES > PADDING  # what the tests make smaller
