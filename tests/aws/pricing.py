"""AWS's price list and the history of spot prices, over HTTP, as their documents have them; all else is moto's.

One address serves both: ``AWS_ENDPOINT_URL_PRICING`` and ``AWS_ENDPOINT_URL_EC2``.
"""

from __future__ import annotations

import datetime
import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

XMLNS = "http://ec2.amazonaws.com/doc/2016-11-15/"
MOST_RESULTS = 100


@dataclass(frozen=True)
class Spot:
    """One change of a price, after which it holds until the next."""

    instance: str
    zone: str
    usd: str
    at: datetime.datetime
    product: str = "Linux/UNIX"


@dataclass
class Market:
    """What the service says.

    Attributes:
        endpoint: where it is.
        behind: where moto is.
        products: of the price list, each with ``service``, ``attributes`` and ``terms``.
        spot: changes of prices.
        page: entries in an answer, at most.
        broken: text that stands in the place of every product, where there is one.
        denied: codes of errors, by operation.
        asked: operation and region of every request so far.
    """

    behind: str
    endpoint: str = ""
    products: list[dict[str, Any]] = field(default_factory=list)
    spot: list[Spot] = field(default_factory=list)
    page: int = MOST_RESULTS
    broken: str = ""
    denied: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def sells(self, instance: str, region: str, usd: float, **attributes: str) -> None:
        """List an instance on demand, and beside it what is easily taken for that."""
        plain = {
            "instanceType": instance,
            "regionCode": region,
            "locationType": "AWS Region",
            "operatingSystem": "Linux",
            "preInstalledSw": "NA",
            "tenancy": "Shared",
            "capacitystatus": "Used",
            "marketoption": "OnDemand",
            **attributes,
        }
        others: tuple[dict[str, str], ...] = (
            {"operatingSystem": "Windows"},
            {"tenancy": "Dedicated"},
            {"preInstalledSw": "SQL Std"},
            {"capacitystatus": "UnusedCapacityReservation"},
            {"marketoption": "CapacityBlock"},
            {"locationType": "AWS Local Zone"},
        )
        self.products.append(product("AmazonEC2", plain, ("Hrs", usd)))
        self.products += [product("AmazonEC2", {**plain, **other}, ("Hrs", 2 * usd + 1)) for other in others]

    def stores(self, region: str, volume_usd: float, bucket_usd: float, short: str = "") -> None:
        """List gp3 and S3 Standard, whose price falls with the terabytes, and their neighbours."""
        place = {"regionCode": region, "locationType": "AWS Region", "productFamily": "Storage"}
        for name, usd in (("gp3", volume_usd), ("io2", 9.0)):
            self.products.append(product("AmazonEC2", {**place, "volumeApiName": name}, ("GB-Mo", usd)))
        usage = {**place, "storageClass": "General Purpose", "volumeType": "Standard"}
        tiers = [("GB-Mo", bucket_usd), ("GB-Mo", bucket_usd - 0.001), ("GB-Mo", bucket_usd - 0.002)]
        self.products.append(product("AmazonS3", {**usage, "usagetype": f"{short}TimedStorage-ByteHrs"}, *tiers))
        other = {**usage, "usagetype": f"{short}TimedStorage-INT-FA-ByteHrs"}
        self.products.append(product("AmazonS3", other, ("GB-Mo", 5.0)))

    def get_products(self, asked: Any) -> tuple[int, dict[str, Any]]:
        """GetProducts: products that match every filter, as strings, a page of them."""
        filters, most = asked.get("Filters", []), asked.get("MaxResults", MOST_RESULTS)
        if any(one["Type"] != "TERM_MATCH" for one in filters) or not 1 <= most <= MOST_RESULTS:
            return 400, {"__type": "InvalidParameterException"}
        found = [
            one
            for one in self.products
            if one["service"] == asked["ServiceCode"]
            and all(one["attributes"].get(each["Field"]) == each["Value"] for each in filters)
        ]
        token = asked.get("NextToken", "0")
        if not token.isdecimal() or int(token) > len(found):
            return 400, {"__type": "InvalidNextTokenException"}
        first, size = int(token), min(most, self.page)
        texts = [self.broken or json.dumps(whole(one)) for one in found[first : first + size]]
        more = {"NextToken": str(first + size)} if first + size < len(found) else {}
        return 200, {"FormatVersion": "aws_v1", "PriceList": texts, **more}

    def history(self, asked: dict[str, str]) -> bytes:
        """DescribeSpotPriceHistory: changes between two times, and before the first the one that held then."""
        instances, products = (
            {value for key, value in asked.items() if key.startswith(f"{name}.")}
            for name in ("InstanceType", "ProductDescription")
        )
        start, end = (datetime.datetime.fromisoformat(asked[name]) for name in ("StartTime", "EndTime"))
        known = sorted((s for s in self.spot if s.at <= end), key=lambda one: one.at, reverse=True)
        known = [s for s in known if s.instance in instances and s.product in products]
        known = [s for s in known if s.zone.startswith(asked["region"])]
        found: list[Spot] = []
        held: set[tuple[str, str]] = set()
        for one in known:
            if one.at >= start or (one.instance, one.zone) not in held:
                found.append(one)
            if one.at <= start:
                held.add((one.instance, one.zone))
        first = int(asked.get("NextToken") or 0)
        more = str(first + self.page) if first + self.page < len(found) else ""
        items = "".join(item(one) for one in found[first : first + self.page])
        return (
            f'<DescribeSpotPriceHistoryResponse xmlns="{XMLNS}"><requestId>1</requestId>'
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{more}</nextToken>"
            "</DescribeSpotPriceHistoryResponse>"
        ).encode()


