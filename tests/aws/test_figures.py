"""CloudWatch hears of a run without holding it up, and the bill stands beside what was reckoned."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import pytest

from shallowflow.runtime.aws import bills, cloudwatch
from shallowflow.runtime.aws.bills import BillError, Day
from shallowflow.runtime.aws.cloudwatch import CloudWatch
from shallowflow.runtime.meter import MeasuredPeak
from shallowflow.runtime.record import EvaluationRecord, StepRecord
from shallowflow.runtime.request import RunError, check_request
from shallowflow.runtime.run import RunRequest
from shallowflow.runtime.trackers import Trackers, missing_package
from tests.aws import planted
from tests.front.schemas import held
from tests.front.shell import sfplan
from tests.front.tree import ROOT


def step(index: int, **changes: Any) -> StepRecord:
    """An update of 100 tokens in two seconds."""
    wanted: dict[str, Any] = {
        "index": index,
        "loss": 1.5 + index,
        "gradient_norm": 1.0,
        "loss_scale": 1.0,
        "skipped": False,
        "num_target_tokens": 100,
        "seconds": 2.0,
        "usd": None,
        "memory_measured": False,
    }
    return StepRecord(**{**wanted, **changes})


def heard(name: str, run: str) -> dict[str, float]:
    """Sum, maximum and count of a figure, as CloudWatch has it."""
    now = datetime.datetime.now(datetime.UTC)
    answer = boto3.client("cloudwatch").get_metric_statistics(
        Namespace=cloudwatch.NAMESPACE,
        MetricName=name,
        Dimensions=[{"Name": "Run", "Value": run}],
        StartTime=now - datetime.timedelta(hours=1),
        EndTime=now + datetime.timedelta(hours=1),
        Period=86_400,
        Statistics=["Sum", "Maximum", "SampleCount"],
    )
    points = answer["Datapoints"]
    return {kind: sum(point[kind] for point in points) for kind in ("Sum", "SampleCount")} | {
        "Maximum": max((point["Maximum"] for point in points), default=math.nan)
    }


def test_cloudwatch_hears_every_figure(tmp_path: Path) -> None:
    """Cost, tokens a second, loss, memory and evaluations; but none that is no number."""
    trackers = Trackers(("cloudwatch",), tmp_path / "my-run", {})
    peak = MeasuredPeak(resident_bytes=1, peak_allocated_bytes=4096, peak_reserved_bytes=8192)
    for index in range(3):
        trackers.step(step(index), peak, 0.25 * index)
    trackers.step(step(3, loss=math.nan), peak, 0.75)
    trackers.evaluation(EvaluationRecord(step=4, loss=2.5, perplexity=12.0, seconds=1.0, tokens=10))
    trackers.finish()

    assert trackers.news() == []
    assert heard("Loss", "my-run") == {"Sum": 1.5 + 2.5 + 3.5, "SampleCount": 3, "Maximum": 3.5}
    assert heard("TokensPerSecond", "my-run")["Maximum"] == 50
    assert heard("PeakMemoryAllocated", "my-run")["Maximum"] == 4096
    assert heard("CostUSD", "my-run")["Maximum"] == 0.75
    assert heard("EvaluationLoss", "my-run")["Sum"] == 2.5


def test_more_than_one_request_holds_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, none lost and none twice."""
    monkeypatch.setattr(cloudwatch, "MOST_IN_A_REQUEST", 7)
    made = CloudWatch("many")
    for index in range(30):
        made.step(step(index), None, None)
    made.finish()

    assert heard("Loss", "many")["SampleCount"] == 30


def test_what_cloudwatch_refuses_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a reason, however often, without a secret; the training thread is not held up."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(cloudwatch, "BATCH_SECONDS", 0.01)
    made = CloudWatch("none")
    for index in range(5):
        made.step(step(index), None, None)
    made.finish()
    news = made.news()

    assert news == ["CloudWatch does not take the run's figures: EndpointConnectionError"]
    assert planted.found_in(news) == []


def test_trackers_that_there_are(tmp_path: Path) -> None:
    """CloudWatch is one of them."""
    assert missing_package("cloudwatch") is None
    with pytest.raises(RunError, match=r"no tracker 'x'; give one of tensorboard, wandb, cloudwatch"):
        check_request(RunRequest(data=tmp_path, output=tmp_path, track=("x",)))


# Bills


def bill(endpoint: str, *days: tuple[str, str, bool], unit: str = "USD") -> None:
    """Have Cost Explorer answer the next new question with these days."""
    results = [
        {
            "TimePeriod": {"Start": date, "End": date},
            "Total": {bills.METRIC: {"Amount": amount, "Unit": unit}},
            "Groups": [],
            "Estimated": estimated,
        }
        for date, amount, estimated in days
    ]
    body = json.dumps({"results": [{"ResultsByTime": results, "DimensionValueAttributes": []}]}).encode()
    url = f"{endpoint}/moto-api/static/ce/cost-and-usage-results"
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 201


