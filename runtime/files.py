"""Files and folders that are there whole or not at all; loads no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write beside *path*, then rename, so that a failure leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced
        path.write_text(text, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(_usual_mode())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which takes the place of *path* at the end; an error leaves what was there.

    The files get the mode that new files have: some libraries write theirs for their owner alone.
    """
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.iterdir()):
            file.chmod(_usual_mode())
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def _usual_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
