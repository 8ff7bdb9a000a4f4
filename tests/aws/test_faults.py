"""Whatever happens to machine, network and store: no damaged checkpoint is believed, no more than an interval is lost.

``SHALLOWFLOW_FAULTS`` says how many runs are disturbed, each with some sessions, ``SHALLOWFLOW_FAULTS_FIRST`` which is
the first.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from shallowflow.runtime.aws import s3
from tests.aws import faults, metadata, proxy

NUM_CASES = int(os.environ.get("SHALLOWFLOW_FAULTS", "5"))
FIRST_CASE = int(os.environ.get("SHALLOWFLOW_FAULTS_FIRST", "0"))


def test_whatever_happens(endpoint: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run comes to its end or that of its budget, which is passed by no more than one step's cost."""
    monkeypatch.setattr(s3, "PART_BYTES", 16_384)
    monkeypatch.setattr(s3, "READ_SECONDS", 5.0)
    ends: Counter[str] = Counter()
    with proxy.leading(endpoint) as way, metadata.serving() as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.endpoint)
        for number in range(FIRST_CASE, FIRST_CASE + NUM_CASES):
            case = faults.run_case(number, bucket, tmp_path, way, service)
            ends.update(case.found)
        met = dict(way.met)

    print(ends, met)
    assert ends["completed"] and ends["killed"]
    assert all(met.get(fault) for fault in proxy.FAULTS)
