"""The policies in the documents let each role do what the code asks for, and nothing else."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from shallowflow.runtime.aws import s3
from shallowflow.runtime.aws.bills import billed
from shallowflow.runtime.aws.cloudwatch import CloudWatch
from shallowflow.runtime.aws.s3 import S3Objects, place
from shallowflow.runtime.storage import StoreError, Vault
from tests.aws import calls, pricing, rented
from tests.aws.rented import PROFILE, Asked
from tests.front.shell import sfplan
from tests.front.tree import ROOT

AWS = ROOT / "docs" / "aws.md"
IN_A_BUCKET = {"s3:GetObject", "s3:ListBucket"}
"""For an object that may be missing: without the second S3 does not say that it is."""
ACTIONS = {
    ("ec2", "run_instances"): {"ec2:RunInstances", "ec2:CreateTags", "iam:PassRole"},
    ("s3", "get_object"): IN_A_BUCKET,
    ("s3", "head_object"): IN_A_BUCKET,
    ("s3", "create_multipart_upload"): {"s3:PutObject"},
    ("s3", "upload_part"): {"s3:PutObject"},
    ("s3", "complete_multipart_upload"): {"s3:PutObject"},
    ("s3", "list_objects_v2"): {"s3:ListBucket"},
    ("s3", "list_multipart_uploads"): {"s3:ListBucketMultipartUploads"},
    ("s3", "delete_objects"): {"s3:DeleteObject"},
}
"""What a call needs, by the Service Authorization Reference; others need the action of their own name."""


def actions(asked: list[Asked]) -> set[str]:
    """What the calls need."""
    found: set[str] = set()
    for one in asked:
        own = f"{one.service}:{''.join(word.capitalize() for word in one.operation.split('_'))}"
        found |= ACTIONS.get((one.service, one.operation), {own})
    return found


def policy(role: str) -> Any:
    """The policy below a heading of the document."""
    text = AWS.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^### Policy of {role}\n\n```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return json.loads(found)


def allowed(role: str) -> set[str]:
    """The actions that it allows."""
    given = [one["Action"] for one in policy(role)["Statement"] if one["Effect"] == "Allow"]
    return {action for some in given for action in ([some] if isinstance(some, str) else some)}


@pytest.fixture
def plan(t4_plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan, and data that goes to S3 in parts, in the folder that commands then run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(s3, "PART_BYTES", 16_384)
    Path("plan.json").write_text(t4_plan, encoding="utf-8")
    Path("train.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 2000, encoding="utf-8")
    return Path("plan.json")


@contextlib.contextmanager
def failing(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no upload in parts end."""
    ask = S3Objects._ask

    def refused(self: S3Objects, name: str, *more: Any, **arguments: Any) -> Any:
        if name == "complete_multipart_upload":
            raise StoreError("planted")
        return ask(self, name, *more, **arguments)

    with patch.context() as context:
        context.setattr(S3Objects, "_ask", refused)
        yield


