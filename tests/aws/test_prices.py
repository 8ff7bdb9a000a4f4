"""``sfplan prices``: today's are taken from AWS whole or not at all, and every figure uses them, and says so."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shallowflow.planner import money
from shallowflow.planner.plan import Workload
from shallowflow.profiles import snapshot
from shallowflow.profiles.load import (
    instance_names,
    load_instance,
    load_instances,
    load_storage,
    shipped_instances,
    shipped_storage,
)
from tests.aws import planted, pricing
from tests.aws.pricing import Market, Spot
from tests.front.schemas import held
from tests.front.shell import sfplan
from tests.front.tree import ROOT

EAST, WEST = "us-east-1", "eu-west-1"
NOW = datetime.datetime.now(datetime.UTC)
TODAY = f"retrieved {NOW.date().isoformat()}"


def ago(hours: float) -> datetime.datetime:
    """A time that is over."""
    return NOW - datetime.timedelta(hours=hours)


@pytest.fixture
def market(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Market]:
    """Prices of g4dn.xlarge in two regions, and a user's folder without any."""
    with pricing.serving(endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", made.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", made.endpoint)
        monkeypatch.setenv("SHALLOWFLOW_DATA", str(tmp_path / "data"))
        made.sells("g4dn.xlarge", EAST, 0.6)
        made.sells("g4dn.xlarge", WEST, 0.7)
        made.sells("g4dn.xlarge", "sa-east-1", 9.0)
        made.stores(EAST, 0.09, 0.024)
        made.stores(WEST, 0.1, 0.026, "EU-")
        for zone, usd in (("a", "0.21"), ("b", "0.25"), ("c", "0.35")):
            made.spot.append(Spot("g4dn.xlarge", EAST + zone, usd, ago(5)))
        made.spot.append(Spot("g4dn.xlarge", EAST + "a", "0.90", ago(50)))
        made.spot.append(Spot("g4dn.xlarge", EAST + "b", "0.01", ago(-5)))
        made.spot.append(Spot("g4dn.xlarge", EAST + "c", "0.02", ago(1), "Windows"))
        made.page = 2
        yield made


def update(*regions: str) -> dict[str, Any]:
    """What is in use afterwards."""
    done = sfplan("prices", "--update", *(word for region in regions for word in ("--region", region)), "--json")
    assert done.code == 0, done.errors
    found: dict[str, Any] = held("prices", done.output)
    return found


def price(told: dict[str, Any], instance: str, region: str) -> dict[str, Any]:
    """One row."""
    (found,) = (row for row in told["prices"] if (row["instance"], row["region"]) == (instance, region))
    assert isinstance(found, dict)
    return found


def test_todays_prices_are_taken(market: Market) -> None:
    """On demand by its own product alone, spot as it holds now in the middle of the zones, page after page."""
    told = update(EAST, WEST)

    east, west = (price(told, "g4dn.xlarge", region) for region in (EAST, WEST))
    assert (east["on_demand_usd_per_hour"], east["spot_usd_per_hour"], east["date"]) == (0.6, 0.25, TODAY)
    assert (west["on_demand_usd_per_hour"], west["spot_usd_per_hour"]) == (0.7, None)
    assert not east["shipped"] and price(told, "g4dn.2xlarge", EAST)["shipped"]
    assert east["source"].startswith("AWS Price List API; spot: EC2's price history, the median of the zones; inter")
    stored = {(row["kind"], row["region"]): row["usd_per_gb_month"] for row in told["storage"]}
    assert stored == {("volume", EAST): 0.09, ("volume", WEST): 0.1, ("bucket", EAST): 0.024, ("bucket", WEST): 0.026}
    assert market.asked.count(("GetProducts", "us-east-1")) > len(shipped_instances()) + 2
    assert [asked for asked in market.asked if asked[0] == "DescribeSpotPriceHistory"] == [
        *[("DescribeSpotPriceHistory", EAST)] * 2,
        ("DescribeSpotPriceHistory", WEST),
    ]


