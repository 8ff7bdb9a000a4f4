"""``sfplan export``: a plan as a file that another program runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import click

from shallowflow.amazon import needs_boto3
from shallowflow.data_command import data_format_option
from shallowflow.outputs import check_apart
from shallowflow.profiles.load import load_gpu, load_instances
from shallowflow.runtime.files import write_bytes, write_text
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.planner.plan import Plan
    from shallowflow.runtime.documents import Format
    from shallowflow.runtime.skypilot import Job

Target = Literal["skypilot", "axolotl", "llamafactory", "trl", "unsloth", "accelerate"]


@click.command("export")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(get_args(Target)), required=True, help="Whose file to write.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The file to learn.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Held-out data for the perplexity. (skypilot)")
@data_format_option
@click.option("--bucket", help="Of S3, mounted for checkpoints and results; it is made if need be. (skypilot)")
@click.option(
    "--store",
    metavar="s3://BUCKET/PREFIX",
    help="Instead: where the run itself puts them; the bucket has to exist. (skypilot)",
)
@click.option("--spot/--on-demand", default=True, show_default=True, help="Which instances to run on. (skypilot)")
@click.option("--package", help="What pip installs there. (skypilot)  [default: what runs here, as a wheel]")
@click.option("--output", type=click.Path(path_type=Path), help="A file to write, instead of printing.")
def export_command(
    plan: Path,
    target: Target,
    data: Path,
    eval_data: Path | None,
    data_format: Format | None,
    bucket: str | None,
    store: str | None,
    spot: bool,
    package: str | None,
    output: Path | None,
) -> None:
    """Write PLAN as a file that another program runs; nothing is started.

    For skypilot it is a task that runs this plan itself: a managed job that resumes after every interruption. A mounted
    bucket needs nothing on the machine; with --store checkpoints are verified, and stored before a machine that is told
    of its end is taken. For a trainer (axolotl, llamafactory: a YAML; trl, unsloth: a script; accelerate: how many
    processes, and in which precision) it is as near to the plan as that trainer's settings come, made leaner until its
    own step, simulated, fits; comments at its head say what it cannot express.

    \b
    sfplan export plan.json --to skypilot --data train.jsonl --bucket my-checkpoints
    sfplan export plan.json --to skypilot --data train.jsonl --bucket my-checkpoints --output task.yaml
    sfplan export plan.json --to skypilot --data train.jsonl --store s3://my-checkpoints/my-run
    sfplan export plan.json --to axolotl --data train.jsonl --output axolotl.yaml
    sfplan export plan.json --to trl --data train.jsonl --output train.py
    """
    from shallowflow.training import read_plan

    check_apart({"--output": output}, (plan, data, eval_data))
    loaded = read_plan(plan)
    packed: Path | None = None
    beside: Path | None = None
    if target == "skypilot":
        job = _job(plan, data, eval_data, data_format, bucket, store, package, spot=spot)
        packed = job.wheel
        if package is None and output is not None and packed is not None:
            beside = output.parent / packed.name
            check_apart({"--output": output}, (beside,))
            job = replace(job, wheel=beside)
        text = _task(loaded, job)
    else:
        if any(given is not None for given in (bucket, store, package, eval_data)):
            raise RequestError(f"--bucket, --store, --package and --eval-data are for --to skypilot, not for {target}")
        text = _configuration(loaded, target, data, data_format)
    if output is None:
        click.echo(text, nl=False)
        return
    if beside is not None and packed is not None:
        write_bytes(beside, packed.read_bytes())
    write_text(output, text)


def _job(
    plan: Path,
    data: Path,
    eval_data: Path | None,
    data_format: Format | None,
    bucket: str | None,
    store: str | None,
    package: str | None,
    *,
    spot: bool,
) -> Job:
    from shallowflow.launching import packed
    from shallowflow.runtime import skypilot

    wants_data = any(str(path).startswith("hf:") or path.suffix == ".parquet" for path in (data, eval_data) if path)
    extras = [name for name, wanted in (("aws", store is not None), ("data", wants_data)) if wanted]
    installed, files = packed(package, *extras)
    return skypilot.Job(
        plan_path=plan,
        data_path=data,
        eval_data_path=eval_data,
        bucket=bucket,
        store=_checked(store),
        spot=spot,
        data_format=data_format,
        package=installed,
        wheel=next(iter(files.values()), None),
    )


def _checked(store: str | None) -> str | None:
    """*store*, which is one.

    Raises:
        RequestError, StoreError: it cannot be used.
    """
    if store is not None:
        needs_boto3("--store")
        from shallowflow.runtime.aws.s3 import place

        place(store)
    return store


def _task(loaded: Plan, job: Job) -> str:
    from shallowflow.runtime import skypilot
    from shallowflow.runtime.documents import read_data

    text = skypilot.task(loaded, job, load_gpu(loaded.gpu), tuple(load_instances(loaded.gpu)))
    for path in (job.data_path, job.eval_data_path):
        if path is not None:  # what the machine could not learn is better told before it is paid for
            read_data(path, cast("Format | None", job.data_format))
    return text


def _configuration(loaded: Plan, target: Target, data: Path, data_format: Format | None) -> str:
    from shallowflow.runtime.documents import read_data
    from shallowflow.terminal import status

    assert target != "skypilot"
    found = read_data(data, data_format).formats
    # text that stands among prompts and completions is what follows an empty prompt, which no other trainer reads
    if len(found) > 1:
        raise RequestError(f"{data} mixes {' and '.join(found)}; other trainers want one format in a file")
    with status(f"exporting to {target}") as tell:
        from shallowflow.runtime.trainers.export import export

        return export(loaded, target, data, found[0], load_gpu(loaded.gpu), tell).text
