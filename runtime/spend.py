"""The dollars of a run, over all its sessions, and the guard that ends it before they are more than its budget."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .files import write_text
from .storage import SPENDING, Objects, StoreError

SPENDING_FOLDER = SPENDING.rstrip("/")
BEAT_SECONDS = 30.0
"""Between two entries of a session into the books: what a killed one may be held to have spent too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What one session of a run has taken.

    Attributes:
        seconds: until it last said so.
        ended: whether it said so when it ended; one that was killed is held to have lasted until its next word was
            due.
    """

    seconds: float
    usd_per_hour: float
    ended: bool = False

    @property
    def usd(self) -> float:
        """What it has cost, and never less."""
        return (self.seconds + (0.0 if self.ended else BEAT_SECONDS)) / 3600 * self.usd_per_hour


Books = Mapping[str, Session]
"""Sessions by their names."""


@dataclass(slots=True)
class Spend:
    """What a run has spent and may spend.

    Attributes:
        earlier_usd: of all sessions before this one.
    """

    usd_per_hour: float
    budget_usd: float | None = None
    earlier_usd: float = 0.0

    def usd(self, session_seconds: float) -> float:
        """All of it, when this session has lasted so long."""
        return self.earlier_usd + session_seconds / 3600 * self.usd_per_hour

    def forbids(self, session_seconds: float, more_seconds: float) -> bool:
        """Whether *more_seconds* would pass the budget."""
        return self.budget_usd is not None and self.usd(session_seconds + more_seconds) > self.budget_usd

    def take_over(self, books: Books, saved_seconds: float) -> None:
        """Count what earlier sessions took; *saved_seconds* are all that a checkpoint knows of.

        Time that is in no book was spent before there was a price: this session's is taken.
        """
        unknown = max(0.0, saved_seconds - sum(session.seconds for session in books.values()))
        self.earlier_usd = sum(session.usd for session in books.values()) + unknown / 3600 * self.usd_per_hour


@dataclass(slots=True)
class Ledger:
    """Writes down what this session takes, now and then, in the run's folder and in its store.

    Attributes:
        name: of the session.
        seconds: how long it has lasted.
    """

    name: str
    usd_per_hour: float
    seconds: Callable[[], float]
    folder: Path
    objects: Objects | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def books(self) -> dict[str, Session]:
        """All earlier sessions, as the folder and the store know them together.

        Raises:
            StoreError: the store cannot be read.
        """
        found: dict[str, Session] = {}
        local = sorted((self.folder / SPENDING_FOLDER).glob("*.json"))
        pages = [(path.stem, path.read_bytes()) for path in local]
        if self.objects is not None:
            for key in self.objects.keys(SPENDING):
                content = self.objects.read(key)
                if content is not None:
                    pages.append((key.removeprefix(SPENDING).removesuffix(".json"), content[0]))
        for name, page in pages:
            try:
                session = msgspec.json.decode(page, type=Session)
            except msgspec.DecodeError:
                raise StoreError(f"{SPENDING}{name}.json is not what a run writes") from None
            if name != self.name:
                found[name] = max(found.get(name, session), session, key=lambda one: (one.ended, one.seconds))
        return found

    def write(self, *, ended: bool = False) -> None:
        """Say what this session has taken.

        Raises:
            StoreError, OSError: it cannot be written down.
        """
        page = msgspec.json.encode(Session(seconds=self.seconds(), usd_per_hour=self.usd_per_hour, ended=ended))
        path = self.folder / SPENDING_FOLDER / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page.decode())
        if self.objects is not None:
            self.objects.write(f"{SPENDING}{self.name}.json", page)

    def start(self) -> None:
        """Write at once, and every BEAT_SECONDS in a thread that nobody waits for.

        Raises:
            StoreError, OSError: not even the first time.
        """
        self.write()
        threading.Thread(target=self._beat, name="spending", daemon=True).start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with self._writing, contextlib.suppress(StoreError, OSError):
                if not self._stopped.is_set():  # since the last word stays
                    self.write()

    def stop(self) -> None:
        """Write the last word; what cannot be written counts as if the session had been killed."""
        self._stopped.set()
        with self._writing, contextlib.suppress(StoreError, OSError):
            self.write(ended=True)
