"""``sfplan whatif``: every way to run a work, the same from everywhere, within limits, and what is no way."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import shallowflow
from shallowflow.profiles import load_instances
from tests.front.schemas import held
from tests.front.shell import sfplan

WORK = ("--sequence-length", 32, "--global-batch-size", 4, "--rank", 8, "--tokens", 5000, "--quantization", "fp16")
SAVED = (*WORK, "--fix", "activations=save")
NARROW = (*SAVED, "--instance", "g4dn.xlarge", "--instance", "g4dn.12xlarge")
ASKED: dict[str, Any] = {
    "sequence_length": 32,
    "global_batch_size": 4,
    "rank": 8,
    "total_tokens": 5000,
    "quantization": "fp16",
    "activations": "save",
}
FOUR = ["g4dn.xlarge", "g4dn.12xlarge"]


def asked(folder: Path, *words: object) -> dict[str, Any]:
    """What the command says in JSON."""
    done = sfplan("whatif", folder, *NARROW, *words, "--json")
    assert done.code == 0, done.errors
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_every_instance_region_market_and_number_of_gpus_is_there(tiny_folder: Path) -> None:
    """Once each; every price has its own date and source, and its row its plan's GPUs."""
    found = asked(tiny_folder)["outlooks"]

    wanted = {
        (instance.name, price.region, market, count)
        for instance in load_instances("t4")
        if instance.name in FOUR
        for price in instance.prices
        for market in ("on demand", *(("spot",) if price.spot_usd_per_hour else ()))
        for count in {1, instance.num_gpus}
    }
    assert [*sorted((o["instance"], o["region"], o["market"], o["num_gpus"]) for o in found)] == sorted(wanted)
    assert all(outlook["price_date"] and outlook["price_source"] for outlook in found)
    assert [outlook["usd"] for outlook in found] == sorted(outlook["usd"] for outlook in found)
    assert min(o["over_cheapest"] for o in found) == min(o["over_fastest"] for o in found) == 0


def test_several_instances_work_together(tiny_folder: Path) -> None:
    """With the plan for all their GPUs; all are paid, and interrupted as often as any of them is."""
    words = (*SAVED, "--instance", "g4dn.xlarge", "--region", "us-east-1", "--nodes", 2, "--interruptions", 3)

    done = sfplan("whatif", tiny_folder, *words, "--json")
    shown = sfplan("whatif", tiny_folder, *words)
    plan = shallowflow.plan(str(tiny_folder), num_gpus=2, num_machines=2, **ASKED)

    found = json.loads(done.output)
    price = next(
        p for i in load_instances("t4") if i.name == "g4dn.xlarge" for p in i.prices if p.region == "us-east-1"
    )
    (planned,) = found["plans"]
    assert (planned["num_gpus"], planned["step_seconds"]) == (2, plan.prediction.step_seconds)
    rates = {o["market"]: o["usd_per_hour"] for o in found["outlooks"]}
    assert rates == {"on demand": 2 * price.on_demand_usd_per_hour, "spot": 2 * (price.spot_usd_per_hour or 0.0)}
    assert {(o["num_gpus"], o["num_machines"]) for o in found["outlooks"]} == {(2, 2)}
    spot = next(o for o in found["outlooks"] if o["market"] == "spot")
    assert spot["interruptions"] == pytest.approx(2 * 3 / 24 * spot["hours"], rel=0.05)
    assert "2 x T4 in 2 instances" in shown.output
    assert "2 instances work together, over the slowest network" in " ".join(shown.output.split())


def test_it_is_the_same_from_everywhere(tiny_folder: Path, tmp_path: Path) -> None:
    """JSON, the table in a file, the page, words and Python tell of the same dollars."""
    table, page = tmp_path / "ways.csv", tmp_path / "ways.html"
    found = asked(tiny_folder, "--csv", table, "--html", page)["outlooks"]
    said = sfplan("whatif", tiny_folder, *NARROW)
    made = shallowflow.whatif(str(tiny_folder), instances=FOUR, **ASKED)

    assert said.code == 0 and said == sfplan("whatif", tiny_folder, *NARROW)
    assert [asdict(outlook) for outlook in made.outlooks] == [
        {name: value for name, value in row.items() if not name.startswith("over_")} for row in found
    ]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["usd"]) for row in rows] == [outlook["usd"] for outlook in found]
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r'src="https?:|<link[^>]*href="https?:', text)
    assert text.count("<tr>") == 2 + len(found) + len(made.plans)
    best = found[0]
    assert f"{best['instance']:<13} {best['region']:<14} {best['market']}" in said.output
    for note in made.notes:
        assert " ".join(note.split()) in " ".join(said.output.split())


