"""What ``sfplan export`` writes is what the program that it is for reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shallowflow.profiles import gpu_names
from shallowflow.profiles.load import load_instances
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
PINNED = (
    *("--gpu", "t4", "--sequence-length", 32),
    *("--quantization", "nf4", "--fix", "activations=save", "--optimizer", "adamw"),
)
"""So that little need be traced."""
TO = ("--to", "skypilot", "--bucket", "my-checkpoints")
WHEEL = "shallowflow-0.1.0-py3-none-any.whl"


@pytest.fixture(scope="session")
def t4_plan(tiny_folder: Path) -> str:
    """A plan for the tiny model on a T4, in JSON."""
    done = sfplan(tiny_folder, *PINNED, "--json")
    assert done.code == 0, done.errors
    return done.output


@pytest.fixture
def plan(t4_plan: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write the plan, changed or not, beside ``train.jsonl``, in the folder that commands then run in."""
    data.rename(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)

    def write(**changes: Any) -> Path:
        made = {**json.loads(t4_plan), "model_name": "org/Tiny-1.1", **changes}
        Path("plan.json").write_text(json.dumps(made), encoding="utf-8")
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
    words = ("--eval-data", held, "--spot" if spot else "--on-demand", "--output", "task.yaml", "--data-format", "text")

    done = sfplan("export", plan(), *TO, "--data", "train.jsonl", *words)

    assert (done.code, done.output, done.errors) == (0, "", "")
    name, nodes, cloud, accelerators, use_spot, disk, setup, run, mounts, bucket, mode = read_by_skypilot(
        tmp_path / "task.yaml", tmp_path
    )
    assert (name, nodes, cloud, accelerators, use_spot) == ("shallowflow-tiny-1-1", 1, "AWS", {"T4": 1}, spot)
    assert disk >= 60
    assert setup == f"cd ~/shallowflow && pip install ./{WHEEL}"
    wheel = mounts.pop(f"~/shallowflow/{WHEEL}")
    assert wheel == WHEEL and zipfile.is_zipfile(wheel)  # beside the task
    assert run == (
        "cd ~/shallowflow && sfplan train plan.json --data train.jsonl --output /shallowflow/run --resume "
        "--eval-data heldout.csv --data-format text"
    )
    assert mounts == {
        "~/shallowflow/plan.json": "plan.json",
        "~/shallowflow/train.jsonl": "train.jsonl",
        "~/shallowflow/heldout.csv": str(held),
    }
    assert (bucket, mode) == ("my-checkpoints", "MOUNT_CACHED")


@pytest.mark.skipif(not SKYPILOT.exists(), reason="SkyPilot's environment is made by `make setup`")
def test_several_machines_are_nodes(plan: Callable[..., Path], tiny_folder: Path, tmp_path: Path) -> None:
    """A plan for two machines is a task of two nodes, each of which starts its part of the processes."""
    done = sfplan(tiny_folder, *PINNED, "--gpus", 2, "--nodes", 2, "--stages", 1, "--sharding", "none", "--json")
    made = json.loads(done.output)
    path = plan(**{**made, "model_name": "org/Tiny-1.1"})
    assert sfplan("export", path, *TO, "--data", "train.jsonl", "--output", "task.yaml").code == 0

    _, nodes, _, accelerators, _, _, _, run, *_ = read_by_skypilot(tmp_path / "task.yaml", tmp_path)

    assert (nodes, accelerators) == (2, {"T4": 1})
    assert "torchrun --nnodes $SKYPILOT_NUM_NODES --nproc-per-node 1 " in run
    assert run.endswith(" -m shallowflow train plan.json --data train.jsonl --output /shallowflow/run --resume")


def test_every_command_of_the_help_runs(plan: Callable[..., Path]) -> None:
    """What its help shows works as it stands, and a file holds what would be printed."""
    plan()
    shown = re.findall(r"^ +sfplan (export plan.*)$", sfplan("export", "--help").output, re.MULTILINE)
    assert len(shown) == 5

    printed, written, stored, axolotl, trl = (sfplan(*shlex.split(words)) for words in shown)

    assert (printed.code, written.code, written.output, stored.code) == (0, 0, "", 0)
    kept = yaml.safe_load(printed.output)["file_mounts"][f"~/shallowflow/{WHEEL}"]
    assert printed.output.replace(kept, WHEEL) == Path("task.yaml").read_text(encoding="utf-8")
    assert Path(kept).read_bytes() == Path(WHEEL).read_bytes()
    assert (axolotl.code, trl.code) == (0, 0)
    assert yaml.safe_load(Path("axolotl.yaml").read_text(encoding="utf-8"))["base_model"] == "org/Tiny-1.1"
    compile(Path("train.py").read_text(encoding="utf-8"), "train.py", "exec")


def test_a_store_takes_the_place_of_the_bucket(plan: Callable[..., Path]) -> None:
    """Nothing is mounted then; the run stores its checkpoints itself, and has what it needs for that."""
    store = ("--to", "skypilot", "--store", "s3://my-checkpoints/my run", "--data", "train.jsonl")

    task = yaml.safe_load(sfplan("export", plan(), *store).output)

    mounted = ("plan.json", "train.jsonl", WHEEL)
    assert list(task["file_mounts"]) == [f"~/shallowflow/{name}" for name in mounted]
    assert task["setup"] == f"cd ~/shallowflow && pip install './{WHEEL}[aws]'"
    assert task["run"] == (
        "cd ~/shallowflow && sfplan train plan.json --data train.jsonl --output run "
        "--store 's3://my-checkpoints/my run' --resume"
    )


