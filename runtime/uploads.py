"""Checkpoints on their way into a store, one after the other, beside the training."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .storage import StoreError, Superseded, Vault

NUM_TRIES, PAUSE_SECONDS = 3, 5.0
"""Of one checkpoint, each of which tries every request several times, and between two."""


@dataclass(frozen=True, slots=True)
class _Parcel:
    folder: Path
    num_steps: int


class Uploads:
    """A thread that stores one checkpoint at a time; of those that wait, only the newest.

    What is uploaded is linked into a folder of its own first, since a run removes its old checkpoints.

    Attributes:
        num_stored: the updates in the newest checkpoint that is in the store, verified.
        superseded: what to say where another writer has taken over; nothing is written from then on.
    """

    def __init__(self, vault: Vault, spool: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.vault, self._spool, self._clock = vault, spool, clock
        self.num_stored: int | None = None
        self.superseded: str | None = None
        self._news: list[str] = []
        self._waiting: _Parcel | None = None
        self._busy_since: float | None = None
        self._longest, self._count = 0.0, 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        shutil.rmtree(spool, ignore_errors=True)  # of a process that was killed

    def submit(self, folder: Path, num_steps: int) -> None:
        """Have the finished checkpoint in *folder* stored soon; one that waits already gives way to it."""
        self._count += 1
        parcel = _Parcel(self._spool / str(self._count), num_steps)
        try:
            link(folder, parcel.folder)
        except OSError as error:  # a disk that is full, where nothing can be linked
            shutil.rmtree(parcel.folder, ignore_errors=True)
            with self._changed:
                self._news.append(f"the checkpoint of step {num_steps} is not in the store: {error}")
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting.folder, ignore_errors=True)
            self._waiting = parcel
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, until: float | None = None) -> bool:
        """Wait until nothing is on its way, or the clock shows *until*; returns which."""
        with self._changed:
            while self._waiting is not None or self._busy_since is not None:
                left = None if until is None else until - self._clock()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    @property
    def seconds(self) -> float:
        """What an upload has taken at most, the present one included."""
        with self._changed:
            present = 0.0 if self._busy_since is None else self._clock() - self._busy_since
            return max(self._longest, present)

    def news(self) -> list[str]:
        """What a person should know and was not told yet."""
        with self._changed:
            told, self._news = self._news, []
        return told

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                parcel, self._waiting = self._waiting, None
                self._busy_since = self._clock()
            news = self._store(parcel)
            shutil.rmtree(parcel.folder, ignore_errors=True)
            with self._changed:
                if news is None and self._busy_since is not None:
                    self._longest = max(self._longest, self._clock() - self._busy_since)
                elif news is not None:
                    self._news.append(news)
                self._busy_since = None
                self._changed.notify_all()

    def _store(self, parcel: _Parcel) -> str | None:
        """Returns why it could not be stored."""
        said = ""
        for number in range(NUM_TRIES):
            if self.superseded is not None:
                return None
            try:
                self.vault.save(parcel.folder, parcel.num_steps)
            except Superseded as error:
                self.superseded = str(error)
                return self.superseded
            except StoreError as error:
                said = f"the checkpoint of step {parcel.num_steps} is not in the store: {error}"
            else:
                self.num_stored = parcel.num_steps
                return None
            with self._changed:
                if self._waiting is not None or number == NUM_TRIES - 1:
                    return said
                self._changed.wait(PAUSE_SECONDS)
        return said


def link(source: Path, target: Path) -> None:
    """The files of the folder *source* under the new folder *target* as well, copied where they cannot be linked."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        return str(shutil.copy2(source, target))
    return target