def test_what_its_own_plan_takes_is_what_it_costs(tiny_folder: Path) -> None:
    """On demand: the plan's own hours, a set-up, the weights' download, and the adapter's upload; nothing else."""
    found = asked(tiny_folder, "--region", "us-east-1", "--setup-minutes", 0, "--gpus", 1)["outlooks"]
    alone = shallowflow.plan(str(tiny_folder), "t4", **ASKED)
    offer = next(offer for offer in alone.offers if offer.instance == "g4dn.xlarge")
    mine = next(o for o in found if (o["instance"], o["market"]) == ("g4dn.xlarge", "on demand"))

    moved = 2 * alone.num_parameters / 118.75e6
    assert mine["hours"] * 3600 == pytest.approx(offer.hours * 3600 + moved, abs=0.1)
    compute = mine["usd"] - mine["storage_usd"]
    assert compute == pytest.approx(offer.on_demand_usd_per_hour * mine["hours"])


def test_more_interruptions_cost_more(tiny_folder: Path) -> None:
    """The user's own figure holds for every instance; on demand stays what it is."""
    few, many = (asked(tiny_folder, "--interruptions", n, "--gpus", 1)["outlooks"] for n in (1, 24))

    def by_way(outlooks: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {(o["instance"], o["region"], o["market"]): o for o in outlooks}

    rough = by_way(many)
    for way, calm in by_way(few).items():
        if way[2] == "spot":
            assert rough[way]["hours"] > calm["hours"] and rough[way]["interruptions"] > calm["interruptions"] > 0
            assert rough[way]["hazard_source"] == "24 interruptions per day, as asked"
        else:
            assert rough[way]["usd"] == calm["usd"] and rough[way]["hours"] == calm["hours"]


def test_a_history_tells_the_rate(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a file; one that tells none is refused in a line."""
    history = tmp_path / "nodes.csv"
    history.write_text("0,add,a\n3600000,remove,a\n", encoding="utf-8")
    spot = [o for o in asked(tiny_folder, "--interruptions", history)["outlooks"] if o["market"] == "spot"]

    assert all(o["hazard_source"] == "nodes.csv: 1 nodes removed in 1.0 hours of nodes" for o in spot)
    history.write_text("0,add,a\n", encoding="utf-8")
    refused = sfplan("whatif", tiny_folder, *NARROW, "--interruptions", history)
    assert refused.code == 2 and "no node was removed" in refused.error()


def test_each_value_has_its_own_plan(tiny_folder: Path) -> None:
    """Every combination of what is asked about; its numbers are those of asking for it alone."""
    one = ("--instance", "g4dn.xlarge", "--region", "us-east-1")
    found = asked(tiny_folder, *one, "--gpus", 1, "--what-if", "rank=4,8", "--what-if", "sequence_length=32,64")
    alone = sfplan("whatif", tiny_folder, *SAVED, *one, "--gpus", 1, "--rank", 4, "--sequence-length", 64, "--json")

    labels = {f"rank={rank}, sequence_length={length}" for rank in (4, 8) for length in (32, 64)}
    assert {outlook["what_if"] for outlook in found["outlooks"]} == labels == {p["what_if"] for p in found["plans"]}
    wanted = next(o for o in json.loads(alone.output)["outlooks"] if o["market"] == "spot")
    mine = [
        o
        for o in found["outlooks"]
        if (o["what_if"], o["market"], o["instance"]) == ("rank=4, sequence_length=64", "spot", "g4dn.xlarge")
    ]
    assert mine[0]["hours"] == wanted["hours"] and mine[0]["usd"] == wanted["usd"]


def test_data_is_counted_at_each_length(tiny_folder: Path, data: Path) -> None:
    """The hours of every length are those of the windows that its documents make there, and the file is told of."""
    words = [word for word in SAVED if word not in ("--tokens", 5000, "--sequence-length", 32)]
    narrow = ("--instance", "g4dn.xlarge", "--region", "us-east-1", "--json")
    done = sfplan("whatif", tiny_folder, *words, "--data", data, "--what-if", "sequence_length=32,64", *narrow)

    assert done.code == 0, done.errors
    found = json.loads(done.output)
    assert data.name in found["notes"][0]
    for length in (32, 64):
        alone = sfplan("whatif", tiny_folder, *words, "--data", data, "--sequence-length", length, *narrow)
        hours = sorted(o["hours"] for o in found["outlooks"] if o["what_if"] == f"sequence_length={length}")
        assert hours == sorted(o["hours"] for o in json.loads(alone.output)["outlooks"])


def test_limits_that_nothing_keeps_are_told_with_ones_that_something_does(tiny_folder: Path) -> None:
    """Exit code 1; what is offered instead was computed and does leave something."""
    words = ("whatif", tiny_folder, *NARROW, "--gpus", 1)
    refused = sfplan(*words, "--deadline-hours", 0.01, "--budget-usd", 100)

    assert refused.code == 1
    option = re.search(r"--deadline-hours (\S+)", refused.errors)
    assert option is not None, refused.errors
    kept = sfplan(*words, "--deadline-hours", option[1], "--budget-usd", 100, "--json")
    assert kept.code == 0
    assert all(o["nine_of_ten_hours"] <= float(option[1]) for o in json.loads(kept.output)["outlooks"])


def test_gpus_without_a_plan_are_listed_with_the_reason(tiny_folder: Path) -> None:
    """A batch of 4 does not divide over 8 GPUs; the others are planned for."""
    done = sfplan("whatif", tiny_folder, *SAVED, "--instance", "g4dn.metal", "--region", "us-east-1")

    assert done.code == 0, done.errors
    assert "8 x T4: a global batch of 4 sequences does not divide over 8 GPUs" in " ".join(done.output.split())


def test_a_model_that_fits_nowhere_is_refused_with_every_reason(tiny_folder: Path) -> None:
    """Exit code 1, and a reason for each kind and number of GPUs."""
    words = ("whatif", tiny_folder, *SAVED, "--max-process-gib", 0.15, "--region", "us-east-1")
    one = sfplan(*words, "--instance", "g4dn.xlarge", "--json")
    several = sfplan(*words, "--instance", "g4dn.12xlarge")

    assert one.code == several.code == 1
    assert re.search(r"no plan fits in 0.15 GiB: the smallest needs 0.\d\d GiB", one.errors)
    assert held("refusal", one.output)["error"] == "infeasible"
    assert "1 x t4: no plan fits" in several.errors and "4 x t4: no plan fits" in several.errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--instance", "g4dn.huge"), "unknown instance 'g4dn.huge'"),
        (("--region", "mars-1"), "no prices in region 'mars-1'"),
        (("--gpus", 16), "has 16 GPUs; try --gpus 8"),
        (("--what-if", "rank"), "--what-if 'rank' says nothing new"),
        (("--what-if", "rank=eight"), "--what-if rank=eight"),
        (("--what-if", "region=us-east-1"), "is nothing that is compared"),
        (("--interruptions", "often"), "'often' are none of low, middle, high"),
        (("--interruptions", "-1"), "no number per day from 0 to 240"),
        (("--interruptions", "nan"), "no number per day"),
        (("--interruptions", "nowhere.csv"), "history nowhere.csv cannot be read"),
        (("--notices", "nan"), "nan is no number"),
        (("--setup-minutes", "nan"), "nan is no number"),
        (("--deadline-hours", "nan"), "nan is no number"),
        (("--html", "page.txt"), "--html page.txt is no page"),
        (("--csv", "nowhere/ways.csv"), "folder nowhere for --csv does not exist"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], told: str, tiny_folder: Path) -> None:
    """Exit code 2 before anything is planned."""
    done = sfplan("whatif", tiny_folder, *SAVED, *words)

    assert done.code == 2
    assert told in done.error()


def test_what_is_remembered_needs_no_torch(tiny_folder: Path) -> None:
    """The second time, nothing is traced."""
    words = ["whatif", str(tiny_folder), *map(str, NARROW), "--json"]
    first = sfplan(*words)
    code = (
        "import sys; from shallowflow.cli import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == first.output
    assert done.stderr.decode().strip().endswith("False")
