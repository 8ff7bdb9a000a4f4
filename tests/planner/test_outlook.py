"""A plan's run on one instance: hours and dollars on demand and spot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner.hazard import HOURS_PER_MONTH, of_own
from shallowflow.planner.outlook import Circumstances, Outlook, Way, disk_gb, job, outlooks, state_bytes
from shallowflow.planner.plan import MemoryPart, Plan
from shallowflow.profiles import Price, load_gpu, load_instance
from shallowflow.profiles.load import load_storage
from tests.strategies import plans

STORAGE = load_storage()
INSTANCE = load_instance("g4dn.xlarge")
GPU = load_gpu("t4")
PRICE = next(price for price in INSTANCE.prices if price.region == "us-east-1")
SELDOM = Circumstances(hazard=of_own(0.01))
whole = plans().map(
    lambda plan: replace(
        plan,
        workload=replace(
            plan.workload,
            total_tokens=300 * plan.workload.sequence_length * plan.configuration.global_batch_size,
            num_sequences=None,
            num_packed_sequences=None,
        ),
        memory=(
            MemoryPart(category="adapter", num_bytes=200 * 2**20),
            MemoryPart(category="optimizer", num_bytes=2**27),
        ),
        wall=replace(plan.wall, training_seconds=36_000.0, evaluation_seconds=60.0, save_seconds=1.0),
        num_parameters=8_000_000_000,
    )
)
few = settings(max_examples=15)


def both(plan: Plan, circumstances: Circumstances = SELDOM, price: Price = PRICE) -> tuple[Outlook, Outlook]:
    """On demand, and spot."""
    demand, spot = outlooks(Way(plan=plan, gpu=GPU, instance=INSTANCE), price, STORAGE, circumstances)
    assert (demand.market, spot.market) == ("on demand", "spot")
    return demand, spot


@few
@given(whole)
def test_on_demand_costs_its_hours_and_its_disk(plan: Plan) -> None:
    """Set-up, download, start, load and training, at the hour's price, and a disk for as long: nothing else."""
    demand, _ = both(plan)
    run = job(Way(plan=plan, gpu=GPU, instance=INSTANCE), SELDOM)
    hours = (run.first_seconds + 36_000 + run.last_seconds) / 3600
    disk = STORAGE.volume.usd_per_gb_month["us-east-1"] * disk_gb(plan) * hours / HOURS_PER_MONTH

    assert demand.hours == demand.nine_of_ten_hours == pytest.approx(hours)
    assert demand.usd == demand.nine_of_ten_usd == pytest.approx(PRICE.on_demand_usd_per_hour * hours + disk)
    assert (demand.interruptions, demand.interval_steps, demand.hazard_source) == (0, None, None)
    assert demand.storage_usd == pytest.approx(disk)
    assert demand.low_usd == demand.high_usd == demand.usd
    assert demand.tokens_per_usd == pytest.approx(plan.workload.total_tokens / demand.usd)


@few
@given(whole)
def test_an_instances_set_up_counts_once_undisturbed(plan: Plan) -> None:
    """Longer set-up is as many more hours on demand; the weights come over the slower of disk and network."""
    way = Way(plan=plan, gpu=GPU, instance=INSTANCE)
    longer = replace(SELDOM, setup_seconds=SELDOM.setup_seconds + 3600)

    assert both(plan, longer)[0].hours == pytest.approx(both(plan)[0].hours + 1)
    disk = min(INSTANCE.disk_bytes_per_second, 131e6)
    weights = 16e9 / disk
    assert job(way, replace(SELDOM, setup_seconds=0)).first_seconds > 2 * weights  # downloaded, then read


@few
@given(whole, st.floats(0.0, 5.0), st.floats(1.0, 4.0))
def test_more_interruptions_are_never_sooner(plan: Plan, per_day: float, times: float) -> None:
    """In expected hours, with the best checkpoints for each; and never fewer interruptions."""
    calm, rough = (both(plan, Circumstances(hazard=of_own(rate)))[1] for rate in (per_day, per_day * times))

    assert rough.hours >= calm.hours * (1 - 1e-3)
    assert rough.interruptions >= calm.interruptions * (1 - 1e-3)
    assert calm.nine_of_ten_hours >= both(plan)[0].hours * (1 - 1e-6)


@few
@given(whole)
def test_the_ends_of_a_bucket_hold_its_middle(plan: Plan) -> None:
    """What AWS says of a price makes three cases, of which the middle one is shown; its source is told."""
    price = replace(PRICE, interruption_bucket=">20%")
    _, middle = both(plan, Circumstances(), price)
    _, high = both(plan, Circumstances(case="high"), price)

    assert middle.low_usd <= middle.usd * (1 + 1e-9)
    assert high.interruptions > middle.interruptions > 0
    assert middle.hazard_source is not None and ">20%" in middle.hazard_source and price.source in middle.hazard_source


@few
@given(whole)
def test_what_has_no_spot_price_or_no_rate_is_on_demand_alone(plan: Plan) -> None:
    """No spot run is priced by a rate that nobody stated, unless one is given."""
    way = Way(plan=plan, gpu=GPU, instance=INSTANCE)
    unknown = replace(PRICE, interruption_bucket=None)

    assert len(outlooks(way, replace(PRICE, spot_usd_per_hour=None), STORAGE, SELDOM)) == 1
    assert len(outlooks(way, unknown, STORAGE, Circumstances())) == 1
    assert len(outlooks(way, unknown, STORAGE, SELDOM)) == 2


@few
@given(whole)
def test_a_region_without_a_disks_price_says_so(plan: Plan) -> None:
    """Its dollars are the hours' alone."""
    demand, _ = both(plan, price=replace(PRICE, region="nowhere"))

    assert not demand.disk_is_priced and demand.storage_usd == 0
    assert both(plan)[0].disk_is_priced


@few
@given(whole, st.integers(0, 3))
def test_a_checkpoint_holds_what_is_saved(plan: Plan, held_out: int) -> None:
    """Adapter and optimizer state; the best adapter, too, where one is chosen by held-out text."""
    plan = replace(plan, workload=replace(plan.workload, num_eval_sequences=held_out))

    assert state_bytes(plan) == (400 if held_out else 200) * 2**20 + 2**27


@few
@given(whole)
def test_the_disk_holds_system_and_weights_twice(plan: Plan) -> None:
    """60 GB, and 16 bits for each parameter twice; where all learn, their checkpoints, too."""
    full = replace(plan.configuration, adapter="full", rank=None, alpha=None, target_modules=None)

    assert disk_gb(replace(plan, num_parameters=8_000_000_000)) == 92
    assert disk_gb(replace(plan, num_parameters=1)) == 61
    assert disk_gb(replace(plan, num_parameters=8_000_000_000, configuration=full)) == 92 + 320
