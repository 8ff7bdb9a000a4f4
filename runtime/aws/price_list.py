"""Today's prices from AWS: on demand and storage from its price list, spot from its history, and instances' shapes."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shallowflow.profiles.snapshot import Snapshot, TakenPrice, TakenShape, TakenStorage

from .clients import AwsError, Live

PRICING_REGION = "us-east-1"
"""One of the few where the price list is answered; it has every region's prices."""
PAGE = 100
"""Products in one answer, as many as there can be."""
LINUX = {
    "operatingSystem": "Linux",
    "preInstalledSw": "NA",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}
"""What an instance is that nothing but Linux is bought with, and that is not reserved."""
SPOT_PRODUCT = "Linux/UNIX"
VOLUME = {"productFamily": "Storage", "volumeApiName": "gp3"}
BUCKET = {"productFamily": "Storage", "storageClass": "General Purpose", "volumeType": "Standard"}
BUCKET_USAGE = "TimedStorage-ByteHrs"
HOURLY, MONTHLY = "Hrs", "GB-Mo"
SOURCE = "AWS Price List API; spot: EC2's price history, the median of the zones"
STORAGE_SOURCE = "AWS Price List API"


def take(
    instances: Sequence[str],
    regions: Sequence[str],
    today: datetime.date,
    tell: Callable[[str], None] = lambda _message: None,
) -> Snapshot:
    """What the *instances* and storage cost in the *regions* now, and what they hold.

    An instance without a price on demand in a region is not offered there, and left out.

    Raises:
        AwsError: AWS does not say, or says what is no price.
    """
    date, pricing = f"retrieved {today.isoformat()}", Live(PRICING_REGION)
    spot: dict[tuple[str, str], float] = {}
    shapes: dict[str, TakenShape] = {}
    for region in regions:
        tell(f"spot prices of {region}")
        aws = pricing.elsewhere(region)
        spot |= {(name, region): usd for name, usd in _spot(aws, instances).items()}
        shapes |= {shape.instance: shape for shape in _shapes(aws, sorted(set(instances) - set(shapes)))}
    prices = []
    for name in instances:
        tell(f"prices of {name}")
        for region, usd in sorted(_on_demand(pricing, name, regions).items()):
            prices.append(
                TakenPrice(
                    instance=name,
                    region=region,
                    on_demand_usd_per_hour=usd,
                    spot_usd_per_hour=spot.get((name, region)),
                    date=date,
                    source=SOURCE,
                )
            )
    tell("prices of storage")
    stored = {"volume": _volumes(pricing, regions), "bucket": _buckets(pricing, regions)}
    storage = [
        TakenStorage(kind=kind, region=region, usd_per_gb_month=usd, date=date, source=STORAGE_SOURCE)  # type: ignore[arg-type]
        for kind, found in stored.items()
        for region, usd in sorted(found.items())
    ]
    return Snapshot(prices=tuple(prices), storage=tuple(storage), shapes=tuple(shapes.values()))


# EC2


def _spot(aws: Live, instances: Sequence[str]) -> dict[str, float]:
    """The median over the zones of what each instance costs there now."""
    now = datetime.datetime.now(datetime.UTC)  # from now to now is what holds now
    asked = {"InstanceTypes": list(instances), "ProductDescriptions": [SPOT_PRODUCT], "StartTime": now, "EndTime": now}
    newest: dict[tuple[str, str], tuple[datetime.datetime, float]] = {}
    for page in aws.pages("ec2", "describe_spot_price_history", f"ask for spot prices in {aws.region}", **asked):
        for told in page["SpotPriceHistory"]:
            place = (told["InstanceType"], told["AvailabilityZone"])
            at = (told["Timestamp"], _usd(told["SpotPrice"], f"{place[0]}'s spot price"))
            newest[place] = max(newest.get(place, at), at)
    zones: dict[str, list[float]] = {}
    for (name, _), (_, usd) in newest.items():
        zones.setdefault(name, []).append(usd)
    return {name: statistics.median(several) for name, several in zones.items()}


