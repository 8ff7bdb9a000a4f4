"""Files that a command writes, which are none of those that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from shallowflow.session import RequestError


def check_apart(written: Mapping[str, Path | None], read: Iterable[str | Path | None]) -> None:
    """Refuse to write, by the option of that name, over what is *read*, over what another option writes, or a folder.

    Raises:
        RequestError: which it is.
    """
    taken = {Path(path).resolve() for path in read if path is not None}
    taken |= {path / "config.json" for path in taken if path.is_dir()}
    for option, path in written.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise RequestError(f"folder {path.parent} for {option} does not exist")
        if path.is_dir():
            raise RequestError(f"{option} {path} is a folder; give the name of a file")
        if path.resolve() in taken:
            raise RequestError(f"{option} {path} is a file that is read, or written already; give another name")
        taken.add(path.resolve())
