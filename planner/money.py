"""Dollars for hours, from dated prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shallowflow.profiles.specs import InstanceSpec, Price

from . import machines
from .plan import Offer, Workload


def offers(
    instances: Sequence[InstanceSpec], workload: Workload, hours: Callable[[InstanceSpec], float]
) -> tuple[Offer, ...]:
    """What the *hours* on the instances that have enough GPUs and a price in the region cost, cheapest first.

    Set-up, storage, transfer and spot interruptions are left out.
    """
    found = [
        _offer(instance, price, hours(instance), workload.num_machines)
        for instance in machines.suitable(instances, workload.gpus_per_machine)
        for price in instance.prices
        if price.region == workload.region
    ]
    return tuple(sorted(found, key=lambda offer: (offer.on_demand_usd, offer.instance)))


def hours_for(budget_usd: float, instances: Sequence[InstanceSpec], workload: Workload) -> float | None:
    """How long *budget_usd* last on the cheapest of *instances* on demand; None where none has a price."""
    prices = [
        price.on_demand_usd_per_hour * workload.num_machines
        for instance in machines.suitable(instances, workload.gpus_per_machine)
        for price in instance.prices
        if price.region == workload.region
    ]
    return budget_usd / min(prices) if prices else None


def _offer(instance: InstanceSpec, price: Price, hours: float, number: int) -> Offer:
    spot = price.spot_usd_per_hour
    return Offer(
        instance=instance.name,
        region=price.region,
        hours=hours,
        on_demand_usd_per_hour=price.on_demand_usd_per_hour,
        on_demand_usd=price.on_demand_usd_per_hour * hours * number,
        spot_usd_per_hour=spot,
        spot_usd=None if spot is None else spot * hours * number,
        price_date=price.date,
        price_source=price.source,
        num_instances=number,
    )
