"""Every command that the document on AWS shows is run, in order, and prints what is shown."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from shallowflow.profiles.load import shipped_instances
from tests.aws import pricing, rented
from tests.front.shell import sfplan
from tests.front.test_readme import plain, shown, vague
from tests.front.tree import ROOT

AWS = ROOT / "docs" / "aws.md"
INSTANCE = re.compile(r"\bi-[0-9a-f]{17}\b")


@pytest.fixture
def place(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, an account and a market in which the document's commands can run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHALLOWFLOW_DATA", str(tmp_path / "data"))
    Path("train.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 4, encoding="utf-8")
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    rented.prepare()
    with pricing.serving(endpoint) as market:
        for service in ("PRICING", "EC2"):
            monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", market.endpoint)
        for instance in shipped_instances():
            for price in instance.prices:
                market.sells(instance.name, price.region, price.on_demand_usd_per_hour)
        market.stores("us-east-1", 0.08, 0.023)
        yield tmp_path
    contents = boto3.client("s3").list_objects_v2(Bucket="my-bucket").get("Contents", [])
    for one in contents:
        boto3.client("s3").delete_object(Bucket="my-bucket", Key=one["Key"])
    boto3.client("s3").delete_bucket(Bucket="my-bucket")


def test_every_shown_command_prints_what_is_shown(place: Path) -> None:
    """In one folder, in order, with the plan that the text speaks of."""
    text = AWS.read_text(encoding="utf-8")
    (planned,) = re.findall(r"`sfplan (SmolLM2-[^`]*)`", text)
    assert sfplan(*shlex.split(planned)).code == 0
    everything = list(shown(text))
    assert len(everything) == 7

    differences = []
    for item in everything:
        done = sfplan(*shlex.split(item.text)[1:])
        printed = done.output + (done.errors if done.code else "")
        same = [INSTANCE.sub("instance", vague(said)) for said in (printed, item.output)]
        if same[0] != same[1]:
            lines = [plain(said).split("\n") for said in (item.output, printed)]
            differences += [f"$ {item.text}", *list(difflib.unified_diff(*lines, n=0, lineterm=""))[2:]]

    assert not differences, "\n".join(["docs/aws.md shows (-) what is not printed (+):", *differences])
