"""``sfplan launch``, ``runs`` and ``stop``: what is started is what was shown, once, safely, and with no secret."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from shallowflow.runtime.aws.instances import GROUP, STORE_TAG
from shallowflow.runtime.aws.s3 import S3Objects, place
from shallowflow.runtime.storage import Vault
from tests.aws import calls, rented
from tests.aws.rented import PROFILE
from tests.front.schemas import held
from tests.front.shell import Done, sfplan


def started(done: Done, region: str = "us-east-1") -> Any:
    """What EC2 says of the instance that was started."""
    assert done.code == 0, done.errors
    return rented.instance(held("launch", done.output)["instance_id"], region)


def test_nothing_is_started_without_yes(launch: Callable[..., Done], run: str) -> None:
    """One line with what it would cost, and no call at all; a rehearsal makes none either."""
    with calls.noted() as asked:
        refused, rehearsed = launch(), launch("--dry-run")
        as_json = launch("--dry-run", "--json")

    assert refused.code == 2
    assert re.fullmatch(
        r"nothing was started: g4dn\.xlarge in us-east-1, spot, is \$\S+ expected, \$\S+ nine of ten times, "
        r"\$\S+ at most; --yes starts it, --dry-run shows every call",
        refused.error(),
    )
    assert rehearsed.code == as_json.code == 0
    assert rehearsed.output.startswith(
        f"{run}: org/Tiny-1.1 on g4dn.xlarge in us-east-1, spot, $0.20 an hour\nexpected "
    )
    assert rehearsed.output.endswith("\nnothing was started, and AWS was asked nothing\n")
    assert "#!/bin/bash" in rehearsed.output and "ec2 run_instances" in rehearsed.output
    assert asked == []


@pytest.mark.parametrize("words", [("--on-demand",), ("--spot", "--image", "image"), ("--subnet", "subnet")])
def test_what_is_shown_is_what_is_asked(launch: Callable[..., Done], image: str, words: tuple[str, ...]) -> None:
    """Call after call, with the same parameters, but for what only AWS can tell."""
    subnet = boto3.client("ec2").describe_subnets()["Subnets"][0]
    given = [{"image": image, "subnet": subnet["SubnetId"]}.get(word, word) for word in words]
    remove_group()
    shown = json.loads(launch("--dry-run", "--json", *given).output)["calls"]
    with calls.noted() as asked:
        done = launch("--yes", "--json", *given)

    group = boto3.client("ec2").describe_security_groups(GroupNames=[GROUP])["SecurityGroups"][0]
    stand_ins = {"ami-newest": image, "sg-new": group["GroupId"], "/dev/sda1": root_of(image)}
    stand_ins |= {"vpc-default": group["VpcId"], "vpc-of-the-subnet": group["VpcId"]}
    assert [(call["service"], call["operation"]) for call in shown] == [(one.service, one.operation) for one in asked]
    for call, one in zip(shown, asked, strict=True):
        text = json.dumps(call["parameters"])
        for stand_in, real in stand_ins.items():
            text = text.replace(f'"{stand_in}"', f'"{real}"')
        wanted = json.loads(text)
        if call["service"] == "s3":
            assert {name: one.parameters[name] for name in ("Bucket", "Key")} == {
                n: wanted[n] for n in ("Bucket", "Key")
            }
        else:
            assert rented.plain(one.parameters) == wanted
    assert started(done)["SubnetId"] == (given[1] if words[0] == "--subnet" else started(done)["SubnetId"])


def root_of(image: str) -> str:
    """The image's root device."""
    return str(boto3.client("ec2").describe_images(ImageIds=[image])["Images"][0]["RootDeviceName"])


def remove_group() -> None:
    """Let there be no group of ours, nor what uses it."""
    client = boto3.client("ec2")
    for group in client.describe_security_groups(Filters=[{"Name": "group-name", "Values": [GROUP]}])["SecurityGroups"]:
        used = client.describe_instances(Filters=[{"Name": "instance.group-id", "Values": [group["GroupId"]]}])
        assert [
            one for many in used["Reservations"] for one in many["Instances"] if one["State"]["Name"] == "running"
        ] == []
        client.delete_security_group(GroupId=group["GroupId"])


def test_an_instance_is_as_it_should_be(launch: Callable[..., Done], image: str, run: str, bucket: str) -> None:
    """Nobody gets in, its metadata takes a token, its disk is encrypted, it ends for good, and its run is known."""
    with calls.noted() as asked:
        told = started(launch("--yes", "--json"))

    (wanted,) = (one.parameters for one in asked if one.operation == "run_instances")
    assert wanted["MetadataOptions"] == {
        "HttpEndpoint": "enabled",
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
    }
    assert wanted["InstanceInitiatedShutdownBehavior"] == "terminate"
    (disk,) = wanted["BlockDeviceMappings"]
    assert disk["DeviceName"] == root_of(image)
    assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"] and disk["Ebs"]["VolumeType"] == "gp3"
    assert disk["Ebs"]["VolumeSize"] >= 60
    assert "KeyName" not in wanted
    assert (told["InstanceType"], told["ImageId"], told["InstanceLifecycle"]) == ("g4dn.xlarge", image, "spot")
    assert told["IamInstanceProfile"]["Arn"].endswith(f"/{PROFILE}")
    assert rented.tags(told) == {
        "Name": f"shallowflow {run}",
        "shallowflow-run": run,
        STORE_TAG: f"s3://{bucket}/runs/{run}/",
    }
    (group,) = told["SecurityGroups"]
    found = boto3.client("ec2").describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"][0]
    assert (found["GroupName"], found["IpPermissions"]) == (GROUP, [])


