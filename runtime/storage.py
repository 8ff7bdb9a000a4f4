"""A run's checkpoints and results in a store of objects: what a store must do, and the order in which it is written.

Every checkpoint has a prefix of its own, which no other writer shares. Its files come first, its manifest with their
sizes and SHA-256 comes last, and then ``LATEST`` names it, if it is still what this writer saw last. Whoever begins
puts its own name into ``LATEST`` before it reads anything else: an older writer that still lives cannot name anything
from then on, and learns of it when it next tries.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec

LATEST, MANIFEST = "LATEST", "manifest"
CHECKPOINTS, RESULTS, SPENDING = "checkpoints/", "results/", "spending/"
NUM_KEPT = 2
"""Checkpoints that are kept, as on the disk."""
NUM_TRIES = 5
"""To become the writer, where others write at the same time."""


class StoreError(RuntimeError):
    """A store that cannot be used: one line, without whatever might tell an account or a secret."""


class Taken(Exception):
    """What was to be written on a condition is there already, or is no longer what it was."""


class Superseded(StoreError):
    """Another writer has taken the run over."""


class Objects(Protocol):
    """Bytes by keys, as S3 has them, all below one prefix; a failure that may pass is tried again inside."""

    def create(self, key: str, content: bytes) -> str:
        """Write a new object and return its ETag; Taken where there is one that is not *content*."""

    def replace(self, key: str, content: bytes, etag: str) -> str:
        """Write in the place of what has *etag*, and return the new ETag; Taken where something else is there."""

    def write(self, key: str, content: bytes) -> None:
        """Write whatever is there."""

    def upload(self, key: str, path: Path) -> FileEntry:
        """Write the file *path* as a new object, and read back that it is there whole."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Content and ETag; None where there is none."""

    def download(self, key: str, path: Path) -> FileEntry | None:
        """Write the object into the file *path* and return what was written; None where there is none."""

    def keys(self, prefix: str) -> list[str]:
        """All below *prefix*."""

    def remove(self, keys: Sequence[str]) -> None:
        """Remove them; what is not there is no failure."""

    def abandon_uploads(self) -> int:
        """Give up every upload in parts that nobody will finish; returns how many there were."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as it must be."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A set of files in the store: its *prefix*, the updates it holds, and what its manifest must be."""

    prefix: str
    num_steps: int
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """What the store holds, of which run, and who may write.

    Attributes:
        writer: the session that began last.
        sequence: counts what was written here, so that no two contents are alike.
        request: what tells this run from others; see ``folder.fingerprint``.
        checkpoints: newest first.
    """

    writer: str
    sequence: int
    request: dict[str, str]
    checkpoints: tuple[Entry, ...] = ()
    results: Entry | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever learned here, so that any run may begin."""
        return not self.checkpoints and self.results is None


def session_name() -> str:
    """A name by chance, which tells nothing of the machine."""
    return uuid.uuid4().hex[:12]


@dataclass(slots=True)
class Vault:
    """One session's access to a run's store.

    Attributes:
        latest, etag: as this session last saw or wrote ``LATEST``; None before there is one.
        writer: this session's name, by chance.
        count: sets of files that it has begun to write.
    """

    objects: Objects
    latest: Latest | None = None
    etag: str | None = None
    writer: str = field(default_factory=session_name)
    count: int = 0

    @classmethod
    def look(cls, objects: Objects) -> Vault:
        """The store as it is, with nothing written.

        Raises:
            StoreError: it cannot be read, or holds something else.
        """
        made = cls(objects)
        made._look()
        return made

    def _look(self) -> None:
        found = self.objects.read(LATEST)
        if found is None:
            self.latest = self.etag = None
            return
        try:
            self.latest, self.etag = msgspec.json.decode(found[0], type=Latest), found[1]
        except msgspec.DecodeError:
            raise StoreError(f"its object {LATEST} is not what a run writes; give another prefix") from None

    def claim(self, request: Mapping[str, str]) -> str | None:
        """Become the one writer, of a new run that *request* tells from others, or of the one that is there.

        Whoever claims last is it. What dead writers left unfinished is removed; returned is why that cannot be.

        Raises:
            Superseded: others claim all the time.
            StoreError: it cannot be written.
        """
        for _ in range(NUM_TRIES):
            was = self.latest or Latest(writer="", sequence=0, request=dict(request))
            known = dict(request) if was.is_empty else was.request
            mine = replace(was, writer=self.writer, sequence=was.sequence + 1, request=known)
            try:
                content = msgspec.json.encode(mine)
                if self.etag is None:
                    self.etag = self.objects.create(LATEST, content)
                else:
                    self.etag = self.objects.replace(LATEST, content, self.etag)
                self.latest = mine
                break
            except Taken:
                self._look()
        else:
            raise Superseded("others begin to write the same run all the time; let one of them go on")
        try:
            self._clean()
        except StoreError as error:
            return f"what dead writers left stays in the store: {error}"
        return None

    def _clean(self) -> None:
        """Remove what no LATEST will ever name: all that was begun before this session claimed the store."""
        self.objects.abandon_uploads()
        named = [entry.prefix for entry in self._named()]
        left = [key for place in (CHECKPOINTS, RESULTS) for key in self.objects.keys(place)]
        self.objects.remove([key for key in left if not key.startswith(tuple(named))])

    def _named(self) -> list[Entry]:
        assert self.latest is not None
        return [*self.latest.checkpoints, *([self.latest.results] if self.latest.results else [])]

    # Writing

    def save(self, folder: Path, num_steps: int) -> None:
        """Put the checkpoint in *folder* into the store, verified, as the newest; older ones than NUM_KEPT go.

        Raises:
            Superseded: another writer has taken the run over; nothing of this one is believed.
            StoreError: it could not be written; what was there stays.
        """
        entry = self._put(f"{CHECKPOINTS}step-{num_steps:08d}", folder, num_steps)

        def with_it(latest: Latest) -> Latest:
            kept = (entry, *(one for one in latest.checkpoints if one.prefix != entry.prefix))
            return replace(latest, checkpoints=kept[:NUM_KEPT])

        self._publish(with_it)

    def keep_results(self, folder: Path, num_steps: int) -> None:
        """Put what a run has come to into the store, in the place of what an earlier session did.

        Raises:
            Superseded, StoreError: as ``save``.
        """
        entry = self._put(f"{RESULTS}step-{num_steps:08d}", folder, num_steps)
        self._publish(lambda latest: replace(latest, results=entry))

    def _put(self, place: str, folder: Path, num_steps: int) -> Entry:
        self.count += 1
        prefix = f"{place}-{self.writer}-{self.count}/"
        try:
            files = {
                path.relative_to(folder).as_posix(): self.objects.upload(
                    f"{prefix}{path.relative_to(folder).as_posix()}", path
                )
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            manifest = msgspec.json.encode(files)
            self.objects.create(f"{prefix}{MANIFEST}", manifest)
        except OSError as error:
            raise StoreError(f"{folder} cannot be read: {error.strerror}") from error
        except Taken as taken:
            raise StoreError(f"a part of {prefix} was written by somebody else") from taken
        except StoreError:
            self._check_owner()
            raise
        return Entry(prefix, num_steps, hashlib.sha256(manifest).hexdigest())

    def _publish(self, change: Callable[[Latest], Latest]) -> None:
        """Write LATEST with a *change*, if nobody else has."""
        for _ in range(NUM_TRIES):
            assert self.latest is not None and self.etag is not None
            before = self._named()
            mine = replace(change(self.latest), writer=self.writer, sequence=self.latest.sequence + 1)
            try:
                self.etag = self.objects.replace(LATEST, msgspec.json.encode(mine), self.etag)
            except Taken:
                self._check_owner()  # unless an answer to this writer was lost, after it had been obeyed
                continue
            self.latest = mine
            self._drop([entry for entry in before if entry not in self._named()])
            return
        raise StoreError(f"{LATEST} changes whenever it is written")

    def _check_owner(self) -> None:
        """See what LATEST is now.

        Raises:
            Superseded: it is another writer's.
        """
        own = self.latest
        self._look()
        if self.latest is None or self.latest.writer != self.writer:
            self.latest = own
            raise Superseded("another instance has taken the run over; this one stops and writes no more to the store")

    def _drop(self, entries: Sequence[Entry]) -> None:
        """Remove what LATEST named and no longer does; what cannot be removed, the next session removes."""
        with contextlib.suppress(StoreError):
            for entry in entries:
                self.objects.remove(self.objects.keys(entry.prefix))

    # Reading

    def fetch(self, folder: Path, num_steps: int, doubt: Callable[[Path], str | None]) -> list[str]:
        """Bring the newest checkpoint of more than *num_steps* updates, where a good one is stored, into *folder*.

        Each file must be what the manifest says, the manifest what LATEST says, and *doubt* finds nothing wrong with
        all of it. Returns why newer ones are not believed; those are forgotten with the next that is saved.

        Raises:
            StoreError: the store cannot be read.
        """
        assert self.latest is not None
        doubts: list[str] = []
        for number, entry in enumerate(self.latest.checkpoints):
            if entry.num_steps <= num_steps:
                break
            name = f"step-{entry.num_steps:08d}"
            partial = folder / f".{name}.partial"
            try:
                found = self._download(entry, partial) or doubt(partial)
                if found is None:
                    shutil.rmtree(folder / name, ignore_errors=True)
                    partial.rename(folder / name)
                    self.latest = replace(self.latest, checkpoints=self.latest.checkpoints[number:])
                    return doubts
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            doubts.append(f"stored checkpoint {name} is passed over: {found}")
        if doubts:
            self.latest = replace(self.latest, checkpoints=self.latest.checkpoints[len(doubts) :])
        return doubts

    def _download(self, entry: Entry, partial: Path) -> str | None:
        """Write all of *entry* into the folder *partial*; returns why it is not to be believed."""
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for _ in range(2):  # it may have changed on the way
            manifest = self.objects.read(f"{entry.prefix}{MANIFEST}")
            if manifest is None:
                return "its manifest is missing"
            content, _ = manifest
            if hashlib.sha256(content).hexdigest() == entry.manifest_sha256:
                break
        else:
            return "its manifest is not what was written"
        for name, wanted in msgspec.json.decode(content, type=dict[str, FileEntry]).items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            found = [self.objects.download(f"{entry.prefix}{name}", path)]
            if found[0] not in (None, wanted):  # on the way, perhaps
                found.append(self.objects.download(f"{entry.prefix}{name}", path))
            if found[-1] is None:
                return f"{name} is missing"
            if found[-1] != wanted:
                return f"{name} is not what was written"
        return None
