"""Every command and every line of Python in docs/other-trainers.md is run, and prints what is shown."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from shallowflow.runtime.trainers import traps
from tests.front.shell import sfplan
from tests.front.test_readme import plain, run, shown
from tests.front.tree import ROOT

DOCUMENT = (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(900)
def test_every_shown_command_prints_what_is_shown(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files that it shows, a plan for a tiny model, and some lines to learn."""
    monkeypatch.chdir(tmp_path)
    data.rename(tmp_path / "train.jsonl")
    pinned = ("--quantization", "nf4", "--fix", "activations=save", "--optimizer", "adamw")
    planned = sfplan(tiny_folder, "--gpu", "t4", "--sequence-length", 32, *pinned, "--json")
    (tmp_path / "plan.json").write_text(json.dumps(json.loads(planned.output)), encoding="utf-8")
    for name, text in FILE.findall(DOCUMENT):
        (tmp_path / name).write_text(text, encoding="utf-8")

    for item in shown(DOCUMENT):
        if item.kind == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other trainers' names that will change
                exec(compile(item.text, "other-trainers.md", "exec"), {"__name__": "document"})
        else:
            printed = re.sub(r"^checking [^\n]*\n", "", run(item.text, tmp_path), flags=re.MULTILINE)
            assert plain(printed) == plain(item.output), item.text


def test_every_trap_is_told_of() -> None:
    """Those that the code knows, and no others."""
    told = set(re.findall(r"^\| ([^|]+?) \| [^|]+ \| [^|]+ \|$", DOCUMENT, re.MULTILINE)) - {"trap", "---"}
    modules = [path.read_text(encoding="utf-8") for path in Path(traps.__file__).parent.glob("*traps.py")]
    known = set(re.findall(r'trap="([^"]+)"', "".join(modules)))

    assert told == known | {"needless quantization"}