def product(service: str, attributes: dict[str, str], *prices: tuple[str, float]) -> dict[str, Any]:
    """A product with its price on demand, which may have several tiers."""
    return {"service": service, "attributes": attributes, "prices": prices}


def whole(made: dict[str, Any]) -> dict[str, Any]:
    """A product as the price list tells of it; a price that is reserved stands beside the one on demand."""
    tiers = {
        f"SKU.TERM.{number}": {
            "unit": unit,
            "beginRange": str(number * 51_200),
            "pricePerUnit": {"USD": f"{usd:.10f}"},
            "description": "",
        }
        for number, (unit, usd) in enumerate(made["prices"])
    }
    reserved = {"SKU.R": {"priceDimensions": {"SKU.R.1": {"unit": "Hrs", "pricePerUnit": {"USD": "0.0010000000"}}}}}
    return {
        "product": {"productFamily": "x", "attributes": made["attributes"], "sku": "SKU"},
        "serviceCode": made["service"],
        "terms": {"OnDemand": {"SKU.TERM": {"priceDimensions": tiers, "sku": "SKU"}}, "Reserved": reserved},
        "version": "1",
        "publicationDate": "2026-01-01T00:00:00Z",
    }


def item(one: Spot) -> str:
    """A change of a price as EC2 writes it."""
    at = one.at.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return (
        f"<item><instanceType>{one.instance}</instanceType><productDescription>{escape(one.product)}"
        f"</productDescription><spotPrice>{one.usd}</spotPrice><timestamp>{at}</timestamp>"
        f"<availabilityZone>{one.zone}</availabilityZone></item>"
    )


@contextmanager
def serving(behind: str) -> Iterator[Market]:
    """The market on a port of this machine, before moto."""
    market = Market(behind)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            scope = re.search(r"Credential=[^/]+/\d+/([\w-]+)/", self.headers.get("Authorization", ""))
            region = scope[1] if scope else ""
            if "x-amz-target" in self.headers:
                operation = self.headers["x-amz-target"].rpartition(".")[2]
            else:
                form = dict(urllib.parse.parse_qsl(content.decode()))
                operation = form["Action"]
            market.asked.append((operation, region))
            if operation in market.denied:
                self._deny(market.denied[operation], is_json="x-amz-target" in self.headers)
            elif operation == "GetProducts":
                status, told = market.get_products(json.loads(content))
                self._send(status, json.dumps(told).encode(), "application/x-amz-json-1.1")
            elif operation == "DescribeSpotPriceHistory":
                self._send(200, market.history({**form, "region": region}), "text/xml")
            else:
                self._pass_on(content)

        def _deny(self, code: str, *, is_json: bool) -> None:
            text = f"account 123456789012 may not, says {code}"
            if is_json:
                self._send(400, json.dumps({"__type": code, "message": text}).encode(), "application/x-amz-json-1.1")
                return
            body = f"<Response><Errors><Error><Code>{code}</Code><Message>{text}</Message></Error></Errors></Response>"
            self._send(403, body.encode(), "text/xml")

        def _pass_on(self, content: bytes) -> None:
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(market.behind).netloc, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
            connection.request("POST", self.path, content, headers)
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            self._send(answer.status, body, answer.getheader("Content-Type", "text/xml"))

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response_only(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    market.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield market
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
