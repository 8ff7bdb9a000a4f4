"""Checkpoints go to the store beside the training, one at a time; and every session is paid."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shallowflow.runtime import spend, uploads
from shallowflow.runtime.spend import BEAT_SECONDS, Ledger, Session, Spend
from shallowflow.runtime.storage import StoreError, Superseded
from shallowflow.runtime.uploads import Uploads


class Slow:
    """A vault whose saving takes until it is let go, and may fail."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.saved: list[tuple[int, str]] = []
        self.failures: list[Exception] = []

    def save(self, folder: Path, num_steps: int) -> None:
        """As a Vault's."""
        self.begun.set()
        assert self.go.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        self.saved.append((num_steps, (folder / "state").read_text()))


@pytest.fixture
def vault() -> Slow:
    """One that nothing has been given yet."""
    return Slow()


def checkpoint(folder: Path, number: int) -> Path:
    """A folder with a file."""
    made = folder / f"step-{number}"
    made.mkdir()
    (made / "state").write_text(str(number))
    return made


def made(vault: Any, tmp_path: Path, **options: Any) -> Uploads:
    """Uploads into *vault*."""
    return Uploads(vault, tmp_path / ".spool", **options)


def test_training_does_not_wait_and_the_newest_goes_next(vault: Slow, tmp_path: Path) -> None:
    """One is on its way, of the others the newest waits; each is what it was, though its folder is gone."""
    way = made(vault, tmp_path)
    first = checkpoint(tmp_path, 1)
    way.submit(first, 1)
    assert vault.begun.wait(30)
    for number in (2, 3, 4):
        way.submit(checkpoint(tmp_path, number), number)
    for number in (1, 2, 3, 4):
        shutil.rmtree(tmp_path / f"step-{number}")
    assert not way.drain(time.perf_counter())
    vault.go.set()

    assert way.drain(time.perf_counter() + 30)
    assert vault.saved == [(1, "1"), (4, "4")]
    assert way.num_stored == 4 and way.news() == []
    assert not list((tmp_path / ".spool").iterdir())


def test_a_wait_ends_at_its_deadline(vault: Slow, tmp_path: Path) -> None:
    """Whatever the upload does."""
    way = made(vault, tmp_path)
    way.submit(checkpoint(tmp_path, 1), 1)
    began = time.perf_counter()

    assert not way.drain(began + 0.05)
    assert time.perf_counter() - began < 10
    assert way.seconds >= 0.04
    vault.go.set()


def test_what_fails_is_tried_again_and_then_told(vault: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and the next one may do better."""
    monkeypatch.setattr(uploads, "PAUSE_SECONDS", 0.01)
    vault.go.set()
    way = made(vault, tmp_path)
    vault.failures = [StoreError("away")]
    way.submit(checkpoint(tmp_path, 1), 1)
    assert way.drain() and vault.saved == [(1, "1")] and way.news() == []
    vault.failures = [StoreError("away")] * uploads.NUM_TRIES
    way.submit(checkpoint(tmp_path, 2), 2)
    assert way.drain() and way.num_stored == 1
    assert way.news() == ["the checkpoint of step 2 is not in the store: away"]
    way.submit(checkpoint(tmp_path, 3), 3)
    assert way.drain() and way.num_stored == 3 and way.news() == []


def test_who_lost_the_store_writes_no_more(vault: Slow, tmp_path: Path) -> None:
    """And says so once."""
    vault.go.set()
    way = made(vault, tmp_path)
    vault.failures = [Superseded("lost")]
    for number in (1, 2):
        way.submit(checkpoint(tmp_path, number), number)
        assert way.drain()

    assert way.superseded == "lost" and vault.saved == []


def test_what_cannot_be_set_aside_is_told(vault: Slow, tmp_path: Path) -> None:
    """And training goes on."""
    way = made(vault, tmp_path)
    way.submit(tmp_path / "none", 1)

    assert way.drain() and vault.saved == []
    (told,) = way.news()
    assert told.startswith("the checkpoint of step 1 is not in the store: ")


def test_folders_without_links_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has none."""

    def link(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    uploads.link(checkpoint(tmp_path, 1), tmp_path / "copy")

    assert (tmp_path / "copy" / "state").read_text() == "1"


# Money


def ledger(folder: Path, name: str, objects: Any = None, seconds: float = 100.0) -> Ledger:
    """Of a session that has lasted so long, at a dollar a second."""
    return Ledger(name, 3600.0, lambda: seconds, folder, objects)


def test_every_session_is_paid_once(tmp_path: Path, objects: Any) -> None:
    """Those of other machines, this disk's, one that was killed, and one that is in both places."""
    ledger(tmp_path / "a", "ended", objects).stop()
    ledger(tmp_path / "a", "killed", objects, 50.0).write()
    ledger(tmp_path / "b", "local", None, 7.0).stop()
    ledger(tmp_path / "b", "mine", objects, 9.0).write()

    found = ledger(tmp_path / "b", "mine", objects).books()
    other = ledger(tmp_path / "a", "mine", objects).books()

    assert found == {
        "ended": Session(seconds=100.0, usd_per_hour=3600.0, ended=True),
        "killed": Session(seconds=50.0, usd_per_hour=3600.0),
        "local": Session(seconds=7.0, usd_per_hour=3600.0, ended=True),
    }
    assert other.keys() == {"ended", "killed"}
    spent = Spend(3600.0)
    spent.take_over(found, 0.0)
    assert spent.earlier_usd == pytest.approx(100 + 50 + BEAT_SECONDS + 7)


def test_time_without_a_price_is_paid_at_this_sessions(tmp_path: Path) -> None:
    """What a checkpoint knows and no book does."""
    ledger(tmp_path, "known", None, 30.0).stop()
    spent = Spend(7200.0)
    spent.take_over(ledger(tmp_path, "mine").books(), 130.0)

    assert spent.earlier_usd == pytest.approx(30 + 2 * 100)


def test_the_books_are_written_as_time_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, until the last word, which stays."""
    monkeypatch.setattr(spend, "BEAT_SECONDS", 0.01)
    lasted = [1.0]
    book = Ledger("one", 1.0, lambda: lasted[0], tmp_path)
    book.start()
    lasted[0] = 2.0
    reader, until = Ledger("two", 1.0, lambda: 0.0, tmp_path), time.monotonic() + 30
    while reader.books()["one"].seconds != 2.0:
        assert time.monotonic() < until
    lasted[0] = 3.0
    book.stop()
    lasted[0] = 4.0
    time.sleep(0.05)

    assert reader.books()["one"] == Session(seconds=3.0, usd_per_hour=1.0, ended=True)


def test_damaged_books_are_told(tmp_path: Path) -> None:
    """Rather than spent twice."""
    (tmp_path / "spending").mkdir()
    (tmp_path / "spending" / "x.json").write_text("{")

    with pytest.raises(StoreError, match=r"spending/x.json is not what a run writes"):
        ledger(tmp_path, "mine").books()
