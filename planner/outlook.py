"""What a plan's run comes to on one instance in one region, on demand or spot: hours, dollars, interruptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal

from shallowflow.profiles.specs import GpuSpec, InstanceSpec, Price, StorageSpec

from . import spot, wall_time
from .bounds import Meta
from .hazard import HOURS_PER_MONTH, Case, Hazard, of_bucket
from .plan import Plan, Seconds, Usd
from .strategies import Positive

Market = Literal["on demand", "spot"]

SETUP_SECONDS = 300.0
"""From an instance's start to the program's, with everything installed; a choice, not a measurement."""
WAITING_SECONDS = 300.0
"""From an interruption to the start of a replacement; a choice: where there is no capacity it takes as long as that."""
HASHED_BYTES_PER_SECOND = 1.0e9
"""SHA-256 on one core of a 2-core cloud machine that has instructions for it (0.97 GB/s)."""
SYSTEM_BYTES = 60 * 10**9
"""Of the disk, for the system, CUDA and Python's packages."""
LEARNED_BYTES = 3 * 12 + 4
"""For each parameter that learns: weight and two moments in fp32 in two checkpoints and one that is being written, and
the model. Of an adapter they are few enough."""
CHECKPOINTS_KEPT = 2
BILLED_GB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What is assumed of instances.

    Attributes:
        setup_seconds: see SETUP_SECONDS; the weights' download comes on top.
        waiting_seconds: see WAITING_SECONDS.
        case: which end of what is known of interruptions, or the middle.
        hazard: of all instances; None for what each one's price says.
        noticed_share: of interruptions, those whose notice is acted upon. None by default: AWS calls notices best
            effort, and periodic checkpoints are what a run can rely on.
    """

    setup_seconds: float = SETUP_SECONDS
    waiting_seconds: float = WAITING_SECONDS
    case: Case = "middle"
    hazard: Hazard | None = None
    noticed_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """One way to run a plan, and what it comes to.

    Attributes:
        num_gpus, num_machines: GPUs in all, in so many instances that work together.
        what_if: what differs from the workload that was asked for, as ``name=value``; empty where nothing does.
        hours, usd: expected.
        nine_of_ten_hours, nine_of_ten_usd: that nine of ten runs do not exceed; of the dollars, storage as expected.
        storage_usd: the disk's and the bucket's part of *usd*, as far as their prices are known.
        disk_is_priced: whether the disk's is, in this region; else the dollars are some percent too few.
        low_usd, high_usd: expected, at the ends of what is known of interruptions.
        interruptions: expected, of any instance.
        interval_steps, interval_seconds: between checkpoints; None where none is worth its time.
        usd_per_hour: of all instances together.
        hazard_source: of the rate of interruptions; None on demand.
    """

    instance: str
    region: str
    market: Market
    gpu: str
    num_gpus: Positive
    num_machines: Positive
    what_if: str
    hours: Seconds
    nine_of_ten_hours: Seconds
    usd: Usd
    nine_of_ten_usd: Usd
    storage_usd: Usd
    disk_is_priced: bool
    low_usd: Usd
    high_usd: Usd
    interruptions: Annotated[float, Meta(ge=0)]
    interval_steps: Positive | None
    interval_seconds: Seconds | None
    tokens_per_usd: Annotated[float, Meta(ge=0)]
    usd_per_hour: Usd
    price_date: str
    price_source: str
    hazard_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A plan on an instance, without its price.

    Attributes:
        gpu: that the plan is for.
        what_if: see Outlook.
    """

    plan: Plan
    gpu: GpuSpec
    instance: InstanceSpec
    what_if: str = ""


def outlooks(way: Way, price: Price, storage: StorageSpec, circumstances: Circumstances) -> list[Outlook]:
    """What *way* comes to at *price*: on demand, and spot where that is offered and its interruptions are known."""
    alone = job(way, circumstances)
    found = [_outlook(way, price, storage, alone, None)]
    bucket = price.interruption_bucket
    hazard = circumstances.hazard or (None if bucket is None else of_bucket(bucket, price.source))
    if price.spot_usd_per_hour is not None and hazard is not None:
        number = way.plan.workload.num_machines
        rates = [number * hazard.per_hour(case) / 3600 for case in (circumstances.case, "low", "high")]
        found.append(_outlook(way, price, storage, alone, (hazard.source, rates)))
    return found


