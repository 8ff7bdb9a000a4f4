"""What ``sfplan export`` writes is what the program that it is for reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shallowflow.profiles import gpu_names
from shallowflow.runtime.skypilot import ACCELERATORS
from tests.front.shell import sfplan

SKYPILOT = Path(sys.prefix) / "skypilot" / "bin" / "python"
"""The environment that ``make setup`` makes for it."""
READ = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(wanted,) = task.resources
(bucket,) = task.storage_mounts.values()
facts = [task.name, task.num_nodes, str(wanted.cloud), wanted.accelerators, wanted.use_spot, wanted.disk_size]
print(json.dumps([*facts, task.setup, task.run, task.file_mounts, bucket.name, bucket.mode.value]))
"""
TO = ("--to", "skypilot", "--bucket", "my-checkpoints")


@pytest.fixture(scope="session")
def t4_plan(tiny_folder: Path) -> str:
    """A plan for the tiny model on a T4, in JSON."""
    pinned = ("--quantization", "nf4", "--fix", "activations=save", "--optimizer", "adamw", "--sequence-length", 32)
    done = sfplan(tiny_folder, "--gpu", "t4", *pinned, "--json")
    assert done.code == 0, done.errors
    return done.output


@pytest.fixture
def plan(t4_plan: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write the plan, changed or not, beside ``train.jsonl``, in the folder that commands then run in."""
    data.rename(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)

    def write(**changes: Any) -> Path:
        Path("plan.json").write_text(json.dumps({**json.loads(t4_plan), **changes}), encoding="utf-8")
        return Path("plan.json")

    return write


def read_by_skypilot(path: Path, home: Path) -> list[Any]:
    """What SkyPilot itself makes of a task file, in a home of its own."""
    environment = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [SKYPILOT, "-c", READ, path], env=environment, capture_output=True, check=False, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not SKYPILOT.exists(), reason="SkyPilot's environment is made by `make setup`")
@pytest.mark.parametrize("spot", [True, False])
def test_skypilot_reads_what_is_meant(plan: Callable[..., Path], tmp_path: Path, spot: bool) -> None:
    """Its own parser finds the GPUs, the kind of instance, the files, the bucket, and a command that resumes."""
    held = tmp_path / "other.csv"
    held.write_text("text\nheld out\n", encoding="utf-8")
    words = ("--eval-data", held, "--spot" if spot else "--on-demand", "--output", "task.yaml")

    done = sfplan("export", plan(), *TO, "--data", "train.jsonl", *words)

    assert (done.code, done.output, done.errors) == (0, "", "")
    name, nodes, cloud, accelerators, use_spot, disk, setup, run, mounts, bucket, mode = read_by_skypilot(
        tmp_path / "task.yaml", tmp_path
    )
    assert (name, nodes, cloud, accelerators, use_spot) == ("shallowflow-tiny", 1, "AWS", {"T4": 1}, spot)
    assert disk >= 60
    assert setup == "pip install shallowflow==0.1.0"
    assert run == (
        "cd ~/shallowflow && sfplan train plan.json --data train.jsonl --output /shallowflow/run --resume "
        "--eval-data heldout.csv"
    )
    assert mounts == {
        "~/shallowflow/plan.json": "plan.json",
        "~/shallowflow/train.jsonl": "train.jsonl",
        "~/shallowflow/heldout.csv": str(held),
    }
    assert (bucket, mode) == ("my-checkpoints", "MOUNT_CACHED")


def test_every_command_of_the_help_runs(plan: Callable[..., Path]) -> None:
    """What its help shows works as it stands, and a file holds what would be printed."""
    plan()
    shown = re.findall(r"^ +sfplan (export plan.*)$", sfplan("export", "--help").output, re.MULTILINE)
    assert len(shown) == 2

    printed, written = (sfplan(*shlex.split(words)) for words in shown)

    assert (printed.code, written.code, written.output) == (0, 0, "")
    assert printed.output == Path("task.yaml").read_text(encoding="utf-8")


def test_a_plan_file_is_data(plan: Callable[..., Path]) -> None:
    """A model's name with line breaks and a command in it stays within a remark and a name."""
    hostile = "org/a\nrun: rm -rf /\n# $(reboot)"

    done = sfplan("export", plan(model_name=hostile), *TO, "--data", "train.jsonl", "--package", "x; reboot")

    task = yaml.safe_load(done.output)
    assert task["run"].startswith("cd ~/shallowflow && sfplan train plan.json ")
    assert task["setup"] == "pip install 'x; reboot'"
    assert re.fullmatch(r"shallowflow-[a-z0-9-]*", task["name"])


def test_every_gpu_has_a_name_in_the_cloud() -> None:
    """All shipped GPUs but this machine's processor can be asked for."""
    assert set(ACCELERATORS) == set(gpu_names()) - {"cpu"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "missing.jsonl"), "file missing.jsonl does not exist; a task uploads files"),
        (("--data", "train.jsonl", "--bucket", "My_Bucket"), "'My_Bucket' is no name of a bucket; give 3 to 63"),
        (("--data", "train.jsonl", "--to", "slurm"), "'slurm' is not"),
    ],
)
def test_what_cannot_be_run_is_told(plan: Callable[..., Path], words: tuple[str, ...], told: str) -> None:
    """One line, exit code 2, and nothing written."""
    done = sfplan("export", plan(), *TO, *words, "--output", "task.yaml")

    assert done.code == 2
    assert told in done.error()
    assert not Path("task.yaml").exists()


def test_a_processor_is_not_rented(tiny_plan: str, data: Path, tmp_path: Path) -> None:
    """A plan for this CPU is refused."""
    (tmp_path / "plan.json").write_text(tiny_plan, encoding="utf-8")

    done = sfplan("export", tmp_path / "plan.json", *TO, "--data", data)

    assert done.code == 2
    assert "no GPU that a cloud rents; plan for one, such as t4" in done.error()