def test_facts_are_those_that_ec2_tells(market: Market) -> None:
    """What instances hold stays, for what is shipped was taken from the same place; what they cost is new."""
    update(EAST)

    shipped = {instance.name: instance for instance in shipped_instances()}
    taken = {shape.instance: shape for shape in snapshot.read().shapes}
    assert len(taken) > 10
    for name, shape in taken.items():
        for fact in ("num_vcpus", "ram_bytes", "nvme_bytes", "network_bits_per_second", "disk_bytes_per_second"):
            assert getattr(load_instance(name), fact) == getattr(shape, fact) == getattr(shipped[name], fact), (
                name,
                fact,
            )


def test_every_figure_uses_them(market: Market, small_model: Path) -> None:
    """Plans and comparisons, with the date, as text and as JSON; after --reset the shipped ones hold again."""
    work = ("--gpu", "t4", "--sequence-length", 32, "--tokens", 5000, "--quantization", "nf4", "--fix")
    words = (*work, "activations=save", "--optimizer", "adamw")
    before = sfplan(small_model, *words)
    assert before.code == 0, before.errors
    update(EAST)

    plan, made = sfplan(small_model, *words), json.loads(sfplan(small_model, *words, "--json").output)
    narrow = ("--instance", "g4dn.xlarge", "--region", EAST, "--gpus", 1)
    ways = sfplan("whatif", small_model, *words[2:], *narrow)
    rows = json.loads(sfplan("whatif", small_model, *words[2:], *narrow, "--json").output)["outlooks"]

    assert f"prices: {TODAY}" in plan.output and TODAY not in before.output
    offer = next(offer for offer in made["offers"] if offer["instance"] == "g4dn.xlarge")
    assert (offer["on_demand_usd_per_hour"], offer["spot_usd_per_hour"], offer["price_date"]) == (0.6, 0.25, TODAY)
    assert {row["usd_per_hour"] for row in rows} == {0.6, 0.25} and {row["price_date"] for row in rows} == {TODAY}
    assert f"Prices of g4dn: {TODAY};" in ways.output and f"gp3: {TODAY}" in ways.output
    assert sfplan("prices", "--reset").output == "the shipped prices hold again\n"
    assert sfplan("prices", "--reset").output == "the shipped prices hold, as before\n"
    assert sfplan(small_model, *words) == before


def test_another_regions_prices_stay(market: Market) -> None:
    """Each price has the date on which it was taken itself."""
    update(EAST)
    market.sells("g4dn.xlarge", "us-west-2", 0.55)
    told = update("us-west-2")

    assert [row["region"] for row in told["prices"] if not row["shipped"]] == ["us-west-2"]
    everywhere = json.loads(sfplan("prices", "--json").output)
    own = {row["region"] for row in everywhere["prices"] if not row["shipped"]}
    assert own == {EAST, "us-west-2"}
    storage = load_storage()
    assert storage.volume.usd_per_gb_month[EAST] == 0.09 and "elsewhere" not in storage.volume.date
    assert storage.volume.date.startswith(f"{TODAY} (in ") and shipped_storage().volume.date in storage.volume.date


def test_a_region_that_was_not_known_is_added(market: Market) -> None:
    """Spot there is not offered, as far as is known how often it is interrupted."""
    update("sa-east-1")

    (found,) = (p for p in load_instance("g4dn.xlarge").prices if p.region == "sa-east-1")
    assert (found.on_demand_usd_per_hour, found.interruption_bucket) == (9.0, None)
    assert [o.instance for o in money.offers(load_instances("t4"), Workload(region="sa-east-1"), lambda _: 1.0)] == [
        "g4dn.xlarge"
    ]