def test_who_launches(plan: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch, one into a subnet, one that fails, runs, a stop and a bill take just that policy."""
    rented.prepare()
    subnet = boto3.client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]
    words = ("launch", plan, "--data", "train.jsonl", "--instance-profile", PROFILE, "--yes", "--store")
    with calls.noted() as asked:
        with failing(monkeypatch):
            assert sfplan(*words, f"s3://{bucket}/policy-0").code == 2
        done = [
            sfplan(*words, f"s3://{bucket}/policy-1"),
            sfplan(*words, f"s3://{bucket}/policy-2", "--subnet", subnet),
        ]
        done += [sfplan("runs"), *(sfplan("stop", f"policy-{number}", "--yes") for number in (1, 2))]
        billed("shallowflow-run", "policy-1", datetime.date(2026, 1, 1), datetime.date(2026, 1, 1))

    assert [one.code for one in done] == [0] * 5, [one.errors for one in done]
    assert actions(asked) == allowed("who launches")


def test_the_machine(plan: Path, bucket: str, tmp_path: Path) -> None:
    """Fetching what it is given, its log and its token, a run's whole store and its figures take just that policy."""
    words: tuple[object, ...] = ("launch", plan, "--data", "train.jsonl", "--store", f"s3://{bucket}/policy")
    words = (*words, "--instance-profile", PROFILE, "--hf-token-parameter", "/shallowflow/hf")
    rented.prepare()
    started = json.loads(sfplan(*words, "--yes", "--json").output)
    script = json.loads(sfplan(*words, "--dry-run", "--json").output)
    text = script["calls"][-1]["parameters"]["UserData"]
    (tmp_path / "objects.py").write_text(re.findall(r"<<'END-OF-FILE'\n(.*?)END-OF-FILE", text, re.DOTALL)[0])
    (tmp_path / "log.txt").write_text("said")
    boto3.client("ssm").put_parameter(Name="/shallowflow/hf", Value="x", Type="SecureString", Overwrite=True)
    prefix = place(f"s3://{bucket}/policy")
    boto3.client("s3").create_multipart_upload(Bucket=bucket, Key=f"{prefix.prefix}left")
    with calls.noted() as asked:
        for line in (("get", "plan.json", "train.jsonl"), ("log", "now"), ("token", "/shallowflow/hf")):
            objects(tmp_path / "objects.py", *line)
        work(S3Objects(prefix), tmp_path)

    sfplan("stop", started["run"], "--yes")
    assert actions(asked) == allowed("the machine")


def objects(file: Path, *words: str) -> None:
    """Run the machine's own program."""
    before = sys.argv
    sys.argv = [str(file), *words]
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = before


def work(store: S3Objects, folder: Path) -> None:
    """All that a run does with its store, and with CloudWatch."""
    (folder / "kept").mkdir()
    (folder / "kept" / "large").write_bytes(bytes(40_000))
    vault = Vault.look(store)
    vault.claim({"plan": "x"})
    for number in range(1, 5):
        vault.save(folder / "kept", number)
    vault.keep_results(folder / "kept", 4)
    nothing: Callable[[Path], str | None] = lambda _path: None  # noqa: E731
    assert Vault.look(store).fetch(folder / "here", 0, nothing) == []
    figures = CloudWatch("policy")
    figures._put("Loss", 1.0, "None")
    figures.finish()
    assert figures.news() == []


def test_who_asks_for_prices(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking prices takes just that policy."""
    monkeypatch.setenv("SHALLOWFLOW_DATA", str(tmp_path))
    with pricing.serving(endpoint) as market, calls.noted() as asked:
        market.sells("g4dn.xlarge", "us-east-1", 0.5)
        for service in ("PRICING", "EC2"):
            monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", market.endpoint)
        assert sfplan("prices", "--update", "--region", "us-east-1").code == 0

    assert actions(asked) == allowed("who asks for prices")


@pytest.mark.parametrize("role", ["who launches", "the machine", "who asks for prices"])
def test_policies_are_narrow(role: str) -> None:
    """No action is a pattern; everything is done only to what is named, but for what knows no names."""
    for statement in policy(role)["Statement"]:
        given = statement["Action"]
        names = [given] if isinstance(given, str) else given
        assert not any("*" in name for name in names)
        looks = all(re.match(r"(ec2:Describe|ce:Get|pricing:Get|cloudwatch:Put)", name) for name in names)
        assert (statement["Resource"] == "*") <= looks
    if role == "who launches":
        conditions = {one["Sid"]: one.get("Condition", {}) for one in policy(role)["Statement"]}
        assert conditions["StartOnlyWhatIsTaggedAndSafe"]["StringEquals"] == {"ec2:MetadataHttpTokens": "required"}
        assert conditions["EndOnlyWhatIsTagged"] == {"Null": {"aws:ResourceTag/shallowflow-run": "false"}}
        assert conditions["GiveTheMachineItsRole"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
