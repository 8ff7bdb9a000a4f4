"""``sfplan export``: a plan as a file that another program runs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from shallowflow.amazon import needs_boto3
from shallowflow.data_command import data_format_option
from shallowflow.profiles.load import load_gpu, load_instances
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format

Target = Literal["skypilot"]


@click.command("export")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["skypilot"]), required=True, help="Whose file to write.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The file to learn; it is uploaded.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Held-out data for the perplexity.")
@data_format_option
@click.option("--bucket", help="Of S3, mounted for checkpoints and results; it is made if need be.")
@click.option(
    "--store", metavar="s3://BUCKET/PREFIX", help="Instead: where the run itself puts them; the bucket has to exist."
)
@click.option("--spot/--on-demand", default=True, show_default=True, help="Which instances to run on.")
@click.option("--package", help="What pip installs there.  [default: this version of shallowflow]")
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
    """Write PLAN as a task for SkyPilot: a managed job that resumes from the bucket after every interruption.

    Nothing is started. A mounted bucket needs nothing on the machine; with --store checkpoints are verified, and stored
    before a machine that is told of its end is taken.

    \b
    sfplan export plan.json --to skypilot --data train.jsonl --bucket my-checkpoints
    sfplan export plan.json --to skypilot --data train.jsonl --bucket my-checkpoints --output task.yaml
    sfplan export plan.json --to skypilot --data train.jsonl --store s3://my-checkpoints/my-run
    """
    from shallowflow.runtime import skypilot
    from shallowflow.runtime.documents import read_data
    from shallowflow.runtime.files import write_text
    from shallowflow.training import read_plan

    assert target == "skypilot"
    if output is not None and not output.parent.is_dir():
        raise RequestError(f"folder {output.parent} for --output does not exist")
    if output is not None and output.resolve() in {path.resolve() for path in (plan, data, eval_data) if path}:
        raise RequestError(f"--output {output} is a file that the task uploads; give another name")
    loaded = read_plan(plan)
    job = skypilot.Job(
        plan_path=plan,
        data_path=data,
        eval_data_path=eval_data,
        bucket=bucket,
        store=_checked(store),
        spot=spot,
        data_format=data_format,
        package=package or f"shallowflow{'[aws]' if store is not None else ''}=={version('shallowflow')}",
    )
    text = skypilot.task(loaded, job, load_gpu(loaded.gpu), tuple(load_instances(loaded.gpu)))
    for path in (data, eval_data):
        if path is not None:
            read_data(path, data_format)  # what the machine could not learn is better told before it is paid for
    if output is None:
        click.echo(text, nl=False)
        return
    write_text(output, text)


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
