"""``sfplan merge`` and ``evaluate`` where there is no run: told at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.front.shell import sfplan

PROGRAM = (
    "import sys\nfrom shallowflow.cli import main\n"
    "try:\n    main(sys.argv[1:])\n"
    "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
)


@pytest.mark.parametrize("command", [("merge", "--output", "merged"), ("evaluate", "--tasks", "arc_easy")])
def test_a_folder_that_is_missing_is_told_without_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    """In one line, with exit code 2; torch, which takes seconds to load, is not."""
    name, *words = command
    line = [sys.executable, "-c", PROGRAM, name, "nosuch", *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout == "2 False\n"
    assert done.stderr == "Error: folder nosuch does not exist; give the folder that sfplan train wrote\n"


def test_what_is_no_run_is_told_before_the_runtime_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, a plan that nothing came of, and a file."""
    monkeypatch.setitem(sys.modules, "shallowflow.runtime.merge", None)  # which cannot be imported then
    planned, file = tmp_path / "planned", tmp_path / "file"
    planned.mkdir()
    (planned / "plan.json").write_text("{}", encoding="utf-8")
    file.touch()

    told = {folder: sfplan("merge", folder, "--output", tmp_path / "new") for folder in (tmp_path, planned, file)}

    assert [done.code for done in told.values()] == [2, 2, 2]
    for folder in (tmp_path, planned):
        assert told[folder].error() == f"{folder} holds no adapter and plan; give the folder that sfplan train wrote"
    assert told[file].error().startswith(f"{file} is a file; give the folder")