def test_a_group_that_lets_somebody_in_is_refused(launch: Callable[..., Done]) -> None:
    """And nothing is started; without the rule the same group is used again."""
    first = started(launch("--yes", "--json"))
    group = first["SecurityGroups"][0]["GroupId"]
    client = boto3.client("ec2")
    rule = [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
    client.authorize_security_group_ingress(GroupId=group, IpPermissions=rule)

    refused = launch("--yes", "--name", "another")
    client.revoke_security_group_ingress(GroupId=group, IpPermissions=rule)
    second = started(launch("--yes", "--json", "--name", "another"))

    assert refused.code == 2 and "lets somebody in" in refused.error()
    assert second["SecurityGroups"] == first["SecurityGroups"]


def test_the_machine_is_given_what_it_runs(launch: Callable[..., Done], run: str, bucket: str, tmp_path: Path) -> None:
    """Plan, data and a wheel lie in the store as they are here; the command resumes, meters, and keeps the budget."""
    Path("held.jsonl").write_text('{"text": "a dog"}\n', encoding="utf-8")
    Path("shallowflow-9-py3-none-any.whl").write_bytes(b"a wheel" * 1000)
    given = ("--eval-data", "held.jsonl", "--package", "shallowflow-9-py3-none-any.whl", "--budget-usd", 3)
    more = ("--hf-token-parameter", "/mine/token", "--idle-minutes", 7, "--max-hours", 2, "--data-format", "text")

    done = launch("--yes", "--json", *given, *more, "--", "--steps", 9, "--sample", "What's up?")

    script = rented.script_of(json.loads(done.output)["instance_id"])
    line = next(line for line in script.splitlines() if line.startswith("venv/bin/sfplan train"))
    assert shlex.split(line)[1:] == [
        *("train", "plan.json", "--data", "train.jsonl", "--eval-data", "heldout.jsonl", "--data-format", "text"),
        *("--output", run, "--store", f"s3://{bucket}/runs/{run}/", "--usd-per-hour", "0.202", "--budget-usd", "3.0"),
        *("--steps", "9", "--sample", "What's up?", "--resume", "&"),
    ]
    assert "objects.py token /mine/token" in script and "HF_TOKEN" in script
    assert "pip install --quiet './shallowflow-9-py3-none-any.whl[aws,data]'" in script
    assert '"$idle" -ge 7' in script and '"$passed" -ge 120' in script and "shutdown -P +160" in script
    keys = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"runs/{run}/launch/")["Contents"]
    stored = {
        one["Key"].rpartition("/")[2]: boto3.client("s3").get_object(Bucket=bucket, Key=one["Key"])["Body"].read()
        for one in keys
    }
    assert stored == {
        "plan.json": Path("plan.json").read_bytes(),
        "train.jsonl": Path("train.jsonl").read_bytes(),
        "heldout.jsonl": Path("held.jsonl").read_bytes(),
        "shallowflow-9-py3-none-any.whl": b"a wheel" * 1000,
    }


def test_a_run_has_one_machine(launch: Callable[..., Done], run: str) -> None:
    """A second one is refused; --resume has nothing to do, and says so, as often as it is asked."""
    first = started(launch("--yes", "--json"))["InstanceId"]

    refused, again, told = launch("--yes"), launch("--yes", "--resume"), launch("--yes", "--resume", "--json")

    assert refused.code == 2 and f"run {run} has an instance already, {first}, which is running" in refused.error()
    assert again.code == 0 and again.output.endswith(f"{first}, which is running; nothing was started\n")
    told_of = held("launch", told.output)
    assert (told_of["started"], told_of["instance_id"]) == (False, first)
    assert sfplan("stop", run, *rented.ON, "--yes").code == 0
    assert started(launch("--yes", "--json"))["InstanceId"] != first


def write(store: str, run: str, outcome: str | None, folder: Path) -> Vault:
    """A store with a checkpoint, and results where there is an outcome."""
    (folder / "kept").mkdir()
    (folder / "kept" / "run.json").write_text(json.dumps({"outcome": outcome}))
    vault = Vault.look(S3Objects(place(store)))
    vault.claim({"plan": run})
    vault.save(folder / "kept", 1200)
    if outcome is not None:
        vault.keep_results(folder / "kept", 1234)
    return vault


