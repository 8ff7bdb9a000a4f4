"""``sfplan launch``: a plan on an instance of EC2 that ends by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from msgspec import UNSET, UnsetType

from shallowflow import completing, launching, starting
from shallowflow.amazon import echo_json, masked, needs_boto3
from shallowflow.data_command import data_format_option
from shallowflow.launching import Launch
from shallowflow.options import POSITIVE
from shallowflow.planner import words
from shallowflow.planner.outlook import Market, Outlook
from shallowflow.session import RequestError
from shallowflow.starting import Standing

if TYPE_CHECKING:
    from shallowflow.runtime.aws.clients import Call
    from shallowflow.runtime.documents import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request to AWS.

    Attributes:
        service, operation: as boto3 calls them.
        purpose: in words.
        parameters: of the operation.
    """

    service: str
    operation: str
    region: str
    purpose: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What is to be run, where, what it will cost, and whether it was started.

    Attributes:
        run: its name, which its instances carry as a tag.
        store: where the run keeps everything.
        instance: the instance type.
        usd_per_hour: of one machine, without its disk.
        price_date, price_source: of that price.
        expected: what the whole run comes to; None where nobody knows how often such an instance is interrupted.
        max_hours: until the machine is made to end.
        most_usd: what one machine can cost at most, but for its disk.
        started: whether an instance was started.
        instance_id: of what was started, or of what the run has already; not there with ``--dry-run``.
        why: the reason that nothing was started; there only where that is so, and without ``--dry-run``.
        calls: that would be made, in order; there only with ``--dry-run``.
    """

    run: str
    store: str
    instance: str
    region: str
    market: Market
    usd_per_hour: float
    price_date: str
    price_source: str
    expected: Outlook | None
    max_hours: float
    most_usd: float
    started: bool
    instance_id: str | UnsetType | None = UNSET
    why: str | UnsetType = UNSET
    calls: tuple[Asked, ...] | UnsetType = UNSET


@click.command("launch")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("passed", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF TRAIN]")
@click.option("--data", required=True, metavar="FILE", help="What to learn, which is uploaded, or hf:ORG/NAME.")
@click.option("--eval-data", metavar="FILE", help="Held-out data for the perplexity.")
@data_format_option
@click.option("--store", required=True, metavar="s3://BUCKET/PREFIX", help="Where the run keeps everything.")
@click.option("--instance-profile", "profile", required=True, metavar="NAME", help="Whose role the instance has.")
@click.option("--name", metavar="RUN", help="The run's, for its tag.  [default: the last part of --store]")
@click.option(
    "--instance",
    metavar="NAME",
    help="The instance type.  [default: the cheapest that will do]",
    shell_complete=completing.instances,
)
@click.option("--region", metavar="NAME", help="Where.  [default: the plan's]")
@click.option("--spot/--on-demand", default=True, show_default=True, help="Which kind of instance.")
@click.option("--budget-usd", type=POSITIVE, help="Save and end before all sessions together cost more.")
@click.option("--max-hours", type=POSITIVE, help="End the machine then.  [default: twice what nine of ten runs take]")
@click.option(
    "--idle-minutes",
    type=click.IntRange(1, 10_000),
    default=30,
    show_default=True,
    help="Without any work of a GPU, after which the run is ended.",
)
@click.option("--package", metavar="SPEC|FILE.whl", help="What pip installs.  [default: what runs here, as a wheel]")
@click.option(
    "--image", metavar="AMI", help="With Python 3.11 and NVIDIA's driver.  [default: the newest of AWS's own]"
)
@click.option("--subnet", metavar="ID", help="Of which VPC.  [default: any of the default VPC]")
@click.option(
    "--hf-token-parameter", "token_parameter", metavar="NAME", help="Of SSM, with a token of the Hub for gated models."
)
@click.option(
    "--resume", is_flag=True, help="Go on with what the store holds; does nothing while the run has a machine."
)
@click.option("--dry-run", is_flag=True, help="Show every call that would be made, and ask AWS nothing.")
@click.option("--yes", is_flag=True, help="Start it: without this nothing is.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def launch_command(plan: Path, dry_run: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Run PLAN on one instance of EC2, which saves to the store and is gone when it is done, failed or idle.

    Options after -- are those of sfplan train. A spot instance that AWS takes does not come back by itself: the same
    command with --resume starts the next one, and does nothing where there is one, or where the run is over.

    \b
    sfplan launch plan.json --data train.jsonl --store s3://my-bucket/my-run --instance-profile trainer --dry-run
    sfplan launch plan.json --data train.jsonl --store s3://my-bucket/my-run --instance-profile trainer --yes
    sfplan launch plan.json --data train.jsonl --store s3://my-bucket/my-run --instance-profile trainer --resume --yes
    """
    needs_boto3("sfplan launch")
    launch = _launch(plan, **options)
    if dry_run:
        _show_calls(launch, _rehearsed(launch), as_json)
        return
    if not yes:
        raise RequestError(_reluctance(launch))
    found = _started(launch)
    _show_started(launch, found, as_json)


