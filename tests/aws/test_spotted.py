"""A run on spot instances ends as one in one go: real processes, S3 and metadata service over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.aws import planted, spotted
from tests.front.tree import ROOT


@pytest.fixture
def ask(endpoint: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run some scenarios, and see that no machine wrote or said a secret."""

    def run(*names: str) -> dict[str, Any]:
        environment = {**os.environ, **planted.environment(endpoint), "OMP_NUM_THREADS": "1"}
        environment |= {"SPOTTED_FOLDER": str(tmp_path)}
        command = [sys.executable, "-m", "tests.aws.spotted", *names]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert planted.found_in([done.stdout, done.stderr], [tmp_path]) == []
        assert planted.found_in([planted.SECRET]) == [planted.SECRET]
        found: dict[str, Any] = json.loads(done.stdout)
        assert all(one["same"] for one in found.values()), found
        return found

    return run


def test_a_run_survives_its_machines(ask: Callable[..., dict[str, Any]]) -> None:
    """Five machines with empty disks make the losses and the adapter of one run in one go, to the last bit.

    The first is told in time, saves, trains on and is killed; the second is killed in an upload; the third finds the
    newest checkpoint damaged, and is frozen while the fourth takes over, and stops when it wakes; the fourth is told
    six seconds before its end.
    """
    found = ask("one_after_another")["one_after_another"]

    assert found["told at"] == 3
    assert found["dying"] == "killed" and found["died after"] >= 2
    newest, before = found["stored before"]
    assert before >= 3 and newest - before <= spotted.SAVE_EVERY
    assert (
        f"stored checkpoint step-{newest:08d} is passed over: optimizer.safetensors is not what was written"
        in (found["frozen"])
    )
    assert f"resumed after step {before}" in found["frozen"]
    assert found["zombie"]["outcome"] == "failed"
    assert found["zombie"]["error"].startswith("another instance has taken the run over; this one stops")
    assert found["late"]["outcome"] == "interrupted"
    assert found["resumed"] == len(found["late"]["losses"])
    assert f"the checkpoint of step {found['resumed']} is in the store" in found["late"]["notes"]
    assert found["last"]["interruptions"] >= 3


@pytest.mark.skipif("SHALLOWFLOW_SPOTTED" not in os.environ, reason="takes minutes; SHALLOWFLOW_SPOTTED=1 runs it")
def test_each_mishap_alone(ask: Callable[..., dict[str, Any]]) -> None:
    """Told in time, told late, killed in an upload, a damaged checkpoint, two machines at once: each with a run."""
    found = ask(*(name for name in spotted.SCENARIOS if name != "one_after_another"))

    for name, one in found.items():
        assert one["resumed"] >= one["at"][0] - spotted.SAVE_EVERY, (name, one)
    assert found["told_in_time"]["first"] == "killed"
    assert found["told_in_time"]["resumed"] >= found["told_in_time"]["at"][0] == 3
    assert found["told_late"]["first"] == "interrupted"
    assert found["told_late"]["resumed"] == found["told_late"]["at"][0] >= 3
    assert found["told_late"]["last"]["interruptions"] == 1
    assert found["killed_in_an_upload"]["first"] == "killed"
    assert found["damaged"]["resumed"] == found["damaged"]["at"][1]
    assert found["two_at_once"]["first"] == "failed"
