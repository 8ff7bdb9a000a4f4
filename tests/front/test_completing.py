"""What a shell offers after the tab key."""

from __future__ import annotations

import os
import subprocess

import pytest

from shallowflow.profiles import gpu_names
from shallowflow.profiles.load import instance_names
from tests.front.shell import AS_PROGRAM


def offered(line: str) -> list[str]:
    """What bash would offer for the last word of *line*."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_SFPLAN_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": f"{len(words) - 1}",
    }
    done = subprocess.run(AS_PROGRAM, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [item.partition(",")[2] for item in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("sfplan wha", {"whatif"}),
        ("sfplan Llama-3.1", {"Llama-3.1-8B"}),
        ("sfplan plan meta-llama/Llama-3.2-1", {"meta-llama/Llama-3.2-1B"}),
        ("sfplan plan x --gpu t", {"t4"}),
        ("sfplan whatif x --instance g4dn.x", {"g4dn.xlarge"}),
        ("sfplan plan x --sharding ", {"none", "weights"}),
    ],
)
def test_names_are_offered(line: str, some: set[str]) -> None:
    """Commands, models with and without their owners, GPUs, instances, and what an option takes."""
    assert some <= set(offered(line))


def test_all_are_offered_where_nothing_was_typed() -> None:
    """Every GPU and every instance there is."""
    assert offered("sfplan profile x --gpu ") == gpu_names()
    assert offered("sfplan launch x --instance ") == instance_names()


def test_the_shell_is_told_how_to_ask() -> None:
    """The line of the tutorial makes a function of bash."""
    done = subprocess.run(
        AS_PROGRAM, env={**os.environ, "_SFPLAN_COMPLETE": "bash_source"}, capture_output=True, text=True, check=False
    )

    assert "complete -o nosort -F" in done.stdout and "sfplan" in done.stdout