def _launch(
    plan: Path,
    passed: tuple[str, ...],
    data: str,
    eval_data: str | None,
    data_format: Format | None,
    store: str,
    profile: str,
    name: str | None,
    instance: str | None,
    region: str | None,
    spot: bool,
    budget_usd: float | None,
    max_hours: float | None,
    package: str | None,
    **same: Any,
) -> Launch:
    """What the options ask for, checked as far as this machine can."""
    from shallowflow.runtime.aws.s3 import place
    from shallowflow.training import read_plan

    loaded, where = read_plan(plan), place(store)
    launching.check_plan(loaded)
    market: Market = "spot" if spot else "on demand"
    chosen, price, usd_per_hour = launching.choose(loaded, instance, region or loaded.workload.region, market)
    found = launching.expected(loaded, chosen, price, market)
    run = launching.run_name(name, where)
    installed, files = launching.packed(package, "aws", "data")
    train: dict[str, Any] = {}
    for option, given, base in (("--data", data, "train"), ("--eval-data", eval_data, "heldout")):
        if given is not None:
            train[option], more = _learned(given, base, data_format)
            files |= more
    train |= {"--data-format": data_format, "--output": run, "--store": f"s3://{where.bucket}/{where.prefix}"}
    train |= {"--usd-per-hour": usd_per_hour, "--budget-usd": budget_usd}
    return Launch(
        plan=loaded,
        run=run,
        store=f"s3://{where.bucket}/{where.prefix}",
        place=where,
        files={"plan.json": plan, **files},
        instance=chosen,
        price=price,
        market=market,
        usd_per_hour=usd_per_hour,
        expected=found,
        budget_usd=budget_usd,
        max_hours=launching.most_hours(max_hours, found, usd_per_hour, budget_usd),
        package=installed,
        train=launching.train_words(train, passed),
        profile=profile,
        **same,
    )


def _learned(given: str, base: str, data_format: Format | None) -> tuple[str, dict[str, Path]]:
    """What the machine reads in the place of *given*, and the file that it is to have for that."""
    from shallowflow.runtime.documents import read_data

    if given.startswith("hf:"):
        return given, {}
    path = Path(given)
    if not path.is_file():
        raise RequestError(f"file {given} does not exist; give one that is here, or a dataset such as hf:ORG/NAME")
    read_data(path, data_format)  # what the machine could not learn is better told before it is paid for
    return f"{base}{path.suffix}", {f"{base}{path.suffix}": path}


def _reluctance(launch: Launch) -> str:
    """That nothing was started, and what it would cost."""
    found = launch.expected
    usd = (
        ""
        if found is None
        else f"{words.usd(found.usd)} expected, {words.usd(found.nine_of_ten_usd)} nine of ten times, "
    )
    return (
        f"nothing was started: {launch.instance.name} in {launch.price.region}, {launch.market}, is {usd}"
        f"{words.usd(launch.most_usd)} at most; --yes starts it, --dry-run shows every call"
    )


def _rehearsed(launch: Launch) -> list[Call]:
    """Every call, in order, as where nothing was ever started."""
    from shallowflow.runtime.aws.clients import Rehearsal
    from shallowflow.runtime.aws.instances import STAND_INS

    rehearsal = Rehearsal(launch.price.region, STAND_INS)
    starting.standing(rehearsal, launch)
    starting.rehearse_store(rehearsal, launch)
    starting.start(rehearsal, launch)
    return rehearsal.calls


def _started(launch: Launch) -> str | Standing:
    """The id of the instance that was started, or why none was."""
    from shallowflow.runtime.aws.clients import Live
    from shallowflow.runtime.aws.s3 import S3Objects
    from shallowflow.terminal import status

    aws = Live(launch.price.region)
    with status(f"launching {launch.run}") as tell:
        found = starting.standing(aws, launch)
        if found is not None:
            return found
        objects = S3Objects(launch.place)
        found = starting.stored(objects, launch)
        if found is not None:
            return found
        starting.script(launch)  # which may be refused, before anything is uploaded
        tell("uploading")
        starting.upload(objects, launch)
        tell("starting the instance")
        return starting.start(aws, launch)


def _show_started(launch: Launch, found: str | Standing, as_json: bool) -> None:
    if as_json:
        if isinstance(found, Standing):
            echo_json(_told(launch, started=False, instance_id=found.instance_id, why=found.why))
        else:
            echo_json(_told(launch, started=True, instance_id=found))
    elif isinstance(found, Standing):
        click.echo(masked(f"{found.why}; nothing was started"))
    else:
        lines = [*launching.told(launch), f"started   {found}; sfplan runs tells how it goes"]
        lines.append(f"stop it   sfplan stop {launch.run} --yes")
        click.echo(masked("\n".join(lines)))


def _show_calls(launch: Launch, calls: list[Call], as_json: bool) -> None:
    if as_json:
        echo_json(_told(launch, started=False, calls=tuple(Asked(**asdict(call)) for call in calls)))
        return
    from rich.table import Table

    from shallowflow.terminal import show

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("call", no_wrap=True)
    table.add_column("what for", ratio=2)
    table.add_column("parameters", ratio=3, overflow="fold")
    for call in calls:
        shown = dict(call.parameters)
        if "UserData" in shown:
            shown["UserData"] = f"<{len(shown['UserData'].encode()):,} bytes, below>"
        for number, (key, value) in enumerate(shown.items()):
            told = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            first = (f"{call.service} {call.operation}", call.purpose) if number == 0 else ("", "")
            table.add_row(*first, masked(f"{key}: {told}"))
    click.echo(masked("\n".join([*launching.told(launch), ""])))
    show(table)
    click.echo(masked("\n".join(["", "UserData, which the instance runs:", "", starting.script(launch)])), nl=False)
    click.echo("\nnothing was started, and AWS was asked nothing")


def _told(launch: Launch, **ends: Any) -> Launched:
    """What is printed of *launch*, with how it ends."""
    return Launched(
        run=launch.run,
        store=launch.store,
        instance=launch.instance.name,
        region=launch.price.region,
        market=launch.market,
        usd_per_hour=launch.usd_per_hour,
        price_date=launch.price.date,
        price_source=launch.price.source,
        expected=launch.expected,
        max_hours=launch.max_hours,
        most_usd=launch.most_usd,
        **ends,
    )
