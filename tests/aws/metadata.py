"""An instance's metadata service, version 2, over HTTP, as far as a run asks it; with a notice when a test says so."""

from __future__ import annotations

import datetime
import email.utils
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.aws import planted

INTERRUPTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
MOST_SECONDS = 21_600


@dataclass
class Service:
    """What the service says.

    Attributes:
        endpoint: where it is.
        told: documents by path; all else is not found.
        tokens: those that are good.
        asked: method, path and status of every request so far.
        clock_ahead: of the service's clock before this machine's; None sends no date.
    """

    endpoint: str = ""
    told: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    clock_ahead: datetime.timedelta | None = datetime.timedelta()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def notice(self, seconds: float = 120, action: str = "terminate") -> None:
        """Say from now on that the instance ends in so many seconds."""
        ahead = self.clock_ahead or datetime.timedelta()
        time = datetime.datetime.now(datetime.UTC) + ahead + datetime.timedelta(seconds=seconds)
        self.told[INTERRUPTION] = {"action": action, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def advise(self) -> None:
        """Recommend to be elsewhere soon."""
        now = datetime.datetime.now(datetime.UTC)
        self.told[REBALANCE] = {"noticeTime": now.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def forget_tokens(self) -> None:
        """Let no token be good any more."""
        with self.lock:
            self.tokens.clear()

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, bytes]:
        """Status and body, as AWS documents them."""
        with self.lock:
            status, body = self._answer(method, path, headers)
            self.asked.append((method, path, status))
        return status, body

    def _answer(self, method: str, path: str, headers: Any) -> tuple[int, bytes]:
        if method == "PUT" and path == "/latest/api/token":
            lasts = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if not (lasts.isdigit() and 1 <= int(lasts) <= MOST_SECONDS) or "X-Forwarded-For" in headers:
                return 400, b"Bad Request"
            token = f"{planted.METADATA_TOKEN}-{uuid.uuid4().hex}"
            self.tokens.add(token)
            return 200, token.encode()
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, b"Unauthorized"
        if path not in self.told:
            return 404, b"Not Found"
        return 200, json.dumps(self.told[path]).encode()


@contextmanager
def serving() -> Iterator[Service]:
    """The service on a port of this machine."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            status, body = service.answer(self.command, self.path, self.headers)
            self.send_response_only(status)
            if service.clock_ahead is not None:
                now = datetime.datetime.now(datetime.UTC) + service.clock_ahead
                self.send_header("Date", email.utils.format_datetime(now, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = _do  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    service.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
