"""``sfplan whatif``: what a work takes and costs on every instance, in every region, on demand and spot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from shallowflow import completing
from shallowflow.comparing import Asked, changed_in, circumstances_of, combinations, compare
from shallowflow.numbers import FiniteRange
from shallowflow.options import DEFAULT_MODEL, request, work_options
from shallowflow.planner import comparison_view, outlook
from shallowflow.planner.bounds import MOST_GPUS
from shallowflow.planner.comparison import By, Comparison
from shallowflow.planner.outlook import Circumstances
from shallowflow.planner.plan import Workload
from shallowflow.planner.remedies import Infeasible
from shallowflow.printing import echo_json
from shallowflow.runtime.files import write_text
from shallowflow.session import RequestError

MINUTES = FiniteRange(min=0, max=24 * 60)


@click.command("whatif")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completing.models)
@work_options
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs per instance.  [default: one, and all that it has]")
@click.option(
    "--nodes",
    type=click.IntRange(1, MOST_GPUS),
    default=1,
    show_default=True,
    help="Instances of a kind that work together.",
)
@click.option(
    "--instance",
    "instances",
    multiple=True,
    metavar="NAME",
    help="Only these instances, or families.",
    shell_complete=completing.instances,
)
@click.option("--region", "regions", multiple=True, metavar="NAME", help="Only these regions.")
@click.option(
    "--what-if", "knobs", multiple=True, metavar="KEY=A,B,...", help="Also at other values, such as rank=8,64."
)
@click.option(
    "--interruptions",
    default="middle",
    show_default=True,
    metavar="low|middle|high|N|FILE.csv",
    help="Which end of what is known of them, how many per day, or from a history of milliseconds,add|remove,node.",
)
@click.option(
    "--notices",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of interruptions whose notice comes in time for a checkpoint.",
)
@click.option(
    "--setup-minutes",
    type=MINUTES,
    default=outlook.SETUP_SECONDS / 60,
    show_default=True,
    help="To set an instance up.",
)
@click.option(
    "--waiting-minutes",
    type=MINUTES,
    default=outlook.WAITING_SECONDS / 60,
    show_default=True,
    help="Until an interrupted instance is replaced.",
)
@click.option("--sort", "by", type=click.Choice(get_args(By)), default="money", show_default=True, help="What is best.")
@click.option("--all", "everything", is_flag=True, help="Show every way, not the few best.")
@click.option("--json", "as_json", is_flag=True, help="Print every way as JSON.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every way to a table.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write a page, FILE.html.")
def whatif_command(
    model: str, everything: bool, as_json: bool, csv_file: Path | None, page: Path | None, **options: Any
) -> None:
    """Compare instances, regions, on demand and spot, each with its GPU's own best plan: hours and dollars.

    Nine of ten runs come to no more than what is said of them; --deadline-hours and --budget-usd are kept by as many.

    \b
    sfplan whatif Llama-3.1-8B --tokens 10000000
    sfplan whatif Llama-3.1-8B --data train.jsonl --deadline-hours 8 --budget-usd 5
    sfplan whatif Qwen2.5-1.5B --what-if sequence_length=512,1024,2048 --what-if rank=8,64
    sfplan whatif Llama-3.1-8B --instance g5 --region us-east-1 --interruptions 3 --all
    sfplan whatif Llama-3.1-8B --instance g4dn.xlarge --nodes 4
    """
    from shallowflow.hub import find_model
    from shallowflow.terminal import show, status

    spec = find_model(model)
    _check_files(csv_file, page)
    asked = _asked((model, spec.name), **options)
    try:
        with status(f"comparing {spec.name}") as tell:
            found = compare(spec, asked, progress=tell)
    except Infeasible as refusal:
        if as_json:
            echo_json(refusal.as_dict())
        raise
    if csv_file is not None:
        _write(csv_file, _table(found))
    if page is not None:
        from shallowflow.runtime.whatif_page import html

        _write(page, html(found))
    if as_json:
        echo_json(found.as_dict())
        return
    show(comparison_view.shown(found, everything=everything))


def _asked(
    names: tuple[str, str],
    gpus: int | None,
    nodes: int,
    instances: tuple[str, ...],
    regions: tuple[str, ...],
    knobs: tuple[str, ...],
    interruptions: str,
    notices: float,
    setup_minutes: float,
    waiting_minutes: float,
    by: By,
    deadline_hours: float | None,
    budget_usd: float | None,
    **work: Any,
) -> Asked:
    """What the options ask for."""
    case, hazard = circumstances_of(interruptions)
    works, notes = _works(names, _values(knobs), work)
    return Asked(
        works=works,
        notes=notes,
        instances=instances,
        regions=regions,
        gpus=gpus,
        nodes=nodes,
        by=by,
        deadline_hours=deadline_hours,
        budget_usd=budget_usd,
        circumstances=Circumstances(
            setup_seconds=setup_minutes * 60,
            waiting_seconds=waiting_minutes * 60,
            case=case,
            hazard=hazard,
            noticed_share=notices,
        ),
    )


def _values(knobs: tuple[str, ...]) -> dict[str, list[str]]:
    """Names and their values, from texts.

    Raises:
        RequestError: a text is not of the form KEY=A,B,...
    """
    found: dict[str, list[str]] = {}
    for text in knobs:
        key, _, values = text.partition("=")
        given = list(dict.fromkeys(value.strip() for value in values.split(",")))
        if not key or "" in given or key in found:
            raise RequestError(f"--what-if {text!r} says nothing new; give KEY=A,B,..., each key once")
        found[key] = given
    return found


def _works(
    names: tuple[str, str], values: Mapping[str, list[str]], work: Mapping[str, Any]
) -> tuple[dict[str, Workload], tuple[str, ...]]:
    """Every combination, and notes on the work as it was asked for; data is counted anew at each sequence length."""
    where: dict[str, Any] = {
        "gpu": "t4",
        "gpus": 1,
        "nodes": 1,
        "region": "us-east-1",
        "deadline_hours": None,
        "budget_usd": None,
    }
    _, base, notes = request(names, **where, **work)
    at_length: dict[str, Workload] = {}
    for length in values.get("sequence_length", []):
        tokens = changed_in(base, "sequence_length", length).sequence_length
        at_length[length] = request(names, **where, **{**work, "sequence_length": tokens})[1]
    return combinations(base, values, at_length), notes


def _check_files(csv_file: Path | None, page: Path | None) -> None:
    for option, path in (("--csv", csv_file), ("--html", page)):
        if path is not None and not path.parent.is_dir():
            raise RequestError(f"folder {path.parent} for {option} does not exist")
    if page is not None and page.suffix not in (".html", ".htm"):
        raise RequestError(f"--html {page} is no page; give a name that ends in .html")


def _table(found: Comparison) -> str:
    """Every way, a row each."""
    rows = [found.row(outlook) for outlook in found.outlooks]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None
