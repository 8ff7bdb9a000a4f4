"""Every command that the document on AWS shows is run, in order, and prints what is shown."""

from __future__ import annotations

import datetime
import difflib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from shallowflow.profiles.load import shipped_instances
from tests.aws import pricing, rented
from tests.aws.pricing import Spot
from tests.front.shell import sfplan
from tests.front.test_readme import plain, shown, vague
from tests.front.tree import ROOT

AWS = ROOT / "docs" / "aws.md"
LONG_AGO = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
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
                if price.spot_usd_per_hour is not None:
                    market.spot.append(Spot(instance.name, f"{price.region}a", f"{price.spot_usd_per_hour}", LONG_AGO))
        market.stores("us-east-1", 0.08, 0.023)
        yield tmp_path
    contents = boto3.client("s3").list_objects_v2(Bucket="my-bucket").get("Contents", [])
    for one in contents:
        boto3.client("s3").delete_object(Bucket="my-bucket", Key=one["Key"])
    boto3.client("s3").delete_bucket(Bucket="my-bucket")


def test_every_shown_command_prints_what_is_shown(place: Path, t4_plan: str) -> None:
    """In one folder, in order, with a smaller plan than the text speaks of."""
    text = AWS.read_text(encoding="utf-8")
    named = {**json.loads(t4_plan), "model_name": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # whose figures are shown
    Path("plan.json").write_text(json.dumps(named), encoding="utf-8")
    everything = list(shown(text))
    assert len(everything) == 7

    differences = []
    for item in everything:
        done = sfplan(*shlex.split(item.text)[1:])
        printed = done.output + (done.errors if done.code else "")
        same = [vague(INSTANCE.sub("i-0", said)) for said in (printed, item.output)]
        if same[0] != same[1]:
            wanted, found = (plain(said).split("\n") for said in (item.output, printed))
            differences += [f"$ {item.text}", *list(difflib.unified_diff(wanted, found, n=0, lineterm=""))[2:]]

    assert not differences, "\n".join(["docs/aws.md shows (-) what is not printed (+):", *differences])