def job(way: Way, circumstances: Circumstances) -> spot.Job:
    """The run on an instance of its own disk and network, without interruptions.

    A checkpoint holds training up while it is copied to the host, written and hashed; its upload goes on beside the
    training, at the network's baseline.
    """
    plan, instance = way.plan, way.instance
    disk = min(instance.disk_bytes_per_second, wall_time.DISK_BYTES_PER_SECOND)
    network = instance.network_bits_per_second / 8
    learned, state = learned_bytes(plan), state_bytes(plan)
    wall = wall_time.wall_time(
        num_parameters=plan.num_parameters,
        total_tokens=plan.workload.total_tokens,
        training_seconds=plan.wall.training_seconds,
        evaluation_seconds=plan.wall.evaluation_seconds,
        saved_bytes=learned,
        checkpoint_bytes=0,  # which are counted apart, as often as they are worth it
        host_to_device_bytes_per_second=way.gpu.pcie_bytes_per_second,
        disk_bytes_per_second=disk,
    )
    weights = plan.num_parameters * wall_time.CHECKPOINT_BYTES_PER_PARAMETER
    ready = circumstances.setup_seconds + weights / min(network, disk)
    ready += wall.start_seconds + wall.load_seconds + wall.tokenize_seconds
    return spot.Job(
        num_steps=plan.num_steps,
        step_seconds=plan.mean_step_seconds,
        first_seconds=ready + wall.evaluation_seconds / wall_time.NUM_EVALUATIONS,
        again_seconds=ready + state / min(network, disk) + state / disk,
        last_seconds=wall.evaluation_seconds / wall_time.NUM_EVALUATIONS + wall.save_seconds + learned / network,
        checkpoint_seconds=state * (1 / way.gpu.pcie_bytes_per_second + 1 / disk + 1 / HASHED_BYTES_PER_SECOND),
        upload_seconds=state / network,
        waiting_seconds=circumstances.waiting_seconds,
        interruptions_per_second=0.0,
        noticed_share=circumstances.noticed_share,
        num_machines=plan.workload.num_machines,
    )


def learned_bytes(plan: Plan) -> int:
    """The adapter, or in full fine-tuning all weights."""
    parts = {part.category: part.num_bytes for part in plan.memory}
    return parts.get("weights" if plan.configuration.is_full else "adapter", 0)


def state_bytes(plan: Plan) -> int:
    """What a checkpoint holds: what was learned, the optimizer's state, and the best so far where text is held out."""
    optimizer = sum(part.num_bytes for part in plan.memory if part.category == "optimizer")
    return learned_bytes(plan) * (2 if plan.workload.num_eval_sequences else 1) + optimizer


def disk_gb(plan: Plan) -> int:
    """The disk of a machine that holds the system, the model's weights and as much again, and what it is to learn."""
    weights = plan.num_parameters * wall_time.CHECKPOINT_BYTES_PER_PARAMETER
    learned = LEARNED_BYTES * plan.num_parameters if plan.configuration.is_full else 0
    return math.ceil((SYSTEM_BYTES + 2 * weights + learned) / 1e9)


_expected = cache(spot.expectation)
_mean = cache(spot.means)


def _outlook(
    way: Way, price: Price, storage: StorageSpec, alone: spot.Job, interrupted: tuple[str, Sequence[float]] | None
) -> Outlook:
    plan = way.plan
    rate = price.on_demand_usd_per_hour if interrupted is None else price.spot_usd_per_hour
    assert rate is not None
    rate *= plan.workload.num_machines
    source, rates = (None, [0.0]) if interrupted is None else interrupted
    job = replace(alone, interruptions_per_second=rates[0])
    found = _expected(job)
    steps = found.interval_steps
    stored = _storage_usd(way, price.region, storage, found, spot=interrupted is not None)
    usd = rate * found.billed_seconds / 3600 + stored
    ends = [usd, usd]
    for number, other in enumerate(rates[1:]):
        at = _mean(replace(alone, interruptions_per_second=other), steps or job.num_steps)
        ends[number] = rate * at.billed_seconds / 3600 + stored * at.instance_seconds / found.instance_seconds
    return Outlook(
        instance=way.instance.name,
        region=price.region,
        market="on demand" if interrupted is None else "spot",
        gpu=way.gpu.name,
        num_gpus=plan.configuration.num_gpus,
        num_machines=plan.workload.num_machines,
        what_if=way.what_if,
        hours=found.seconds / 3600,
        nine_of_ten_hours=found.nine_of_ten_seconds / 3600,
        usd=usd,
        nine_of_ten_usd=rate * found.nine_of_ten_billed_seconds / 3600 + stored,
        storage_usd=stored,
        disk_is_priced=price.region in storage.volume.usd_per_gb_month,
        low_usd=ends[0],
        high_usd=ends[1],
        interruptions=found.interruptions,
        interval_steps=steps,
        interval_seconds=None if steps is None else steps * job.step_seconds,
        tokens_per_usd=plan.workload.total_tokens / usd if usd else math.inf,
        usd_per_hour=rate,
        price_date=price.date,
        price_source=price.source,
        hazard_source=source,
    )


def _storage_usd(way: Way, region: str, storage: StorageSpec, found: spot.Expectation, *, spot: bool) -> float:
    """The disks while there are instances, and, on spot, checkpoints in a bucket for as long as the run takes."""
    volume = storage.volume.usd_per_gb_month.get(region, 0.0) * disk_gb(way.plan) * way.plan.workload.num_machines
    kept = CHECKPOINTS_KEPT * state_bytes(way.plan) / BILLED_GB if spot else 0.0
    bucket = storage.bucket.usd_per_gb_month.get(region, 0.0) * kept
    return (volume * found.instance_seconds + bucket * found.seconds) / 3600 / HOURS_PER_MONTH
