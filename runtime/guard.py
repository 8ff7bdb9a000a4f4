"""All that may have a run saved, or ended, before its time: notices, the budget, a store that another took over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shallowflow.planner import words

from .ranks import ALONE, Ranks
from .record import Outcome
from .spend import Ledger, Spend
from .spot import Costs, Inbox, Wish, wish
from .uploads import Uploads

NUM_RECENT = 20
"""Of the last steps and waits, the longest tells how long another may take."""


@dataclass(slots=True)
class Guard:
    """What a run asks before every micro-batch, and tells of every step and checkpoint.

    Attributes:
        clock, began: what notices and budget go by, and what it showed when this session began.
        leads: whether this process saves; one that does not has all end at once, on a notice to its machine.
        outcome: what a stop is called.
        notes: what the run's record shall say of it.
        step_begins: whether the next micro-batch is the first of a step.
    """

    began: float = field(default_factory=time.perf_counter)
    clock: Callable[[], float] = time.perf_counter
    leads: bool = True
    inbox: Inbox = field(default_factory=Inbox)
    uploads: Uploads | None = None
    spend: Spend | None = None
    ledger: Ledger | None = None
    outcome: Outcome = "interrupted"
    notes: list[str] = field(default_factory=list)
    step_begins: bool = True
    _news: list[str] = field(default_factory=list)
    _answered: bool = False
    _rebalances: int = 0
    _asked: float | None = None
    _waits: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)
    _num_steps: int = 0
    _first_asked: float | None = None
    _save_seconds: float = 0.0
    _newest: tuple[Path, int] | None = None

    def session_seconds(self) -> float:
        """How long this session has lasted."""
        return self.clock() - self.began

    # Before every micro-batch

    def wish(self) -> Wish:
        """What to do before the next micro-batch."""
        now = self.clock()
        if self._asked is not None:
            self._waits = [*self._waits[1 - NUM_RECENT :], now - self._asked]
        self._asked = now
        begins, self.step_begins = self.step_begins, False
        if self._first_asked is None:
            self._first_asked = self.session_seconds()
        if self.uploads is not None and self.uploads.superseded is not None:
            return Wish.STOP
        if self.spend is not None and self._cannot_pay(self.spend, begins):
            return Wish.STOP
        return max(self._noticed(now), self._advised())

    def _noticed(self, now: float) -> Wish:
        notice = self.inbox.interruption
        if notice is None:
            return Wish.GO_ON
        if not self.leads:
            return Wish.STOP
        wanted = wish(notice, answered=self._answered, now=now, costs=self.costs)
        if not self._answered:
            self._say(f"notice: this spot instance will {notice.action} at {notice.time}")
            self._answered = True
        return wanted

    def _advised(self) -> Wish:
        told, self._rebalances = self._rebalances, self.inbox.num_rebalances
        if not self.leads or told == self._rebalances:
            return Wish.GO_ON
        self._say("notice: this spot instance is at more risk than others of being taken; saved, and on")
        return Wish.SAVE

    def _cannot_pay(self, spend: Spend, step_begins: bool) -> bool:
        """Whether the budget would be passed by the step that *begins*, or is passed without it, a checkpoint saved."""
        step = max(self._steps, default=0.0) if step_begins else max(self._waits, default=0.0)
        more = step + self._save_seconds + (0.0 if self.uploads is None else self.uploads.seconds)
        if not spend.forbids(self.session_seconds(), more):
            return False
        self.outcome = "out of budget"
        return True

    @property
    def costs(self) -> Costs:
        """What waits, checkpoints and uploads took at most."""
        upload = 0.0 if self.uploads is None else self.uploads.seconds
        return Costs(max(self._waits, default=0.0), self._save_seconds, upload)

    def _say(self, line: str) -> None:
        self._news.append(line)
        self.notes.append(line)

    def news(self) -> list[str]:
        """What a person should know at once."""
        found, self._news = self._news, []
        return found if self.uploads is None else [*found, *self.uploads.news()]

    # What a run tells

    def remember(self, seconds: Sequence[float]) -> None:
        """Take over what the steps of earlier sessions took."""
        self._steps = list(seconds[-NUM_RECENT:])

    def stepped(self, seconds: float) -> None:
        """Hear of a step that took so long."""
        self._steps = [*self._steps[1 - NUM_RECENT :], seconds]
        self._num_steps += 1

    def projected_usd(self, num_left: int) -> float | None:
        """What the run comes to with *num_left* more steps, at the pace of this session, evaluations and all."""
        if self.spend is None:
            return None
        seconds = self.session_seconds()
        if num_left == 0:
            return self.spend.usd(seconds)
        if self._first_asked is None or not self._num_steps:
            return None
        return self.spend.usd(seconds + num_left * (seconds - self._first_asked) / self._num_steps)

    def saved(self, folder: Path, num_steps: int, seconds: float) -> None:
        """Hear of a finished checkpoint in *folder*, which goes to the store."""
        self._save_seconds = max(self._save_seconds, seconds)
        self.submit(folder, num_steps)

    def submit(self, folder: Path, num_steps: int) -> None:
        """Have a finished checkpoint stored."""
        self._newest = folder, num_steps
        if self.uploads is not None:
            self.uploads.submit(folder, num_steps)

    def insist(self) -> None:
        """Have the newest checkpoint stored which is not, and not on its way either."""
        if self.uploads is None or self._newest is None:
            return
        folder, num_steps = self._newest
        if self.uploads.num_stored != num_steps and self.uploads.drain(self.clock()) and folder.is_dir():
            self.uploads.submit(folder, num_steps)

    # At the end

    def settle(self, num_steps: int) -> None:
        """Wait for what is on its way to the store, at most until the machine is gone; and note what came of it."""
        notice = self.inbox.interruption
        done = True if self.uploads is None else self.uploads.drain(None if notice is None else notice.end)
        if self.outcome == "out of budget" and self.spend is not None and self.spend.budget_usd is not None:
            self.notes.append(
                f"ended after {words.counted(num_steps, 'step')}: ${self.spend.usd(self.session_seconds()):.4f} are "
                f"spent, and another step would pass the budget of ${self.spend.budget_usd:.4f}"
            )
        if self.uploads is not None:
            stored = self.uploads.num_stored
            if not done:
                self.notes.append("the machine's time was over before the newest checkpoint was in the store")
            elif notice is not None and stored is not None:
                self.notes.append(f"the checkpoint of step {stored} is in the store")
            self.notes += [note for note in self.uploads.news() if note != self.uploads.superseded]


@contextlib.contextmanager
def guarding(ranks: Ranks = ALONE) -> Iterator[Guard]:
    """A guard that hears notices from now on, in the first process of each machine."""
    from .aws import notices

    guard = Guard(leads=ranks.leads)
    listener = notices.listening(guard.inbox) if ranks.local_rank == 0 else None
    try:
        yield guard
    finally:
        if listener is not None:
            listener.stopped.set()
        if guard.ledger is not None:
            guard.ledger.stop()
