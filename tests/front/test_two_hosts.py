"""Two hosts, which are network namespaces here, run the line that ``sfplan train --nodes`` prints, and meet."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.front.shell import SMALL, sfplan
from tests.front.test_processes import children, rank_of

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def _ip(*words: str) -> str | None:
    """Run ``ip``; what it says against it, None if nothing."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    return done.stderr.strip() or "it failed" if done.returncode else None


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces with a cable between them, over which alone they reach each other."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip, of iproute2")
    names = [f"sfplan{os.getpid()}{letter}" for letter in "ab"]
    with contextlib.ExitStack() as stack:
        for name in names:
            refusal = _ip("netns", "add", name)
            if refusal is not None:
                pytest.skip(f"no network namespaces may be made here: {refusal}")
            stack.callback(_ip, "netns", "delete", name)
        first, second = names
        cable = ["link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
        refusal = _ip(*cable)
        if refusal is not None:
            pytest.skip(f"no network may be made here: {refusal}")
        for name, address in zip(names, ADDRESSES, strict=True):
            assert _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable") is None
            assert _ip("-n", name, "link", "set", "cable", "up") is None
            assert _ip("-n", name, "link", "set", "lo", "up") is None
        yield names


@pytest.fixture(scope="module")
def plan(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for the tiny model in two stages."""
    path = tmp_path_factory.mktemp("plans") / "stages.json"
    done = sfplan(tiny_folder, *SMALL, "--global-batch-size", 4, "--gpus", 2, "--stages", 2, "--output", path)
    assert done.code == 0, done.errors
    return path


@contextlib.contextmanager
def started(hosts: Sequence[str], words: Sequence[object]) -> Iterator[list[subprocess.Popen[str]]]:
    """On each of the *hosts* the line that the command of *words* tells to run there."""
    told = sfplan(*words, "--nodes", len(hosts))
    assert told.code == 0, told.errors
    (line,) = [line for line in told.output.splitlines() if line.startswith("torchrun ")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    with contextlib.ExitStack() as stack:
        running = []
        for number, host in enumerate(hosts):
            _, *rest = shlex.split(line.replace("NUMBER", str(number)).replace("ADDRESS", ADDRESSES[0]))
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *rest]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            running.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield running


def losses(output: Path) -> list[float]:
    """Of every step of the run in *output*."""
    return [step["loss"] for step in json.loads((output / "run.json").read_text())["steps"]]


def test_two_hosts_train_what_one_process_does(
    hosts: list[str], plan: Path, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Each holds a stage; activations, gradients and votes go over the cable, and the first host alone writes."""
    alone = tmp_path / "alone.json"
    assert sfplan(tiny_folder, *SMALL, "--global-batch-size", 4, "--output", alone).code == 0
    asked = ("--data", data, "--weights", tiny_folder, "--steps", 3)
    assert sfplan("train", alone, *asked, "--output", tmp_path / "one").code == 0

    with started(hosts, ("train", plan, *asked, "--output", tmp_path / "two")) as running:
        ended = [process.communicate(timeout=120) for process in running]

    assert [process.returncode for process in running] == [0, 0], ended
    assert "completed" in ended[0][0] and ended[1][0] == ""
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)


def test_a_host_that_loses_its_process_ends_the_run_of_both(
    hosts: list[str], plan: Path, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Within a minute, with a word on how to go on; with another number of machines, too."""
    output = tmp_path / "run"
    words = ("train", plan, "--data", data, "--weights", tiny_folder, "--output", output, "--save-every", 1)

    with started(hosts, (*words, "--steps", 1_000_000)) as running:
        while all(process.poll() is None for process in running) and not list((output / "checkpoints").glob("step-*")):
            time.sleep(0.1)
        (second,) = [pid for pid in children(running[1].pid) if rank_of(pid) == "RANK=1"]
        os.kill(second, signal.SIGKILL)
        ended = [process.communicate(timeout=60) for process in running]

    assert all(process.returncode for process in running)
    assert "another process of the run was lost after step " in ended[0][1]
    assert "go on with the same command and --resume" in ended[0][1]
    assert "rank      : 1 " in ended[1][1] and "Signal 9 (SIGKILL)" in ended[1][1]
    done = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    again = sfplan(*words, "--steps", done + 2, "--resume")
    assert again.code == 0, again.errors
    assert len(losses(output)) == done + 2