def run_folder(folder: Path, **changes: Any) -> Path:
    """A finished run, as far as its cost goes."""
    folder.mkdir()
    record = {"outcome": "completed", "started": "2026-01-02T10:00:00+00:00", "seconds": 7200.0, "usd": 0.5}
    (folder / "run.json").write_text(json.dumps({**record, "interruptions": 2, **changes}))
    return folder


def test_the_bill_stands_beside_what_was_reckoned(endpoint: str, tmp_path: Path) -> None:
    """Day by day, and how far they are apart."""
    bill(endpoint, ("2026-01-02", "0.40", False), ("2026-01-03", "0.15", True), ("2026-01-04", "0", False))

    done = sfplan("cost", run_folder(tmp_path / "first"))

    assert done.code == 0
    assert done.output.splitlines() == [
        f"{tmp_path / 'first'}: completed, 2.0 h, 2 interruptions",
        "reckoned  $0.5000",
        "billed    $0.5500 for shallowflow-run=first, +10.0% of what was reckoned",
        "  2026-01-02  $0.4000",
        "  2026-01-03  $0.1500  estimated",
    ]


def test_the_bill_as_json(endpoint: str, tmp_path: Path) -> None:
    """All of it, under a tag of the user's own."""
    bill(endpoint, ("2026-01-02", "0.40", False))

    done = sfplan("cost", run_folder(tmp_path / "second", usd=None), "--tag", "team=a=b", "--json")

    told = held("cost", done.output)
    assert told["tag"] == {"team": "a=b"} and told["reckoned_usd"] is None and told["billed_usd"] == 0.4
    assert told["days"] == [{"date": "2026-01-02", "usd": 0.4, "estimated": False}]


def test_nothing_billed_is_said(tmp_path: Path) -> None:
    """With the reasons that there are."""
    done = sfplan("cost", run_folder(tmp_path / "third"))

    assert done.code == 0
    assert "billed    $0.0000 for shallowflow-run=third\n" in done.output
    assert done.output.splitlines()[-1].startswith("nothing is billed under this tag: it is not activated")


def test_the_question_is_about_the_tag_and_the_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both days included, and page after page."""
    asked: list[dict[str, Any]] = []

    class Client:
        def get_cost_and_usage(self, **question: Any) -> dict[str, Any]:
            asked.append(question)
            day = {"TimePeriod": {"Start": f"2026-01-0{len(asked)}"}, "Estimated": False}
            page = {"ResultsByTime": [day | {"Total": {bills.METRIC: {"Amount": "1", "Unit": "USD"}}}]}
            return page | ({"NextPageToken": "more"} if len(asked) == 1 else {})

    class Opened:
        def client(self, name: str, **_: Any) -> Client:
            assert name == "ce"
            return Client()

    monkeypatch.setattr(boto3, "Session", Opened)

    found = bills.billed("k", "v", datetime.date(2026, 1, 1), datetime.date(2026, 1, 2))

    assert found == tuple(Day(date=f"2026-01-0{n}", usd=1.0, estimated=False) for n in (1, 2))
    assert asked[0]["TimePeriod"] == {"Start": "2026-01-01", "End": "2026-01-03"}
    assert asked[0]["Filter"] == {"Tags": {"Key": "k", "Values": ["v"], "MatchOptions": ["EQUALS"]}}
    assert asked[1]["NextPageToken"] == "more"


def test_another_currency_is_no_comparison(endpoint: str) -> None:
    """It is refused, not added up."""
    bill(endpoint, ("2026-01-02", "0.40", False), unit="EUR")

    with pytest.raises(BillError, match="the bill is in EUR"):
        bills.billed("a", "other", datetime.date(2026, 1, 2), datetime.date(2026, 1, 2))


def test_no_bill_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 and one line: no run, no tag, no answer."""
    run = run_folder(tmp_path / "fourth")
    for words, told in (
        ((tmp_path / "none",), "holds no finished run"),
        ((run, "--tag", "x"), "--tag is 'x'; give one such as shallowflow-run=my-run"),
    ):
        done = sfplan("cost", *words)
        assert done.code == 2 and told in done.error()
    (run / "run.json").write_text("{}")
    assert "is not what a run writes" in sfplan("cost", run).error()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    done = sfplan("cost", run_folder(tmp_path / "fifth"))
    assert done.code == 2 and "no AWS credentials were found" in done.error()


def test_who_does_not_use_aws_needs_no_boto3() -> None:
    """Command line, run, guard and notices load where it is missing, and say so where it is asked for."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("boto3", "botocore"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import shallowflow.cli, shallowflow.runtime.guard, shallowflow.runtime.aws.notices, shallowflow.runtime.storage
import shallowflow.runtime.spend, shallowflow.runtime.uploads
assert "boto3" not in sys.modules
shallowflow.cli.main(["cost", "run"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == 2
    assert (
        done.stderr == "Error: run holds no finished run: there is no run/run.json; give the --output of sfplan train\n"
    )
