"""Every command that the README and the guides show is run, in order, and prints what is shown."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.front.shell import AS_PROGRAM, PROGRESS
from tests.front.tree import ROOT

GUIDES = ("README.md", *(f"docs/{name}.md" for name in ("tutorial", "proof", "whatif", "simulate", "calibrate")))
"""Those that anybody can follow; what needs an account of AWS or another trainer is tested beside that."""
FENCE = re.compile(r"(<!-- digits vary -->\n)?```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
TIME = re.compile(r"# (?:ms|s|min|h)\b")
BAR = re.compile(r"[█▓▒░·]{2,}")
PROCESSOR = re.compile(r"^\S.*, \d+ threads$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Shown:
    """Something that a guide shows: a command with what it prints, or Python code."""

    kind: Literal["command", "python"]
    text: str
    output: str = ""
    varies: bool = False


def shown(markdown: str) -> Iterator[Shown]:
    """What *markdown* shows in its console and Python blocks, in order."""
    for mark, language, body in FENCE.findall(markdown):
        if language == "python":
            yield Shown("python", body)
            continue
        before, *sessions = re.split(r"^\$ ", body.replace("\\\n", ""), flags=re.MULTILINE)
        assert not before.strip(), f"output without a command: {before!r}"
        for session in sessions:
            command, _, output = session.partition("\n")
            yield Shown("command", command, output, bool(mark))


def plain(text: str) -> str:
    """Without spaces at the ends of lines, and without blank lines at the end."""
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n")


def vague(text: str) -> str:
    """The words alone: no digits, signs, units of time, lengths of bars, processors, nor how lines are broken."""
    numberless = BAR.sub("bar", NUMBER.sub("#", PROCESSOR.sub("processor", text)))
    return " ".join(TIME.sub("# time", numberless).split())


def run(command: str, folder: Path) -> str:
    """What *command* prints to a pipe: its standard output, and after a failure its errors, too."""
    program, *words = shlex.split(command)
    programs = {"python": [sys.executable], "sfplan": AS_PROGRAM}
    assert program in programs, f"do not know how to run {command!r}"
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait leave the cores to others
    done = subprocess.run([*programs[program], *words], cwd=folder, env=environment, capture_output=True, check=False)
    errors = done.stderr.decode()
    assert "Traceback" not in errors, errors
    return done.stdout.decode() + (PROGRESS.sub("", errors) if done.returncode else "")


def make_targets() -> set[str]:
    """What ``make`` can be asked for."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.timeout(4800)
@pytest.mark.parametrize("guide", GUIDES)
def test_every_shown_command_prints_what_is_shown(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, in order: commands print what stands below them, Python runs, and make knows its targets."""
    everything = list(shown((ROOT / guide).read_text(encoding="utf-8")))
    assert everything
    monkeypatch.chdir(tmp_path)
    for name in ("SHALLOWFLOW_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    differences = []
    for item in everything:
        if item.kind == "python":
            exec(compile(item.text, guide, "exec"), {"__name__": "readme"})
        elif item.text.startswith("make "):
            assert set(item.text.split()[1:]) <= make_targets(), item.text
        else:
            printed = run(item.text, tmp_path)
            form = vague if item.varies else plain
            if form(printed) != form(item.output):
                lines = difflib.unified_diff(
                    plain(item.output).split("\n"), plain(printed).split("\n"), n=0, lineterm=""
                )
                differences += [f"$ {item.text}", *list(lines)[2:]]

    assert not differences, "\n".join([f"{guide} shows (-) what is not printed (+):", *differences])


def test_blocks_are_taken_apart() -> None:
    """Commands, continued ones too, get the lines below them; a mark counts for its own block only."""
    text = """
Text with `$ nothing` in it.

```console
$ first \\
    --option
one
  two
$ second
```

<!-- digits vary -->
```console
$ third
3.1 s
```

```toml
$ = "not a command"
```

```python
x = 1
```
"""

    assert list(shown(text)) == [
        Shown("command", "first     --option", "one\n  two\n"),
        Shown("command", "second"),
        Shown("command", "third", "3.1 s\n", varies=True),
        Shown("python", "x = 1\n"),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("loss 2.31 -> 1.9", "loss  0.5 -> 10.25"),
        ("step   1.4 s  +3.10%", "step 250 ms -12%"),
        ("3 min in all, $0.0123", "45.0 s in all, $1"),
        ("\n█▓░·····\n", "██▓▓▒░··\n"),
        ("a long line of words 1", "a long line\nof words 2"),
        ("1,234 tokens", "9 tokens"),
        ("AMD EPYC, 2 threads\nrates", "Intel(R) Xeon(R) Processor, 16 threads\nrates"),
    ],
)
def test_varying_digits_are_overlooked(one: str, other: str) -> None:
    """Numbers, their units of time, bars and line breaks may differ where a guide says so."""
    assert vague(one) == vague(other)


@pytest.mark.parametrize(
    ("one", "other"), [("loss 1", "cost 1"), ("1 GiB", "1 MiB"), ("a 1 b", "a b"), ("3 of 4", "3 of"), ("█", "▓")]
)
def test_words_are_not_overlooked(one: str, other: str) -> None:
    """A different word, unit of memory, or missing number is always a difference."""
    assert vague(one) != vague(other)