def test_a_plan_file_is_data(plan: Callable[..., Path]) -> None:
    """A model's name with commands in it is refused, and commands in other names stay names."""
    hostile = sfplan("export", plan(model_name="org/a\nrun: rm -rf /"), *TO, "--data", "train.jsonl")
    Path("x.j;reboot").write_text("text", encoding="utf-8")

    done = sfplan("export", plan(), *TO, "--data", "x.j;reboot", "--package", "x; reboot")

    assert hostile.code == 2 and "whose weights another machine would not find" in hostile.error()
    task = yaml.safe_load(done.output)
    assert task["run"].startswith("cd ~/shallowflow && sfplan train plan.json --data 'train.j;reboot' ")
    assert task["setup"] == "cd ~/shallowflow && pip install 'x; reboot'"


@pytest.mark.parametrize(("wanted", "asked"), [(1, 1), (2, 4), (4, 4), (8, 8)])
def test_machines_are_asked_for_as_there_are(
    plan: Callable[..., Path], tiny_folder: Path, wanted: int, asked: int
) -> None:
    """SkyPilot wants a machine with exactly so many GPUs, and no g4dn has two."""
    made = sfplan(tiny_folder, *PINNED, "--gpus", wanted, "--json")

    done = sfplan("export", plan(**{**json.loads(made.output), "model_name": "org/tiny"}), *TO, "--data", "train.jsonl")

    assert yaml.safe_load(done.output)["resources"]["accelerators"] == {"T4": asked}


def test_every_gpu_that_is_rented_has_a_name() -> None:
    """All GPUs that a shipped instance has can be asked for."""
    assert set(ACCELERATORS) == {name for name in gpu_names() if load_instances(name)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "missing.jsonl"), "file missing.jsonl does not exist; a task uploads files"),
        (("--data", "train.jsonl", "--bucket", "My_Bucket"), "'My_Bucket' is no name of a bucket; give 3 to 63"),
        (("--data", "train.jsonl", "--bucket", "192.168.1.10"), "'192.168.1.10' is no name of a bucket"),
        (("--data", "train.jsonl", "--bucket", "my..bucket"), "'my..bucket' is no name of a bucket"),
        (("--data", "train.jsonl", "--store", "s3://my-bucket/x"), "give either --bucket or --store"),
        (("--data", "train.jsonl", "--store", "/here"), "'/here' is no store; give one such as s3://bucket/prefix"),
        (("--data", "train.jsonl", "--eval-data", "empty.jsonl"), "empty.jsonl is empty; give it one JSON object"),
        (("--data", "train.jsonl", "--to", "slurm"), "'slurm' is not"),
    ],
)
def test_what_cannot_be_run_is_told(plan: Callable[..., Path], words: tuple[str, ...], told: str) -> None:
    """One line, exit code 2, and nothing written."""
    Path("empty.jsonl").touch()

    done = sfplan("export", plan(), *TO, *words, "--output", "task.yaml")

    assert done.code == 2
    assert told in done.error()
    assert not Path("task.yaml").exists()


@pytest.mark.parametrize("output", ["plan.json", "train.jsonl", "none/task.yaml"])
def test_nothing_that_is_uploaded_is_overwritten(plan: Callable[..., Path], output: str) -> None:
    """The plan and the data stay what they are, and a folder that is not there is told."""
    before = plan().read_text(encoding="utf-8")

    done = sfplan("export", "plan.json", *TO, "--data", "train.jsonl", "--output", output)

    assert done.code == 2
    assert "give another name" in done.error() or "folder none for --output does not exist" in done.error()
    assert Path("plan.json").read_text(encoding="utf-8") == before


def test_a_processor_is_not_rented(tiny_plan: str, data: Path, tmp_path: Path) -> None:
    """A plan for this CPU is refused."""
    (tmp_path / "plan.json").write_text(tiny_plan, encoding="utf-8")

    done = sfplan("export", tmp_path / "plan.json", *TO, "--data", data)

    assert done.code == 2
    assert "which no shipped instance has; plan for one, such as t4" in done.error()


def test_a_whole_models_checkpoints_need_a_larger_disk(plan: Callable[..., Path], tiny_folder: Path) -> None:
    """Two of twelve bytes a parameter, one that is being written, and the model; an adapter's are few."""
    made = sfplan(tiny_folder, "--gpu", "t4", "--sequence-length", 32, "--adapter", "full", "--json")
    disks = []
    for text in (made.output, plan().read_text(encoding="utf-8")):
        large = {**json.loads(text), "model_name": "org/tiny", "num_parameters": 10**9}
        Path("plan.json").write_text(json.dumps(large), encoding="utf-8")
        done = sfplan("export", "plan.json", *TO, "--data", "train.jsonl")
        disks.append(yaml.safe_load(done.output)["resources"]["disk_size"])

    assert disks == [104, 64]


def test_nothing_is_left_of_a_task_that_failed(plan: Callable[..., Path], tmp_path: Path) -> None:
    """Neither the wheel, nor a task whose data nobody could learn, nor one in the place of what it installs."""
    (tmp_path / "bad.jsonl").write_text('{"nope": 1}\n', encoding="utf-8")
    (tmp_path / "tasks").mkdir()

    for data, output in (("bad.jsonl", "tasks/task.yaml"), ("train.jsonl", "tasks"), ("train.jsonl", f"tasks/{WHEEL}")):
        done = sfplan("export", plan(), *TO, "--data", data, "--output", output)
        assert done.code == 2, done
        assert list((tmp_path / "tasks").iterdir()) == [] and not (tmp_path / WHEEL).exists()
