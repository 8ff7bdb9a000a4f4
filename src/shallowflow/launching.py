"""A plan on a rented machine: which one, at what price, what it is given, and the calls that start it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowflow.own_wheel import own_wheel
from shallowflow.planner import outlook, words
from shallowflow.planner.outlook import Circumstances, Market, Outlook, Way
from shallowflow.planner.plan import Plan
from shallowflow.profiles.load import load_gpu, load_instance, load_instances, load_storage
from shallowflow.profiles.specs import InstanceSpec, Price
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.aws.s3 import Place

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SETUP_HOURS = Circumstances().setup_seconds / 3600
MOST_HOURS, TIMES_LONGER = 24.0, 2.0
"""That a machine may run where nothing is known, and over what nine of ten runs take."""
DECIDED = ("--data", "--eval-data", "--data-format", "--output", "--store", "--resume", "--usd-per-hour")
NOT_PASSED = (*DECIDED, "--budget-usd", "--weights", "--nodes", "--dry-run", "--json")
"""Options of ``sfplan train`` that are not passed on: they are decided here, or mean nothing there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is to be started.

    Attributes:
        files: to put into the store: by the name that each gets there.
        expected: what the whole run comes to; None where nobody knows how often such an instance is interrupted.
        max_hours: until the machine is made to end.
        resume: whether it may go on with what the store holds.
    """

    plan: Plan
    run: str
    store: str
    place: Place
    files: dict[str, Path]
    instance: InstanceSpec
    price: Price
    market: Market
    usd_per_hour: float
    expected: Outlook | None
    budget_usd: float | None
    max_hours: float
    idle_minutes: int
    package: str
    train: tuple[str, ...]
    profile: str
    image: str | None
    subnet: str | None
    token_parameter: str | None
    resume: bool

    @property
    def most_usd(self) -> float:
        """What one machine can cost at most, but for its disk."""
        return self.max_hours * self.usd_per_hour


def run_name(given: str | None, place: Place) -> str:
    """The run's name: as *given*, or the last part of the store's prefix.

    Raises:
        RequestError: it is none.
    """
    from shallowflow.runtime.aws.instances import RUN_NAME

    name = given or place.prefix.rstrip("/").rpartition("/")[2]
    if not name:
        raise RequestError("--store names a bucket alone; give a prefix in it, which names the run: s3://bucket/run")
    if not RUN_NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} is no name of a run; give --name up to 64 letters, digits, dots, hyphens and underscores"
        )
    return name


def choose(plan: Plan, wanted: str | None, region: str, market: Market) -> tuple[InstanceSpec, Price, float]:
    """The instance, its price in *region*, and the dollars an hour: the one *wanted*, or the cheapest that will do.

    Raises:
        RequestError: it has not the plan's GPUs, or no price is known.
    """
    number = plan.configuration.num_gpus
    if wanted is not None:
        named = load_instance(wanted)
        if named.gpu != plan.gpu or named.num_gpus < number:
            raise RequestError(
                f"{named.name} has {named.num_gpus} x {named.gpu}, and the plan is for {number} x {plan.gpu}; "
                f"give one of {', '.join(i.name for i in _able(plan))}"
            )
    able = _able(plan) if wanted is None else [load_instance(wanted)]
    if not able:
        raise RequestError(f"no known instance has {number} x {plan.gpu}; plan for one that is rented, such as t4")
    found = []
    for instance in able:
        for price in instance.prices:
            usd = price.spot_usd_per_hour if market == "spot" else price.on_demand_usd_per_hour
            if price.region == region and usd is not None:
                found.append((usd, instance.name, instance, price))
    if not found:
        offered = sorted({price.region for instance in able for price in instance.prices})
        raise RequestError(
            f"no {market} price of {able[0].name if wanted else plan.gpu} instances in {region!r} is known; "
            f"try sfplan prices --update --region {region}, or one of {', '.join(offered)}"
        )
    usd, _, instance, price = min(found, key=lambda one: one[:2])
    return instance, price, usd


def _able(plan: Plan) -> list[InstanceSpec]:
    return [i for i in load_instances(plan.gpu) if i.num_gpus >= plan.configuration.num_gpus]


def expected(plan: Plan, instance: InstanceSpec, price: Price, market: Market) -> Outlook | None:
    """What the run comes to there; None where nobody knows how often such an instance is interrupted."""
    way = Way(plan=plan, gpu=load_gpu(plan.gpu), instance=instance)
    found = outlook.outlooks(way, price, load_storage(), Circumstances())
    return next((one for one in found if one.market == market), None)


def most_hours(given: float | None, found: Outlook | None, usd_per_hour: float, budget_usd: float | None) -> float:
    """How long a machine may run: as *given*, or twice what nine of ten runs take; no longer than the budget lasts.

    Raises:
        RequestError: it would end before the run begins.
    """
    usual = MOST_HOURS if found is None else TIMES_LONGER * found.nine_of_ten_hours
    wanted = given or (max(1.0, math.ceil(usual)) if math.isfinite(usual) else MOST_HOURS)
    lasting = math.inf if budget_usd is None else budget_usd / usd_per_hour
    hours = min(wanted, lasting)
    least = 0.0 if found is None else found.hours
    if hours < SETUP_HOURS:
        lasts = "--max-hours are" if wanted <= lasting else f"--budget-usd {budget_usd:g} lasts"
        raise RequestError(
            f"{lasts} {hours * 60:.1f} min at {words.usd(usd_per_hour)} an hour, and a machine takes "
            f"{SETUP_HOURS * 60:.0f} to begin; the run is expected to take {max(least, SETUP_HOURS):.2f} h"
        )
    return hours


def check_plan(plan: Plan) -> None:
    """Refuse a *plan* for several machines, or one whose weights another machine would not find.

    Raises:
        RequestError: which they are.
    """
    if plan.workload.num_machines > 1:
        raise RequestError(
            f"the plan is for {plan.workload.num_machines} machines, and launch starts one; "
            "sfplan export --to skypilot writes a task for a cluster"
        )
    if not HUB_NAME.fullmatch(plan.model_name):
        raise RequestError(
            f"the plan is of {plan.model_name!r}, whose weights another machine would not find; plan a model by its "
            "name on the Hub, such as meta-llama/Llama-3.1-8B"
        )


def packed(package: str | None, *extras: str) -> tuple[str, dict[str, Path]]:
    """What pip installs with *extras*, and the wheel that it is: of what runs here, or *package* where that is one.

    Raises:
        RequestError: it is a file that is not there, or what runs here is not installed.
    """
    if package is not None and (not package.endswith(".whl") or "://" in package):
        return package, {}
    path = own_wheel() if package is None else Path(package)
    if not path.is_file():
        raise RequestError(f"--package {package} does not exist; make it with: python -m build --wheel")
    named = f"[{','.join(extras)}]" if extras else ""
    return f"./{path.name}{named}", {path.name: path}


def train_words(launch_options: dict[str, Any], passed: Sequence[str]) -> tuple[str, ...]:
    """The command line of the run after ``sfplan``, whose options are checked.

    Raises:
        RequestError: an option may not be *passed*.
        click.UsageError: one is none of ``sfplan train``.
    """
    from shallowflow.training import train_command

    for word in passed:
        if word.partition("=")[0] in NOT_PASSED:
            raise RequestError(
                f"{word.partition('=')[0]} cannot follow --: it is an option of launch, or means nothing there"
            )
    given = [word for name, value in launch_options.items() if value is not None for word in (name, str(value))]
    line = ["plan.json", *given, *passed, "--resume"]
    train_command.make_context("train", list(line))
    if any(ord(letter) < 32 for word in line for letter in word):
        raise RequestError("an option holds a line break or another control character; give it without")
    return ("train", *line)


def told(launch: Launch) -> Iterator[str]:
    """What it will cost, in lines: expected, at most, and by which price."""
    where = f"{launch.instance.name} in {launch.price.region}, {launch.market}"
    yield f"{launch.run}: {launch.plan.model_name} on {where}, {words.usd(launch.usd_per_hour)} an hour"
    found = launch.expected
    if found is None:
        yield "expected  nobody knows how often such an instance is interrupted"
    else:
        yield f"expected  {found.hours:.2f} h, {words.usd(found.usd)}, {found.interruptions:.2f} interruptions"
        yield f"9 in 10   {found.nine_of_ten_hours:.2f} h, {words.usd(found.nine_of_ten_usd)}, or less"
    if found is not None and launch.max_hours < found.hours:
        yield f"too short {launch.max_hours:.2f} h is less than is expected: the run will be saved and ended"
    yield f"at most   {launch.max_hours:.2f} h, {words.usd(launch.most_usd)} and its disk, before it is made to end"
    yield f"price     {launch.price.date}; {launch.price.source}"
