"""The package that runs here as a wheel, so that another machine runs the same code and trusts no name for it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from shallowflow.planner.profiler import cache
from shallowflow.runtime.files import write_bytes
from shallowflow.session import RequestError

NAME = "shallowflow"
SHIPPED = {".py", ".toml", ".json", ".html", ".typed"}
_ROOT = Path(__file__).parent
_MOMENT = (1980, 1, 1, 0, 0, 0)
"""Of every file, the first that a zip archive can say: the same code is the same wheel, to the byte."""


def own_wheel() -> Path:
    """A wheel of this very package, in the cache.

    It has the layout of the binary distribution format
    (https://packaging.python.org/en/latest/specifications/binary-distribution-format).

    Raises:
        RequestError: the package is not installed, and so has no metadata.
    """
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:
        raise RequestError(f"{NAME} runs without being installed; give --package FILE.whl") from None
    described = f"{NAME}-{installed.version}.dist-info"
    members = {f"{NAME}/{name}": content for name, content in _files()}
    members |= {f"{described}/{name}": content for name, content in _metadata(installed)}
    content = _archive({**members, f"{described}/RECORD": _record(members, described)})
    digest = hashlib.sha256(content).hexdigest()[:16]  # the version alone does not tell what code it is
    path = cache.folder() / "wheels" / digest / f"{NAME}-{installed.version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def _files() -> Iterator[tuple[str, bytes]]:
    """Modules and data by their path in the package; its folders may be links."""
    for folder, folders, names in os.walk(_ROOT, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in SHIPPED:
                yield path.relative_to(_ROOT).as_posix(), path.read_bytes()


def _metadata(installed: Distribution) -> Iterator[tuple[str, bytes]]:
    about = installed.read_text("METADATA") or ""
    yield "METADATA", about.encode()
    yield "WHEEL", f"Wheel-Version: 1.0\nGenerator: {NAME}\nRoot-Is-Purelib: true\nTag: py3-none-any\n".encode()
    for name in ("entry_points.txt", *(f"licenses/{n}" for n in installed.metadata.get_all("License-File") or ())):
        content = installed.read_text(name)
        if content is not None:
            yield name, content.encode()


def _record(members: dict[str, bytes], described: str) -> bytes:
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        table.writerow((name, f"sha256={digest}", len(content)))
    table.writerow((f"{described}/RECORD", "", ""))
    return lines.getvalue().encode()


def _archive(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            told = zipfile.ZipInfo(name, _MOMENT)
            told.external_attr = 0o644 << 16
            told.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(told, content)
    return made.getvalue()
