"""Processes that share a run share its store: the first alone writes and reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.aws import together
from tests.front.tree import ROOT


def test_processes_go_on_from_the_store(endpoint: str) -> None:
    """One is told that its machine is taken, both stop; on empty disks both end as if nothing had been."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.aws.together"]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["outcome"] for one in told["first"]] == ["interrupted"] * 2
    assert [len(one["losses"]) for one in told["first"]] == [together.AFTER] * 2
    assert f"resumed after step {together.AFTER}" in told["last"][0]["notes"]
    for name in ("outcome", "losses", "adapter"):
        assert [one[name] for one in told["last"]] == [one[name] for one in told["whole"]]
