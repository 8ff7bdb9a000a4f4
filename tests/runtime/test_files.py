"""Files are written whole or left as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shallowflow.runtime import files


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while writing leaves the old content and nothing beside it."""
    path = tmp_path / "plan.json"
    files.write_text(path, "old")

    def fail(*_arguments: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            files.write_text(path, "new" * 1000)

    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """What a symbolic link points to is written, and the link is kept."""
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")

    files.write_text(link, "new")

    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_device_is_written_to() -> None:
    """What is no regular file is never replaced by one."""
    null = Path("/dev/null")

    files.write_text(null, "gone")

    assert null.is_char_device()


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    """What is written is there in the end, with the usual mode; after an error what was there before is."""
    target = tmp_path / "folder"
    for content in ("one", "two"):
        with files.new_folder(target) as partial:
            partial.mkdir()
            (partial / "file").write_text(content, encoding="utf-8")
            (partial / "file").chmod(0o600)
    plain = tmp_path / "plain"
    plain.touch()

    def fail() -> None:
        with files.new_folder(target) as partial:
            partial.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert (target / "file").read_text(encoding="utf-8") == "two"
    assert (target / "file").stat().st_mode == plain.stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "plain"}
