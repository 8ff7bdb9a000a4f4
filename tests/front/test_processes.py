"""``sfplan train`` starts a process for each GPU of a plan, and tells what becomes of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from shallowflow.runtime import launch
from shallowflow.runtime.request import RunFailed
from tests.front.shell import PROGRESS, SMALL, sfplan


@pytest.fixture(scope="module")
def plan_for_two(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the tiny model on two CPUs."""
    path = tmp_path_factory.mktemp("plans") / "two.json"
    done = sfplan(tiny_folder, *SMALL, "--global-batch-size", 4, "--gpus", 2, "--output", path)
    assert done.code == 0, done.errors
    return path


def rank_of(pid: int) -> str:
    """What a launcher told the process *pid* that it is."""
    told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((word.decode() for word in told if word.startswith(b"RANK=")), "")


def children(pid: int) -> list[int]:
    """The processes that *pid* has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("stages", [1, 2])
def test_a_killed_process_ends_the_run_with_one_line(
    stages: int, plan_for_two: Path, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The line names the rank and says how to go on; the exit code is that of a run that had to end."""
    plan = plan_for_two
    if stages > 1:
        plan = tmp_path / "stages.json"
        made = sfplan(
            *(tiny_folder, *SMALL, "--global-batch-size", 4, "--gpus", 2, "--stages", stages, "--output", plan)
        )
        assert made.code == 0, made.errors
    words = ["train", plan, "--data", data, "--weights", tiny_folder, "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "shallowflow", *map(str, words), "--steps", "1000000", "--save-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        while running.poll() is None and not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            time.sleep(0.1)
        (second,) = [pid for pid in children(running.pid) if rank_of(pid) == "RANK=1"]
        os.kill(second, signal.SIGKILL)
        output, errors = running.communicate(timeout=60)

    assert (running.returncode, output) == (1, "")
    told = [line for line in PROGRESS.sub("", errors).splitlines() if not line.startswith("step ")]
    assert len(told) == 1, errors
    (line,) = told
    (newest,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    num_steps = int(newest.name.removeprefix("step-"))
    assert line.startswith("Error: rank 1 was killed by SIGKILL; ")
    assert line.endswith(f"saved in {newest}; go on with the same command and --resume")
    assert f"; {num_steps} step" in line


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 2, 1: 2}, 2),
        ({1: 2, 0: 2}, 2),
        ({0: 130, 1: 130}, 130),
        ({0: 1, 1: -15}, 1),
        ({0: 2, 1: 3}, 2),
    ],
)
def test_what_the_first_process_tells_is_the_end(codes: Mapping[int, int], expected: int, tmp_path: Path) -> None:
    """Where it could say why, its exit code is the command's and nothing is added."""
    assert launch._judged(codes, tmp_path) == expected


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ({0: 3, 1: -9}, "rank 1 was killed by SIGKILL"),
        ({1: -11, 0: 3, 2: -15}, "rank 1 was killed by SIGSEGV"),
        ({0: -9, 1: 3}, "rank 0 was killed by SIGKILL"),
        ({0: 3, 1: 1}, "rank 1 ended with exit code 1"),
        ({0: 3, 1: 3}, "rank 0 ended with exit code 3"),
    ],
)
def test_the_process_that_ended_first_is_named(codes: Mapping[int, int], told: str, tmp_path: Path) -> None:
    """Those that were stopped because of it are not."""
    with pytest.raises(RunFailed) as caught:
        launch._judged(codes, tmp_path)

    assert str(caught.value).startswith(f"{told}; nothing was saved; ")


def test_several_machines_are_told_what_to_run(plan_for_two: Path, data: Path) -> None:
    """One line that torchrun understands, with all that was asked for but the number of machines."""
    asked = [
        "train",
        plan_for_two,
        "--data",
        data,
        "--output",
        "it's new",
        "--sample",
        "a b",
        "--sample",
        "-c",
        "--resume",
    ]

    done = sfplan(*asked, "--nodes", 2)

    assert done.code == 0
    (line,) = [line for line in done.output.splitlines() if line.startswith("torchrun ")]
    words = shlex.split(line)
    assert words[1:5] == ["--nnodes", "2", "--nproc-per-node", "1"]
    expected = [f"--data={data}", "--output=it's new", "--resume", "--sample=a b", "--sample=-c"]
    assert words[words.index("-m") :] == ["-m", "shallowflow", "train", str(plan_for_two), *expected]
    assert not Path("it's new").exists()


def test_what_machines_run_is_json_too(plan_for_two: Path, data: Path) -> None:
    """The same line, for a program."""
    asked = ("train", plan_for_two, "--data", data, "--output", "run", "--nodes", 2)

    told = json.loads(sfplan(*asked, "--json").output)

    assert told["nodes"] == 2
    assert told["run_on_each"].removesuffix(" --json") in sfplan(*asked).output


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_machines_that_cannot_share_are_told(
    plan_for_two: Path, data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Two GPUs on three machines are refused, before weights are looked for."""
    done = sfplan("train", plan_for_two, "--data", data, "--output", tmp_path / "run", "--nodes", 3, *more)

    assert done.code == 2
    assert done.error() == "2 GPUs cannot be shared out over --nodes 3; give a number that divides 2"


def test_another_number_of_processes_is_told(
    plan_for_two: Path, data: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that a launcher started does not start others, and says how many are wanted."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    done = sfplan("train", plan_for_two, "--data", data, "--weights", tiny_folder, "--output", tmp_path / "run")

    assert done.code == 2
    assert done.error().startswith("the plan is for 2 GPUs and this is one process; start it with sfplan train or ")
    assert json.loads(plan_for_two.read_text())["configuration"]["num_gpus"] == 2


def test_a_launchers_nonsense_is_told(
    plan_for_two: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that is no launcher's is one line."""
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")

    done = sfplan("train", plan_for_two, "--data", data, "--output", tmp_path / "run")

    assert done.code == 2
    assert done.errors.startswith("Error: cannot join the other processes: ") and "'first'" in done.errors
