"""What AWS has billed for what carries a tag, day by day, from Cost Explorer."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.exceptions

from .errors import reason

TAG = "shallowflow-run"
"""The key of the tag that an instance carries for its run."""
METRIC = "UnblendedCost"
"""What was charged, before it is spread over an organization's accounts."""


class BillError(ValueError):
    """A bill that cannot be had: one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """What was billed for one day (UTC).

    Attributes:
        estimated: whether AWS may still change it.
    """

    date: str
    usd: float
    estimated: bool


def billed(key: str, value: str, first: datetime.date, last: datetime.date) -> tuple[Day, ...]:
    """All that carries the tag *key* with *value*, from *first* to *last*, both included.

    Raises:
        BillError: Cost Explorer gives no answer, or one in another currency.
    """
    asked: dict[str, Any] = {
        "TimePeriod": {"Start": first.isoformat(), "End": (last + datetime.timedelta(days=1)).isoformat()},
        "Granularity": "DAILY",
        "Metrics": [METRIC],
        "Filter": {"Tags": {"Key": key, "Values": [value], "MatchOptions": ["EQUALS"]}},
    }
    found: list[Day] = []
    try:
        client: Any = boto3.Session().client("ce", region_name="us-east-1")  # the one place where it is
        while True:
            answer = client.get_cost_and_usage(**asked)
            found += [_day(one) for one in answer["ResultsByTime"]]
            if not answer.get("NextPageToken"):
                return tuple(found)
            asked["NextPageToken"] = answer["NextPageToken"]
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise BillError(f"Cost Explorer gives no bill: {reason(error)}") from None


def _day(told: Any) -> Day:
    cost = told["Total"][METRIC]
    if cost["Unit"] != "USD":
        raise BillError(f"the bill is in {cost['Unit']}, and the run was reckoned in USD")
    return Day(date=told["TimePeriod"]["Start"], usd=float(cost["Amount"]), estimated=bool(told["Estimated"]))
