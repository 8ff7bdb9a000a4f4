"""The script of a machine, run for real with stand-ins for what only a machine has: it trains, saves, and is gone."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from shallowflow import launching, starting
from shallowflow.profiles import load_instance
from shallowflow.runtime import machine
from shallowflow.runtime.aws.s3 import S3Objects, place
from shallowflow.runtime.machine import Errand, ScriptError
from shallowflow.runtime.storage import Vault
from shallowflow.training import read_plan
from tests.aws import planted
from tests.front.shell import SMALL, sfplan

TOKEN = "hf_plantedTokenOfTheHub"
STAND_INS = {
    "shutdown": 'echo "shutdown $*" >>"$(dirname "$0")/../ended.txt"',
    "systemd-run": """while case $1 in --*) true ;; *) false ;; esac; do shift; done
"$@" &
echo $! >"$SHALLOWFLOW_PLACE/pid"
wait $!
echo $? >"$SHALLOWFLOW_PLACE/code"
""",
    "nvidia-smi": 'if [ -e "$SHALLOWFLOW_PLACE"/idle ]; then echo 0; else echo 7; fi',
    "python3": """mkdir -p venv/bin
printf '#!/bin/bash\\nexec @python@ "$@"\\n' >venv/bin/python
printf '#!/bin/bash\\necho "pip $*" >>pip.txt\\nexit ${PIP_CODE:-0}\\n' >venv/bin/pip
printf '#!/bin/bash\\n@sfplan@\\n' >venv/bin/sfplan
chmod +x venv/bin/*""",
}
"""A machine's programs. What pip would install is this project, so that ``sfplan`` is too."""
AS_SFPLAN = 'echo "token $HF_TOKEN" >../token.txt; exec @python@ -m shallowflow "$@" --weights @weights@'
STUBBORN = 'trap "echo asked >>../asked.txt; exit 3" TERM; touch begun; while true; do sleep 0.05; done'


@dataclass
class Machine:
    """A machine of which this one's processes are all that there is."""

    home: Path
    environment: dict[str, str]

    @property
    def place(self) -> Path:
        """The folder that it works in."""
        return self.home / "place"

    def start(self, script: str, **more: str) -> subprocess.Popen[bytes]:
        """Run the script as cloud-init does."""
        file = self.home / "script.sh"
        file.write_text(script, encoding="utf-8")
        return subprocess.Popen(["/bin/bash", file], env=self.environment | more, start_new_session=True)

    def run(self, script: str, **more: str) -> int:
        """The same, to its end."""
        process = self.start(script, **more)
        with ended(process):
            process.wait(120)
        return self.code

    @property
    def code(self) -> int:
        """How the work ended."""
        return int((self.place / "code").read_text(encoding="utf-8"))

    def stop(self) -> None:
        """Ask the work to end as systemd does with KillMode=mixed: its first process alone."""
        os.kill(int((self.place / "pid").read_text(encoding="utf-8")), signal.SIGTERM)

    @property
    def log(self) -> str:
        """What it wrote down."""
        return (self.place / "log.txt").read_text(encoding="utf-8")

    @property
    def shutdowns(self) -> list[str]:
        """How it was told to shut down."""
        return (self.home / "ended.txt").read_text(encoding="utf-8").splitlines()


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let nothing of it live on."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def made(tmp_path: Path, small_model: Path) -> Callable[..., Machine]:
    """A machine whose ``sfplan`` is this project's, or another script."""
    count = iter(range(9))

    def make(sfplan_script: str = AS_SFPLAN) -> Machine:
        home = tmp_path / f"machine-{next(count)}"
        (home / "bin").mkdir(parents=True)
        for name, script in STAND_INS.items():
            told = script.replace("@sfplan@", sfplan_script.replace("\\", "\\\\").replace("%", "%%"))
            told = told.replace("@python@", sys.executable).replace("@weights@", shlex.quote(str(small_model)))
            (home / "bin" / name).write_text(f"#!/bin/bash\n{told}\n", encoding="utf-8")
            (home / "bin" / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"SHALLOWFLOW_PLACE": str(home / "place"), "SHALLOWFLOW_MINUTE": "0.1"}
        return Machine(home, environment)

    return make


@pytest.fixture(scope="session")
def cpu_plan(small_model: Path) -> str:
    """A plan for the tiny model on this processor."""
    done = sfplan(small_model, *SMALL, "--global-batch-size", 4, "--json")
    assert done.code == 0, done.errors
    return done.output


@pytest.fixture
def launch(bucket: str, cpu_plan: str, tmp_path: Path) -> launching.Launch:
    """A run of that plan, as the command line would make it of one for a GPU."""
    plan, data = tmp_path / "plan.json", tmp_path / "train.jsonl"
    plan.write_text(cpu_plan, encoding="utf-8")
    data.write_text('{"text": "the cat sat on the mat and looked at the dog"}\n' * 12, encoding="utf-8")
    store = f"s3://{bucket}/runs/mine"
    instance = load_instance("g4dn.xlarge")
    price = instance.prices[0]
    return launching.Launch(
        plan=read_plan(plan),
        run="mine",
        store=store,
        place=place(store),
        files={"plan.json": plan, "train.jsonl": data},
        instance=instance,
        price=price,
        market="spot",
        usd_per_hour=0.2,
        expected=None,
        budget_usd=None,
        max_hours=5.0,
        idle_minutes=3,
        package="shallowflow[aws,data]==0.1.0",
        train=(),
        profile="trainer",
        image=None,
        subnet=None,
        token_parameter=None,
        resume=True,
    )


def words(launch: launching.Launch, *passed: str) -> tuple[str, ...]:
    """The command of a run with these options."""
    given = {"--data": "train.jsonl", "--output": launch.run, "--store": launch.store, "--usd-per-hour": 0.2}
    return launching.train_words(given, passed)


def uploaded(launch: launching.Launch) -> None:
    """Put what the machine fetches into the store."""
    starting.upload(S3Objects(launch.place), launch)


def until(found: Callable[[], Any], seconds: float = 90) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_machine_trains_saves_when_asked_and_another_goes_on(
    launch: launching.Launch, made: Callable[..., Machine], bucket: str
) -> None:
    """What sfplan stop does to a machine stores what was learned; the next, on an empty disk, ends the run."""
    name = f"/mine/{uuid.uuid4().hex}"
    boto3.client("ssm").put_parameter(Name=name, Value=TOKEN, Type="SecureString")
    launch = replace(launch, token_parameter=name, max_hours=50.0)
    uploaded(launch)
    endless = replace(launch, train=words(launch, "--steps", "1000000", "--save-every", "4"))
    first = made()

    process = first.start(starting.script(endless), SHALLOWFLOW_MINUTE="2")
    with ended(process):
        until(lambda: list(first.place.glob("mine/checkpoints/step-*")))
        first.stop()
        process.wait(60)

    assert first.code == 130 and first.shutdowns == ["shutdown -P +3040", "shutdown -P now"]
    assert "asked to end" in first.log and "exit code 130" in first.log
    vault = Vault.look(S3Objects(launch.place))
    assert vault.latest is not None
    steps = vault.latest.checkpoints[0].num_steps
    second = made()

    code = second.run(
        starting.script(replace(launch, train=words(launch, "--steps", str(steps + 2)))), SHALLOWFLOW_MINUTE="2"
    )

    assert code == 0 and f"resumed after step {steps}" in second.log
    assert second.shutdowns[-1] == "shutdown -P now" and "exit code 0" in second.log
    found = starting.stored(S3Objects(launch.place), launch)
    assert found is not None and found.why == f"run mine is over: completed after {steps + 2:,} steps"
    keys = [
        one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="runs/mine/logs/")["Contents"]
    ]
    logs = [boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    assert logs and all(b"the machine ends now" in log for log in logs)
    assert (second.home / "token.txt").read_text() == f"token {TOKEN}\n"
    assert planted.found_in([first.log, second.log, *logs]) == []
    assert not any(TOKEN in text for text in (first.log, second.log, starting.script(launch)))


@pytest.mark.parametrize(
    ("what", "told"), [("idle", "no GPU has worked for 3 minutes"), ("time", "6 minutes have passed")]
)
def test_a_machine_that_idles_or_takes_too_long_ends(
    launch: launching.Launch, made: Callable[..., Machine], what: str, told: str
) -> None:
    """The run is asked once, and then the machine goes, whatever it says."""
    uploaded(launch)
    limited = replace(launch, max_hours=6 / 60 if what == "time" else 5.0)
    box = made(STUBBORN)
    process = box.start(starting.script(limited))
    with ended(process):
        if what == "idle":
            until((box.place / "begun").exists)
            (box.place / "idle").touch()
        process.wait(60)

    assert box.code == 3 and told in box.log and box.shutdowns[-1] == "shutdown -P now"
    assert (box.home / "asked.txt").read_text() == "asked\n"


def test_what_cannot_be_installed_ends_the_machine(launch: launching.Launch, made: Callable[..., Machine]) -> None:
    """So does what is not what was uploaded, and what is not there; nothing is trained."""
    launch = replace(launch, train=words(launch))
    box = made()

    assert box.run(starting.script(launch), PIP_CODE="1") == 1
    assert box.shutdowns[-1] == "shutdown -P now" and not (box.place / "mine").exists()

    missing = made()
    assert missing.run(starting.script(launch)) == 1
    assert "404" in missing.log and missing.shutdowns[-1] == "shutdown -P now"

    uploaded(launch)
    key = f"{launch.place.prefix}{starting.folder(launch)}train.jsonl"
    boto3.client("s3").put_object(Bucket=launch.place.bucket, Key=key, Body=b"something else")
    damaged = made()
    assert damaged.run(starting.script(launch)) == 1
    assert "train.jsonl is not what was uploaded" in damaged.log and damaged.shutdowns[-1] == "shutdown -P now"


def test_pip_gets_the_wheel_and_the_extras(
    launch: launching.Launch, made: Callable[..., Machine], tmp_path: Path
) -> None:
    """Of the store, by its own name."""
    wheel = tmp_path / "shallowflow-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    package, files = launching.packed(str(wheel), "aws", "data")
    launch = replace(launch, package=package, files={**launch.files, **files}, train=("--version",))
    uploaded(launch)
    box = made("exit 0")

    assert box.run(starting.script(launch)) == 0
    lines = (box.place / "pip.txt").read_text().splitlines()
    assert lines == ["pip install --quiet boto3", f"pip install --quiet ./{wheel.name}[aws,data]"]
    assert (box.place / wheel.name).read_bytes() == b"wheel"


def errand(**changes: Any) -> Errand:
    """A small one."""
    plain = {"region": "r", "bucket": "b", "prefix": "p/", "files": {}, "package": "x", "train": ("train",)}
    return Errand(**{**plain, "max_hours": 1.0, "idle_minutes": 5, **changes})


def test_what_is_given_stays_what_it_is() -> None:
    """Words are words, and never a part of the script."""
    hostile = "'; touch pwned; $(reboot) @folder@ `id`"
    script = machine.script(errand(train=("train", "--sample", hostile), package=hostile, region=hostile))

    line = next(line for line in script.splitlines() if line.startswith("venv/bin/sfplan"))
    assert shlex.split(line)[1:4] == ["train", "--sample", hostile]
    assert f"install --quiet {shlex.quote(hostile)} ||" in script
    done = subprocess.run(["/bin/bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_that_is_too_long_is_refused() -> None:
    """In a line, for EC2 would do so too."""
    with pytest.raises(ScriptError, match=r"the machine's script has 2\d,\d{3} bytes, EC2 takes 16,384"):
        machine.script(errand(train=("train", "x" * 20_000)))
    assert json.dumps(machine.script(errand()))
