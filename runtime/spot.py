"""What a notice about a spot instance asks of a run, and until when."""

from __future__ import annotations

import datetime
import enum
import threading
from dataclasses import dataclass, field

MOST_SECONDS = 120.0
"""From a notice to the end, at most: AWS gives two minutes, and a clock that is wrong gives no more."""
MARGIN = 2.0
"""Over what saving and uploading took before, for they may take longer."""
SPARE_SECONDS = 5.0
"""Before the deadline, for leaving: what polling may have missed of the two minutes."""


class Wish(enum.IntEnum):
    """What a run is to do before its next micro-batch."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An instance that will be taken.

    Attributes:
        action: what happens to it: ``terminate``, ``stop`` or ``hibernate``.
        time: when, in the notice's words.
        received, deadline: on this machine's own clock that only goes forward, in seconds.
    """

    action: str
    time: str
    received: float
    deadline: float

    @property
    def end(self) -> float:
        """When the machine is gone at the latest, whatever clocks say."""
        return self.received + MOST_SECONDS


def deadline(time: datetime.datetime, now: datetime.datetime, received: float) -> float:
    """When *time* comes on the clock that showed *received* when the other showed *now*.

    A clock that is wrong can make it earlier, down to at once, or later, up to two minutes; what is saved at once when
    the notice comes is saved all the same.
    """
    return received + min(MOST_SECONDS, max(0.0, (time - now).total_seconds()))


@dataclass(frozen=True, slots=True)
class Costs:
    """What this run took so far, at most: between two questions, for a checkpoint, and for its upload."""

    between_seconds: float
    save_seconds: float
    upload_seconds: float

    @property
    def needed_seconds(self) -> float:
        """From a question that still lets another micro-batch begin to a checkpoint that is stored."""
        return MARGIN * (self.between_seconds + self.save_seconds + self.upload_seconds) + SPARE_SECONDS


def wish(notice: Notice, *, answered: bool, now: float, costs: Costs) -> Wish:
    """Save at once; then go on as long as another micro-batch, checkpoint and upload end before the deadline."""
    if not answered:
        return Wish.SAVE
    return Wish.GO_ON if now + costs.needed_seconds < notice.deadline else Wish.STOP


@dataclass(slots=True)
class Inbox:
    """What a thread that listens has heard, for the one that trains.

    Attributes:
        rebalances: times of the advice, each a string, to be elsewhere soon.
    """

    _interruption: Notice | None = None
    _rebalances: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def interrupt(self, notice: Notice) -> None:
        """Hear that the instance will be taken; of several times the earliest counts."""
        with self._lock:
            if self._interruption is None or notice.deadline < self._interruption.deadline:
                received = notice.received if self._interruption is None else self._interruption.received
                self._interruption = Notice(
                    action=notice.action, time=notice.time, received=received, deadline=notice.deadline
                )

    def rebalance(self, time: str) -> None:
        """Hear that the instance may be taken sooner than others."""
        with self._lock:
            if time not in self._rebalances:
                self._rebalances.append(time)

    @property
    def interruption(self) -> Notice | None:
        """That the instance will be taken."""
        with self._lock:
            return self._interruption

    @property
    def num_rebalances(self) -> int:
        """Pieces of advice so far."""
        with self._lock:
            return len(self._rebalances)