@pytest.mark.parametrize(("outcome", "is_over"), [(None, False), ("interrupted", False), ("completed", True)])
def test_a_store_that_holds_a_run(
    launch: Callable[..., Done], run: str, bucket: str, tmp_path: Path, outcome: str | None, is_over: bool
) -> None:
    """Is gone on with only if it is said so, and not where the run is over."""
    write(f"s3://{bucket}/runs/{run}", run, outcome, tmp_path)

    refused, resumed = launch("--yes"), launch("--yes", "--resume", "--json")

    assert refused.code == 2 and "the store holds a run; go on with it by --resume" in refused.error()
    told = held("launch", resumed.output)
    assert told["started"] is not is_over
    assert told.get("why") == (f"run {run} is over: completed after 1,234 steps" if is_over else None)


# Runs and stops


def test_runs_are_listed(launch: Callable[..., Done], run: str, bucket: str, tmp_path: Path) -> None:
    """Everywhere, with what they have cost and what is stored; those without the tag are none."""
    boto3.client("ec2").run_instances(ImageId=rented.prepare(), MinCount=1, MaxCount=1, InstanceType="g4dn.xlarge")
    first = started(launch("--yes", "--json"))
    rented.prepare("eu-west-1")
    other = started(launch("--yes", "--json", "--name", "z-other", "--region", "eu-west-1", "--on-demand"), "eu-west-1")
    write(f"s3://{bucket}/runs/{run}", run, "completed", tmp_path)

    told, shown = held("runs", sfplan("runs", "--json").output), sfplan("runs").output.splitlines()

    assert [(one["run"], one["region"], one["market"], one["instance_id"]) for one in told] == [
        ("z-other", "eu-west-1", "on demand", other["InstanceId"]),
        (run, "us-east-1", "spot", first["InstanceId"]),
    ]
    mine = next(one for one in told if one["run"] == run)
    assert (mine["instance_id"], mine["state"], mine["num_steps"]) == (first["InstanceId"], "running", 1200)
    assert mine["has_results"] and 0 <= mine["usd"] == pytest.approx(mine["hours"] * 0.202)
    assert shown[0].split() == ["run", "state", "age", "dollars", "in", "the", "store"]
    assert f"  {first['InstanceId']}, g4dn.xlarge in us-east-1, spot" in shown
    assert shown[-1].startswith("dollars by prices of: ")


def test_runs_where_there_are_none(image: str) -> None:
    """Is said, and no list in JSON is one."""
    assert sfplan("runs", *rented.ON).output == "no instance was launched in 1 region\n"
    assert json.loads(sfplan("runs", *rented.ON, "--json").output) == []


def test_a_run_is_stopped(launch: Callable[..., Done], run: str) -> None:
    """Only with --yes; all of its instances, and no other's."""
    first = started(launch("--yes", "--json"))["InstanceId"]
    other = started(launch("--yes", "--json", "--name", f"{run}-2"))["InstanceId"]

    asked, unknown = sfplan("stop", run, *rented.ON), sfplan("stop", "nobody", *rented.ON)
    assert asked.code == 2 and f"nothing was stopped: this ends {first} in us-east-1; --yes does it" in asked.error()
    assert unknown.code == 2 and "run 'nobody' has no instance" in unknown.error()
    assert rented.instance(first)["State"]["Name"] == "running"
    done = sfplan("stop", run, *rented.ON, "--yes")
    assert done.output == f"{run}: {first} in us-east-1 saves, stores and ends, within about two minutes\n"
    assert (rented.instance(first)["State"]["Name"], rented.instance(other)["State"]["Name"]) == (
        "terminated",
        "running",
    )
    ended = next(one for one in json.loads(sfplan("runs", *rented.ON, "--json").output) if one["run"] == run)
    assert ended["state"] == "terminated" and ended["hours"] is not None
    stopped = held("stop", sfplan("stop", f"{run}-2", *rented.ON, "--yes", "--json").output)
    assert stopped == {"run": f"{run}-2", "stopped": [{"instance_id": other, "region": "us-east-1"}]}


def test_every_command_of_the_help_runs(launch: Callable[..., Done], image: str) -> None:
    """What is shown works as it stands, in its order."""
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    shown = [
        re.findall(r"^ +sfplan (.*)$", sfplan(command, "--help").output, re.MULTILINE)
        for command in ("launch", "runs", "stop")
    ]
    lines = [" ".join(line.split()) for several in shown for line in several]
    assert len(lines) == 6

    for line in lines:
        done = sfplan(*shlex.split(line))
        assert done.code == 0, (line, done.errors)


def test_json_is_whole(launch: Callable[..., Done]) -> None:
    """What a program needs is there."""
    told = held("launch", launch("--dry-run", "--json", "--max-hours", 3).output)

    assert told["max_hours"] == 3 and told["most_usd"] == pytest.approx(3 * told["usd_per_hour"])
    assert told["expected"]["usd"] > 0 and told["price_date"] and told["price_source"]
    user_data = told["calls"][-1]["parameters"]["UserData"]
    assert user_data.startswith("#!/bin/bash") and len(user_data) < 16_384
