"""Files and folders that are there whole or not at all; loads no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write *text* in UTF-8 as ``write_bytes`` does.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside *path*, then rename, so that a failure leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced
        path.write_bytes(content)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file
        temporary.chmod(_usual_mode())
        os.replace(temporary, path)
        to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Wait until what was written to the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which takes the place of *path* at the end; an error leaves what was there.

    The files get the mode that new files have: some libraries write theirs for their owner alone.
    """
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    if old.exists() and not path.exists():  # whoever wrote it was killed between its two renames
        old.rename(path)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.iterdir()):
            file.chmod(_usual_mode())
            to_disk(file)
        to_disk(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        to_disk(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def _usual_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
