"""Questions and orders to AWS, through boto3 or rehearsed: the same code asks, whoever answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import boto3
import botocore.config
import botocore.exceptions

from .errors import reason

HINTS = {
    "InsufficientInstanceCapacity": "AWS has no such instance to spare there now; try another --region, or later",
    "InstanceLimitExceeded": "the account may not have more of them; ask AWS for a higher quota",
    "MaxSpotInstanceCountExceeded": "the account's quota of spot vCPUs is used up, or is 0; ask AWS for a higher one",
    "OptInRequired": "the account has to enable it first",
    "ParameterNotFound": "there is no such image there; name one with --image",
    "SpotMaxPriceTooLow": "the price on the market is above the one on demand; try --on-demand",
    "UnauthorizedOperation": "docs/aws.md has the policies that are needed",
    "AccessDeniedException": "docs/aws.md has the policies that are needed",
    "UnsupportedOperation": "that instance is not offered so",
    "Unsupported": "that instance is not offered there",
    "VcpuLimitExceeded": "the account's quota of vCPUs for such instances is too small; ask AWS for a higher one",
}
"""What helps, by AWS's code of an error."""


class AwsError(ValueError):
    """What AWS did not do: one line that says what, its code, and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to AWS.

    Attributes:
        purpose: in words.
    """

    service: str
    operation: str
    region: str
    purpose: str
    parameters: Mapping[str, Any]


class Aws(Protocol):
    """Who answers."""

    region: str

    def ask(self, service: str, operation: str, purpose: str, **parameters: Any) -> Any:
        """AWS's answer.

        Raises:
            AwsError: there is none.
        """


@dataclass(slots=True)
class Live:
    """AWS itself; credentials and endpoints are boto3's to find."""

    region: str
    session: Any = field(default_factory=boto3.Session)
    _clients: dict[str, Any] = field(default_factory=dict)

    def elsewhere(self, region: str) -> Live:
        """The same in another region; it shares what is slow to load."""
        return Live(region, self.session)

    def ask(self, service: str, operation: str, purpose: str, **parameters: Any) -> Any:
        """AWS's answer; what may pass is tried again by boto3.

        Raises:
            AwsError: there is none.
        """
        try:
            return getattr(self.client(service), operation)(**parameters)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, ValueError) as error:
            why = reason(error)
            hint = HINTS.get(why)
            raise AwsError(f"{purpose}: {service} answers {why}{f' ({hint})' if hint else ''}") from None

    def pages(self, service: str, operation: str, purpose: str, **parameters: Any) -> Iterator[Any]:
        """AWS's answers, page after page.

        Raises:
            AwsError: one is missing.
        """
        more: dict[str, Any] = {}
        while True:
            answer = self.ask(service, operation, purpose, **parameters, **more)
            yield answer
            if not answer.get("NextToken"):
                return
            more = {"NextToken": answer["NextToken"]}

    def client(self, service: str) -> Any:
        """The one of boto3, made when it is first wanted."""
        if service not in self._clients:
            config = botocore.config.Config(
                connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 5}
            )
            self._clients[service] = self.session.client(service, region_name=self.region, config=config)
        return self._clients[service]


@dataclass(slots=True)
class Rehearsal:
    """Nobody: notes what would be asked, and answers with stand-ins, as where nothing was ever started.

    Attributes:
        answers: by operation.
    """

    region: str
    answers: Mapping[str, Any]
    calls: list[Call] = field(default_factory=list)

    def ask(self, service: str, operation: str, purpose: str, **parameters: Any) -> Any:
        """A stand-in."""
        self.calls.append(
            Call(service=service, operation=operation, region=self.region, purpose=purpose, parameters=parameters)
        )
        return self.answers.get(operation, {})
