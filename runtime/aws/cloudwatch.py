"""A run's figures in CloudWatch: sent in batches by a thread, so that training never waits; failures only warn."""

from __future__ import annotations

import datetime
import math
import threading
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from shallowflow.runtime.meter import MeasuredPeak
from shallowflow.runtime.record import EvaluationRecord, StepRecord

from .errors import reason

NAMESPACE = "ShallowFlow"
MOST_IN_A_REQUEST = 1000
"""Figures, as many as CloudWatch takes at once."""
MOST_WAITING = 20_000
"""Figures that are kept for a network that comes back; the oldest go first."""
BATCH_SECONDS, LAST_SECONDS = 10.0, 15.0
"""Between two batches, and for the last one."""


class CloudWatch:
    """Figures on their way to CloudWatch, all with the dimension ``Run``."""

    def __init__(self, run: str) -> None:
        self._dimensions = [{"Name": "Run", "Value": run}]
        self._waiting: list[dict[str, Any]] = []
        self._news: list[str] = []
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cloudwatch", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord, peak: MeasuredPeak | None, usd: float | None) -> None:
        """One update: its loss and speed, the measured memory, and what the run has cost so far."""
        self._put("Loss", record.loss, "None")
        self._put("TokensPerSecond", record.num_target_tokens / record.seconds, "Count/Second")
        if peak is not None:
            self._put("PeakMemoryAllocated", peak.peak_allocated_bytes, "Bytes")
        if usd is not None:
            self._put("CostUSD", usd, "None")

    def evaluation(self, record: EvaluationRecord) -> None:
        """One evaluation's loss."""
        self._put("EvaluationLoss", record.loss, "None")

    def news(self) -> list[str]:
        """Why figures did not arrive, once for each reason."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def finish(self) -> None:
        """Send what waits; what takes longer than LAST_SECONDS is lost."""
        self._ends.set()
        self._thread.join(LAST_SECONDS)

    def _put(self, name: str, value: float, unit: str) -> None:
        if not math.isfinite(value):  # which CloudWatch refuses, with all else that comes along
            return
        figure = {
            "MetricName": name,
            "Dimensions": self._dimensions,
            "Timestamp": datetime.datetime.now(datetime.UTC),
            "Value": float(value),
            "Unit": unit,
        }
        with self._lock:
            self._waiting = [*self._waiting[1 - MOST_WAITING :], figure]

    def _work(self) -> None:
        told: set[str] = set()
        client: Any = None
        while True:
            last = self._ends.wait(BATCH_SECONDS)
            try:
                if client is None:
                    config = botocore.config.Config(
                        connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 3}
                    )
                    client = boto3.Session().client("cloudwatch", config=config)
                self._send(client)
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError, ValueError) as error:
                why = reason(error)
                if why not in told:
                    told.add(why)
                    with self._lock:
                        self._news.append(f"CloudWatch does not take the run's figures: {why}")
            if last:
                return

    def _send(self, client: Any) -> None:
        while True:
            with self._lock:
                batch = self._waiting[:MOST_IN_A_REQUEST]
            if not batch:
                return
            client.put_metric_data(Namespace=NAMESPACE, MetricData=batch)
            sent = {id(figure) for figure in batch}
            with self._lock:
                self._waiting = [figure for figure in self._waiting if id(figure) not in sent]
