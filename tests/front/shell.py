"""The command line as a person meets it: words in; exit code, output and errors out."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass

from shallowflow.cli import main

AS_PROGRAM = (sys.executable, "-c", "from shallowflow.cli import main; main()")
"""The command line in a process of its own, whatever the folder that it was installed into."""

PROGRESS = re.compile(r"^(planning|running) [^\n]*: [^\n]*\n", re.MULTILINE)
"""What is said on standard error of what goes on, by a slow machine while it plans and by every run."""

SMALL = ("--gpu", "cpu", "--sequence-length", 32)
"""What to plan the tiny model for."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command came to, but for what a slow machine says meanwhile."""

    code: int
    output: str
    errors: str

    def error(self) -> str:
        """The one line on standard error of a command that was refused, without its first word."""
        assert self.output == ""
        (line,) = self.errors.splitlines()
        assert line.startswith("Error: ")
        return line.removeprefix("Error: ")


def sfplan(*words: object) -> Done:
    """Run the command line inside this process; an exception that it does not tell of goes through."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Done(code, output.getvalue(), PROGRESS.sub("", errors.getvalue()))
