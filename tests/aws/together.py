"""Two processes that train together and keep their checkpoints in S3; one hears that its machine is taken.

python -m tests.aws.together

Runs in a process of its own, whose forks start with one thread. Prints JSON: what each came to, in each session.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
import warnings
from dataclasses import replace
from typing import Any

import boto3
import torch

from shallowflow.runtime import build, joining, quantized
from shallowflow.runtime.learner import Learner
from shallowflow.runtime.spot import MOST_SECONDS, Notice
from tests.runtime import several, tiny

BUCKET, AFTER = "together", 3


def noticed(learner: Learner) -> None:
    """Let the second process hear of its machine's end, after some steps."""
    if learner.work.ranks.rank == 1 and len(learner.progress.steps) == AFTER:
        now = time.perf_counter()
        learner.work.guard.inbox.interrupt(
            Notice(action="terminate", time="soon", received=now, deadline=now + MOST_SECONDS)
        )


def main() -> None:
    """One run in one go; the same until the notice; and on from there, on an empty disk."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    joining.PATIENCE = datetime.timedelta(seconds=60)
    quantized.bitsandbytes()
    build.add_adapters(tiny.base(), rank=1, alpha=1)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    plan, stored = several.planned(2), several.request("first", store=f"s3://{BUCKET}/run", save_every=100)

    def work(wanted: Any, strike: Any, _rank: int) -> Any:
        return several.trained(plan, wanted, strike)

    whole = several.in_processes(2, functools.partial(work, several.request("whole"), lambda _learner: None))
    first = several.in_processes(2, functools.partial(work, stored, noticed))
    following = replace(stored, output=several.place() / "second", resume=True)
    last = several.in_processes(2, functools.partial(work, following, lambda _learner: None))
    print(json.dumps({"whole": whole, "first": first, "last": last}))


if __name__ == "__main__":
    main()
