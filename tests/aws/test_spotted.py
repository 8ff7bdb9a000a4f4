"""A run on spot instances ends as one in one go: real processes, S3 and metadata service over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.aws import planted, spotted
from tests.front.tree import ROOT


def test_a_run_survives_its_machines(endpoint: str, tmp_path: Path) -> None:
    """Told in time, told late, killed in an upload, with a damaged checkpoint, with two machines at once.

    Each time the last machine begins with an empty disk, and losses and adapter are those of one that nothing happened
    to, to the last bit; nothing that any of them wrote or said holds a secret.
    """
    environment = {**os.environ, **planted.environment(endpoint), "OMP_NUM_THREADS": "1"}
    environment |= {"SPOTTED_FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "tests.aws.spotted", *spotted.SCENARIOS]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, one in found.items():
        assert one["same"], (name, one)
        assert one["resumed"] >= one["at"][0] - spotted.SAVE_EVERY, (name, one)
    assert found["told_in_time"]["first"] == "killed"
    assert found["told_in_time"]["resumed"] >= found["told_in_time"]["at"][0] == 3
    assert found["told_late"]["first"] == "interrupted"
    assert found["told_late"]["resumed"] == found["told_late"]["at"][0] >= 3
    assert any("is in the store" in note for note in found["told_late"]["notes"])
    assert found["told_late"]["last"]["interruptions"] == 1
    assert found["killed_in_an_upload"]["first"] == "killed"
    assert found["damaged"]["resumed"] == found["damaged"]["at"][1]
    assert any("optimizer.safetensors is not what was written" in note for note in found["damaged"]["last"]["notes"])
    assert found["two_at_once"]["first"] == "failed"
    assert "another instance has taken the run over" in found["two_at_once"]["error"]
    assert planted.found_in([done.stdout, done.stderr], [tmp_path]) == []
