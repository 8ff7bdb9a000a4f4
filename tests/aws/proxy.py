"""A bad way to AWS: a proxy that answers with errors, loses, cuts and changes what passes, and is slow."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("503", "500", "409", "lost request", "lost answer", "cut answer", "changed answer", "slow")
SLOW_SECONDS = 0.03


@dataclass
class Way:
    """The way, and how bad it is.

    Attributes:
        share: of the requests something happens to.
        down: whether nothing comes through at all.
        met: how often each fault was.
    """

    endpoint: str = ""
    share: float = 0.0
    down: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    met: Counter[str] = field(default_factory=Counter)

    def fault(self) -> str:
        """What happens to the next request; nothing, mostly."""
        if self.down:
            return "lost request"
        chosen = self.chance.choice(FAULTS) if self.chance.random() < self.share else ""
        self.met[chosen] += 1
        return chosen


class _Handler(BaseHTTPRequestHandler):
    """One request, passed on or not."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def _do(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.way.fault()
        if fault in ("500", "503", "409"):
            self._send(int(fault), {}, b"<Error><Code>Planted</Code></Error>")
            return
        self.close_connection = fault in ("lost request", "lost answer", "cut answer")
        if fault == "lost request":
            return
        time.sleep(SLOW_SECONDS if fault == "slow" else 0)
        status, headers, body = self._passed_on(content)
        if fault == "changed answer" and self.command == "GET" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault != "lost answer":
            self._send(status, headers, body, share=0.5 if fault == "cut answer" else 1.0)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _do  # noqa: N815

    def _passed_on(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.target, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, content, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    def _send(self, status: int, headers: dict[str, str], body: bytes, share: float = 1.0) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if status != 204:
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(len(body) * share)])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, way: Way, target: tuple[str, int]) -> None:
        self.way, self.target = way, target
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is none of the proxy's affairs."""


@contextmanager
def leading(to: str) -> Iterator[Way]:
    """A way on this machine that leads to the endpoint *to*."""
    way, target = Way(), urllib.parse.urlsplit(to)
    server = _Server(way, (str(target.hostname), int(target.port or 80)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    way.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield way
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