def test_what_is_shown(market: Market) -> None:
    """Every instance with a price there, and where each comes from."""
    update(EAST)
    done = sfplan("prices", "--region", EAST)

    lines = done.output.splitlines()
    assert lines[1].split() == ["g4dn.xlarge", EAST, "$0.6000", "$0.2500", "15-20%", "[1]"]
    assert lines[2].split()[-1] == "[2]"
    assert any(line.startswith(f"[1] {TODAY}; AWS Price List API") for line in lines)
    assert any(line.startswith("gp3, dollars per GB and month: us-east-1 0.09") for line in lines)
    assert "no price in nowhere is known" in sfplan("prices", "--region", "nowhere").error()
    assert "contradict each other" in sfplan("prices", "--update", "--reset").error()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not as it was written: Input data was truncated"),
        ('{"prices": 3}', "Expected `array`, got `int`"),
        ('{"format": 2}', "Invalid enum value 2"),
        (
            '{"prices": [{"instance": "a", "region": "b", "on_demand_usd_per_hour": -1, "spot_usd_per_hour": null, '
            '"date": "c", "source": "d"}]}',
            "on_demand_usd_per_hour is -1",
        ),
        ("[" * 100_000, "is not as it was written"),
    ],
)
def test_a_broken_file_is_one_line(market: Market, content: str, told: str) -> None:
    """Wherever prices are used, and until it is removed."""
    file = snapshot.path()
    file.parent.mkdir()
    file.write_text(content)

    for words in (("prices",), ("prices", "--update"), ("whatif", "Qwen2.5-0.5B"), ("Qwen2.5-0.5B", "--gpu", "t4")):
        done = sfplan(*words)
        assert done.code == 2 and told in done.error() and "sfplan prices --reset removes it" in done.error()
    assert file.read_text() == content
    assert held("prices", sfplan("prices", "--reset", "--json").output) == {"file": str(file), "removed": True}
    assert sfplan("prices").code == 0


@pytest.mark.parametrize("trouble", ["broken", "two", "price", "denied", "spot denied", "nothing"])
def test_what_aws_says_wrong_changes_nothing(market: Market, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a list is no list: one line, and what was there stays; nothing that is secret is told."""
    update(EAST)
    before, region = snapshot.path().read_bytes(), EAST
    if trouble == "broken":
        market.broken = "{not json"
    elif trouble == "two":
        market.sells("g4dn.xlarge", EAST, 0.5)
    elif trouble == "price":
        market.products.append(pricing.product("AmazonEC2", market.products[0]["attributes"], ("Hrs", float("nan"))))
    elif trouble == "denied":
        market.denied["GetProducts"] = "AccessDeniedException"
    elif trouble == "spot denied":
        market.denied["DescribeSpotPriceHistory"] = "UnauthorizedOperation"
    else:
        region = "ap-northeast-3"

    done = sfplan("prices", "--update", "--region", region)

    told = {
        "broken": "the price list of AmazonEC2 holds what is no product",
        "two": "AWS lists two prices of g4dn.xlarge in us-east-1: 0.6 and 0.5 dollars",
        "price": "AWS says that g4dn.xlarge in us-east-1 is 'nan' dollars, which is no price",
        "denied": "ask for AmazonEC2's prices: pricing answers AccessDeniedException (docs/aws.md",
        "spot denied": "ask for spot prices in us-east-1: ec2 answers UnauthorizedOperation (docs/aws.md",
        "nothing": "AWS lists no price in ap-northeast-3; nothing was changed",
    }
    assert done.code == 2 and told[trouble] in done.error()
    assert planted.found_in([done.errors]) == []
    assert snapshot.path().read_bytes() == before


def test_a_write_that_fails_leaves_what_was_there(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole, or as it was; nothing else stays in its folder."""
    update(EAST)
    before = snapshot.path().read_bytes()
    market.sells("g4dn.2xlarge", EAST, 0.5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        done = sfplan("prices", "--update", "--region", EAST)

    assert done.code == 2 and "cannot be written: No space left on device" in done.error()
    assert snapshot.path().read_bytes() == before
    assert [path.name for path in snapshot.path().parent.iterdir()] == ["prices.json"]


def test_prices_without_boto3_are_the_shipped_ones() -> None:
    """Asking AWS says in a line what is missing; all else works."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("boto3", "botocore"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "boto3" else find(name, package)
from shallowflow.cli import main
main(sys.argv[1:])
"""
    words = {
        ("prices", "--region", EAST): "",
        ("prices", "--update"): "sfplan prices --update needs the package boto3",
        ("runs",): "sfplan runs needs the package boto3",
        ("stop", "x"): "sfplan stop needs the package boto3",
        (
            "launch",
            "p",
            "--data",
            "d",
            "--store",
            "s3://a/b",
            "--instance-profile",
            "x",
        ): "sfplan launch needs the package",
    }
    for line, told in words.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == (2 if told else 0), done.stderr
        assert done.stderr.count("\n") == bool(told) and told in done.stderr


def test_instances_stay_those_that_are_shipped(market: Market) -> None:
    """Prices change, and with them no plan's proof: the machines are the same."""
    names = instance_names()
    update(EAST)

    assert instance_names() == names == [instance.name for instance in shipped_instances()]