def _shapes(aws: Live, instances: Sequence[str]) -> Iterator[TakenShape]:
    """What those of the *instances* hold that the region has; none that this cannot tell whole."""
    if not instances:
        return
    named = [{"Name": "instance-type", "Values": list(instances)}]  # a filter refuses no name
    for page in aws.pages("ec2", "describe_instance_types", f"ask what instances hold in {aws.region}", Filters=named):
        for told in page["InstanceTypes"]:
            try:
                yield TakenShape(
                    instance=told["InstanceType"],
                    num_vcpus=told["VCpuInfo"]["DefaultVCpus"],
                    ram_bytes=told["MemoryInfo"]["SizeInMiB"] * 2**20,
                    nvme_bytes=told.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0) * 10**9,
                    network_bits_per_second=_network_gigabits(told["NetworkInfo"]) * 1e9,
                    disk_bytes_per_second=told["EbsInfo"]["EbsOptimizedInfo"]["BaselineThroughputInMBps"] * 1e6,
                )
            except (KeyError, TypeError):
                raise AwsError(f"EC2 does not say what {told.get('InstanceType')} holds; its facts stay") from None


def _network_gigabits(told: Any) -> float:
    """The lasting rate of the first card, which is the one that a machine of its own talks through."""
    return float(told["NetworkCards"][0]["BaselineBandwidthInGbps"])


# The price list


def _on_demand(pricing: Live, instance: str, regions: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for attributes, terms in _products(pricing, "AmazonEC2", {**LINUX, "instanceType": instance}, regions):
        what = f"{instance} in {attributes['regionCode']}"
        for usd in _amounts(terms, HOURLY, what):
            if usd and found.setdefault(attributes["regionCode"], usd) != usd:
                raise AwsError(f"AWS lists two prices of {what}: {found[attributes['regionCode']]} and {usd} dollars")
    return found


def _volumes(pricing: Live, regions: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for attributes, terms in _products(pricing, "AmazonEC2", VOLUME, regions):
        for usd in _amounts(terms, MONTHLY, f"gp3 in {attributes['regionCode']}"):
            found[attributes["regionCode"]] = usd
    return found


def _buckets(pricing: Live, regions: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for attributes, terms in _products(pricing, "AmazonS3", BUCKET, regions):
        usage = str(attributes.get("usagetype", ""))
        if usage == BUCKET_USAGE or usage.rpartition("-" + BUCKET_USAGE)[0].isalnum():  # such as EUC1-TimedStorage...
            amounts = list(_amounts(terms, MONTHLY, f"S3 in {attributes['regionCode']}"))
            found[attributes["regionCode"]] = max(amounts)  # of the tiers, the first terabytes' is the highest
    return found


def _products(pricing: Live, service: str, wanted: dict[str, str], regions: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Attributes and terms on demand of every product that is as *wanted*, in the regions themselves."""
    if len(regions) == 1:
        wanted = {**wanted, "regionCode": regions[0]}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    asked = {"ServiceCode": service, "Filters": filters, "FormatVersion": "aws_v1", "MaxResults": PAGE}
    for page in pricing.pages("pricing", "get_products", f"ask for {service}'s prices", **asked):
        for text in page["PriceList"]:
            try:
                product = json.loads(text)
                attributes = product["product"]["attributes"]
                if attributes["regionCode"] in regions and attributes.get("locationType") == "AWS Region":
                    yield attributes, product["terms"].get("OnDemand", {})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise AwsError(f"the price list of {service} holds what is no product") from None


def _amounts(terms: Any, unit: str, what: str) -> Iterator[float]:
    """Dollars for a *unit* in each of the price's dimensions."""
    try:
        dimensions = [one for term in terms.values() for one in term["priceDimensions"].values()]
        told = [(one["unit"], one["pricePerUnit"]["USD"]) for one in dimensions]
    except (KeyError, TypeError, AttributeError):
        raise AwsError(f"the price list says of {what} what is no price") from None
    for named, usd in told:
        if named == unit:
            yield _usd(usd, what)


def _usd(text: str, what: str) -> float:
    try:
        usd = float(text)
    except (TypeError, ValueError):
        usd = -1.0
    if not 0 <= usd < 1e6:
        raise AwsError(f"AWS says that {what} is {text!r} dollars, which is no price")
    return usd
