"""Hours times dated prices, for the instances that can do the work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.money import offers
from shallowflow.planner.plan import Workload
from shallowflow.profiles import InstanceSpec, Price, load_instances

REGIONS = ["us-east-1", "eu-west-1", "ap-south-1"]
usd = st.floats(0.01, 100)
prices = st.builds(
    Price,
    region=st.sampled_from(REGIONS),
    on_demand_usd_per_hour=usd,
    spot_usd_per_hour=st.none() | usd,
    interruption_bucket=st.none(),
    date=st.just("2026-01-01"),
    source=st.just("a list"),
)
instances = st.builds(
    InstanceSpec,
    name=st.text("abc", min_size=1, max_size=4),
    cloud=st.just("aws"),
    gpu=st.just("t4"),
    num_gpus=st.integers(1, 8),
    num_vcpus=st.just(4),
    ram_bytes=st.just(2**34),
    nvme_bytes=st.just(0),
    network_bits_per_second=st.just(1e9),
    disk_bytes_per_second=st.just(1e8),
    prices=st.lists(prices, max_size=3, unique_by=lambda price: price.region).map(tuple),
)
requests = st.tuples(st.lists(instances, max_size=6), st.sampled_from(REGIONS), st.integers(1, 8), st.floats(0, 1e4))


@given(requests)
def test_offers_are_those_of_the_region_with_gpus_enough(
    request: tuple[list[InstanceSpec], str, int, float],
) -> None:
    """One offer for each instance that has the GPUs and a price in the region, and for no other."""
    specs, region, num_gpus, hours = request

    found = offers(specs, Workload(region=region, num_gpus=num_gpus), lambda _instance: hours)

    able = [s.name for s in specs if s.num_gpus >= num_gpus and region in {price.region for price in s.prices}]
    assert sorted(offer.instance for offer in found) == sorted(able)
    assert {offer.region for offer in found} <= {region}


@given(requests)
def test_offers_are_sorted_and_cost_their_hours(request: tuple[list[InstanceSpec], str, int, float]) -> None:
    """Cheapest first; each price times the hours, and no spot price where there is none."""
    specs, region, num_gpus, hours = request
    found = offers(specs, Workload(region=region, num_gpus=num_gpus), lambda _instance: hours)

    assert [offer.on_demand_usd for offer in found] == sorted(offer.on_demand_usd for offer in found)
    for offer in found:
        assert offer.hours == request[3]
        assert offer.on_demand_usd == pytest.approx(offer.on_demand_usd_per_hour * offer.hours)
        assert (offer.spot_usd is None) == (offer.spot_usd_per_hour is None)
        if offer.spot_usd is not None and offer.spot_usd_per_hour is not None:
            assert offer.spot_usd == pytest.approx(offer.spot_usd_per_hour * offer.hours)


def test_a_t4_for_an_hour_costs_what_its_list_says() -> None:
    """The shipped price of the smallest T4 instance comes first, with its date and source."""
    specs = load_instances("t4")
    cheapest = min((p.on_demand_usd_per_hour, s.name) for s in specs for p in s.prices if p.region == "us-east-1")

    found = offers(specs, Workload(), lambda _instance: 1.0)

    assert (found[0].on_demand_usd, found[0].instance) == cheapest
    assert all(offer.price_date and offer.price_source for offer in found)


def test_four_gpus_are_not_offered_on_one() -> None:
    """Only instances with as many GPUs as the work wants are offered."""
    specs = load_instances("t4")
    enough = {spec.name for spec in specs if spec.num_gpus >= 4}

    found = {offer.instance for offer in offers(specs, Workload(num_gpus=4), lambda _instance: 1.0)}

    assert found <= enough
    assert found


@given(requests, st.integers(2, 5))
def test_several_machines_cost_as_many_times_as_much(
    request: tuple[list[InstanceSpec], str, int, float], number: int
) -> None:
    """Each machine has its part of the GPUs and takes all of the hours."""
    specs, region, num_gpus, hours = request
    one = offers(specs, Workload(region=region, num_gpus=num_gpus), lambda _instance: hours)
    several = offers(
        specs, Workload(region=region, num_gpus=num_gpus * number, num_machines=number), lambda _instance: hours
    )

    assert [offer.instance for offer in several] == [offer.instance for offer in one]
    for few, many in zip(one, several, strict=True):
        assert many.num_instances == number and many.hours == few.hours
        assert many.on_demand_usd == pytest.approx(number * few.on_demand_usd)
