"""Dollars for hours, from dated prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shallowflow.profiles.specs import InstanceSpec, Price

from .plan import Offer


def offers(
    instances: Sequence[InstanceSpec], region: str, num_gpus: int, hours: Callable[[InstanceSpec], float]
) -> tuple[Offer, ...]:
    """What the *hours* on each instance with *num_gpus* GPUs or more and a price in *region* cost, cheapest first.

    Set-up, storage, transfer and spot interruptions are left out.
    """
    found = [
        _offer(instance, price, hours(instance))
        for instance in instances
        if instance.num_gpus >= num_gpus
        for price in instance.prices
        if price.region == region
    ]
    return tuple(sorted(found, key=lambda offer: (offer.on_demand_usd, offer.instance)))


def hours_for(budget_usd: float, instances: Sequence[InstanceSpec], region: str, num_gpus: int) -> float | None:
    """How long *budget_usd* last on the cheapest of *instances* on demand; None where none has a price."""
    prices = [
        price.on_demand_usd_per_hour
        for instance in instances
        if instance.num_gpus >= num_gpus
        for price in instance.prices
        if price.region == region
    ]
    return budget_usd / min(prices) if prices else None


def _offer(instance: InstanceSpec, price: Price, hours: float) -> Offer:
    spot = price.spot_usd_per_hour
    return Offer(
        instance=instance.name,
        region=price.region,
        hours=hours,
        on_demand_usd_per_hour=price.on_demand_usd_per_hour,
        on_demand_usd=price.on_demand_usd_per_hour * hours,
        spot_usd_per_hour=spot,
        spot_usd=None if spot is None else spot * hours,
        price_date=price.date,
        price_source=price.source,
    )
