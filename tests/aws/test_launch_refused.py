"""What cannot be launched is told in one line, nothing of it is left, and no secret comes out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from shallowflow.runtime.aws.instances import IMAGE
from tests.aws import calls, planted, rented
from tests.front.shell import Done, sfplan


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "none.jsonl"), "file none.jsonl does not exist"),
        (("--store", "file:///x"), "is no store"),
        (("--store", "s3://a-bucket"), "--store names a bucket alone; give a prefix in it"),
        (("--store", "s3://KEY:SECRET@bucket/x"), "'s3://***@bucket/x' is no store"),
        (("--budget-usd", "0.001"), "--budget-usd 0.001 lasts 0.3 min at"),
        (("--max-hours", "0.01"), "--max-hours are 0.6 min at"),
        (("--max-hours", "0.01", "--budget-usd", "100"), "--max-hours are 0.6 min at"),
        (("--max-hours", "inf"), "inf is no number"),
        (("--budget-usd", "nan"), "nan is no number"),
        (("--name", "a b"), "'a b' is no name of a run"),
        (("--instance", "g5.xlarge"), "g5.xlarge has 1 x a10g, and the plan is for 1 x t4; give one of g4dn.xlarge,"),
        (("--instance", "g4dn.huge"), "unknown instance 'g4dn.huge'"),
        (("--region", "mars"), "no spot price of t4 instances in 'mars' is known; try sfplan prices --update"),
        (("--package", "none.whl"), "--package none.whl does not exist"),
        (("--max-hours", "0"), "0.0 is not in the range"),
        (("--", "--output", "x"), "--output cannot follow --"),
        (("--", "--budget-usd=9"), "--budget-usd cannot follow --"),
        (("--", "--stepz", "3"), "No such option"),
        (("--", "--steps", "many"), "'many' is not a whole number"),
        (("--", "--sample", "a\nb"), "holds a line break"),
    ],
)
def test_what_cannot_be_launched_is_told(launch: Callable[..., Done], words: tuple[str, ...], told: str) -> None:
    """One line and exit code 2, before AWS is asked anything."""
    with calls.noted() as asked:
        done = launch("--yes", *words)

    assert done.code == 2 and told in done.error()
    assert asked == []


def test_other_plans_are_refused(launch: Callable[..., Done], t4_plan: str) -> None:
    """Of a model that is on this machine alone."""
    Path("plan.json").write_text(json.dumps({**json.loads(t4_plan), "model_name": "mine"}), encoding="utf-8")

    assert "whose weights another machine would not find" in launch("--dry-run").error()


@pytest.mark.parametrize(
    ("operation", "code", "told"),
    [
        ("RunInstances", "InsufficientInstanceCapacity", "AWS has no such instance to spare there now"),
        ("RunInstances", "MaxSpotInstanceCountExceeded", "quota of spot vCPUs"),
        ("DescribeInstances", "UnauthorizedOperation", "docs/aws.md has the policies"),
    ],
)
def test_what_aws_refuses_is_told(
    launch: Callable[..., Done], endpoint: str, monkeypatch: pytest.MonkeyPatch, operation: str, code: str, told: str
) -> None:
    """AWS's code and what helps, and nothing of what AWS says beside it."""
    from tests.aws import pricing

    with pricing.serving(endpoint) as market, monkeypatch.context() as patch:
        market.denied[operation] = code
        patch.setenv("AWS_ENDPOINT_URL_EC2", market.endpoint)
        done = launch("--yes")

    assert done.code == 2 and f"ec2 answers {code} (" in done.error() and told in done.error()
    assert planted.found_in([done.errors]) == []


def test_no_secret_comes_out(launch: Callable[..., Done], bucket: str, image: str, run: str) -> None:
    """Neither in what is shown, nor in the machine's script, its tags, or the store: not even an account's number."""
    account = f"logs-{planted.ACCOUNT}-{uuid.uuid4().hex[:6]}"
    boto3.client("s3").create_bucket(Bucket=account)
    store = ("--store", f"s3://{account}/{run}", "--hf-token-parameter", "/mine/token")

    texts = [launch(*words, *store) for words in ((), ("--dry-run",), ("--dry-run", "--json"), ("--yes", "--json"))]
    texts += [
        launch("--yes", "--resume", *store),
        sfplan("runs", *rented.ON),
        sfplan("runs", *rented.ON, "--json"),
        sfplan("stop", run, *rented.ON),
    ]
    texts.append(sfplan("stop", run, *rented.ON, "--yes"))

    assert [done.code for done in texts] == [2, 0, 0, 0, 0, 0, 0, 2, 0]
    assert planted.found_in([text for done in texts for text in (done.output, done.errors)]) == []
    script = rented.script_of(json.loads(texts[3].output)["instance_id"])
    secrets = [
        secret for secret in planted.found_in([script]) if secret != planted.ACCOUNT
    ]  # which its bucket is called
    assert secrets == [] and IMAGE not in script
    objects = boto3.client("s3").list_objects_v2(Bucket=account)["Contents"]
    bodies = [boto3.client("s3").get_object(Bucket=account, Key=one["Key"])["Body"].read() for one in objects]
    assert planted.found_in(bodies) == []
