"""``sfplan train``: the command that runs a plan, and how all commands read one."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shallowflow import processes
from shallowflow.data_command import data_format_option
from shallowflow.numbers import FiniteRange
from shallowflow.planner.plan import Plan
from shallowflow.planner.serialize import PlanError, from_json
from shallowflow.printing import echo_json
from shallowflow.profiles import load_gpu, validate_config

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format
    from shallowflow.runtime.request import RunRequest


_ENDS = {"interrupted": 130, "out of budget": 1}
"""Exit codes of runs that are to be gone on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """How to run a plan on several machines.

    Attributes:
        nodes: how many machines.
        run_on_each: the command line, as a shell takes it.
    """

    nodes: int
    run_on_each: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a run would do.

    Attributes:
        would: in lines, as people read them.
    """

    would: list[str]


class _Record(msgspec.Struct):
    """What a run's record has and a plan does not."""

    outcome: str
    started: str
    comparisons: msgspec.Raw


@click.command("train")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="A file to learn, or hf:ORG/NAME.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Held-out data for the perplexity.")
@data_format_option
@click.option("--weights", type=click.Path(path_type=Path), help="A folder with weights, or a .gguf file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder for the results.")
@click.option("--steps", type=click.IntRange(1, 10**9), help="Optimizer updates.  [default: one pass over the data]")
@click.option(
    "--learning-rate",
    type=FiniteRange(min=0, min_open=True),
    help="AdamW's.  [default: 2e-4 for an adapter, 2e-5 where every weight learns]",
)
@click.option("--usd-per-hour", type=FiniteRange(min=0), help="What the machine costs, for the meter.")
@click.option(
    "--budget-usd",
    type=FiniteRange(min=0, min_open=True),
    help="Save and end before all sessions together cost more.",
)
@click.option("--store", metavar="s3://BUCKET/PREFIX", help="Keep checkpoints and results there as well.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of a new adapter, and of the order of the data.",
)
@click.option("--resume", is_flag=True, help="Go on from the output folder's newest good checkpoint, if there is one.")
@click.option(
    "--save-every", type=click.IntRange(1, 10**9), help="Steps between two checkpoints.  [default: every ten minutes]"
)
@click.option("--eval-every", type=click.IntRange(1, 10**9), help="Steps between two evaluations.")
@click.option(
    "--patience",
    type=click.IntRange(1, 10**9),
    help="Evaluations without improvement to stop after, keeping the best.",
)
@click.option("--sample", "samples", multiple=True, metavar="PROMPT", help="Answer it before and after training.")
@click.option(
    "--track", multiple=True, type=click.Choice(["tensorboard", "wandb", "cloudwatch"]), help="Tell it every step."
)
@click.option(
    "--nodes",
    type=click.IntRange(1),
    help="Machines that share the plan's GPUs; of several, say what to run on each.  [default: the plan's]",
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print the record of the run as JSON.")
def train_command(
    plan: Path,
    data: Path,
    eval_data: Path | None,
    data_format: Format | None,
    weights: Path | None,
    output: Path,
    steps: int | None,
    learning_rate: float | None,
    usd_per_hour: float | None,
    budget_usd: float | None,
    store: str | None,
    seed: int,
    resume: bool,
    save_every: int | None,
    eval_every: int | None,
    patience: int | None,
    samples: tuple[str, ...],
    track: tuple[str, ...],
    nodes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run PLAN: fine-tune on real text, with predicted beside measured.

    Writes the adapter (safetensors, for PEFT), or, where every weight learns, the whole model (a folder in Hugging
    Face's layout), run.json, plan.json, report.html, and checkpoints as it goes. Ctrl-C, or a spot instance's notice of
    its end, saves; the same command with --resume goes on. A plan for several GPUs starts a process for each, by
    torchrun's launcher, and runs under torchrun or accelerate launch as well.

    \b
    sfplan train plan.json --data train.jsonl --output run
    sfplan train plan.json --data train.jsonl --output run --resume
    sfplan train plan.json --data train.jsonl --output run --eval-data held.jsonl --eval-every 50 --patience 3
    sfplan train plan.json --data train.jsonl --output run --store s3://bucket/run --resume
    sfplan train plan.json --data train.jsonl --output run --dry-run
    """
    from shallowflow.terminal import results, show, watching

    loaded = processes.together(lambda: read_plan(plan))
    nodes = nodes or loaded.workload.num_machines
    if nodes > 1 and not processes.are_started():
        line = processes.torchrun_line(loaded, nodes)
        if not dry_run:
            _tell_machines(line, nodes, output, as_json)
            return
    from shallowflow.runtime.run import RunRequest, train

    request = RunRequest(
        data=data,
        eval_data=eval_data,
        weights=weights,
        output=output,
        num_steps=steps,
        learning_rate=learning_rate,
        usd_per_hour=usd_per_hour,
        seed=seed,
        resume=resume,
        save_every=save_every,
        eval_every=eval_every,
        patience=patience,
        samples=samples,
        track=track,
        data_format=data_format,
        store=store,
        budget_usd=budget_usd,
    )
    leads = processes.leads()
    if dry_run:
        if leads:
            _rehearse(loaded, request, as_json)
        return
    if loaded.configuration.num_gpus > 1 and not processes.are_started():
        processes.start(loaded, output)
    with processes.speaking(), watching(loaded) if leads else contextlib.nullcontext() as watcher:
        record = train(loaded, request, watcher)
    if as_json and leads:
        click.echo((output / "run.json").read_text(encoding="utf-8"), nl=False)
    elif leads:
        show(results(record, output))
    if record.outcome in _ENDS:
        sys.exit(_ENDS[record.outcome])


def _tell_machines(line: str, nodes: int, output: Path, as_json: bool) -> None:
    if as_json:
        echo_json(Machines(nodes=nodes, run_on_each=line))
    else:
        click.echo(processes.instructions(line, nodes, output))


def _rehearse(plan: Plan, request: RunRequest, as_json: bool) -> None:
    from shallowflow.runtime.dry_run import rehearse
    from shallowflow.terminal import status

    with status("checking") as tell:
        lines = rehearse(plan, request, tell)
    if as_json:
        echo_json(Rehearsal(would=lines))
    else:
        click.echo("\n".join(lines))


def read_plan(path: Path) -> Plan:
    """The plan in the file *path*, checked.

    Raises:
        PlanError: it is none, or contradicts itself.
    """
    try:
        content = path.read_bytes()
        _check_no_record(path, content)
        loaded = from_json(content, str(path))
        computes = load_gpu(loaded.gpu).compute_dtype
        if loaded.compute_dtype != computes:
            raise PlanError(f"{path}: compute_dtype is {loaded.compute_dtype}, a {loaded.gpu} computes in {computes}")
        validate_config(loaded.model_config, f"{path}: model_config")
        return loaded
    except FileNotFoundError:
        raise PlanError(f"plan file {path} does not exist; make one with: sfplan MODEL --output {path}") from None
    except IsADirectoryError:
        inside = path / "plan.json"
        found = f"its plan is {inside}" if inside.is_file() else "give the file that `sfplan MODEL --output FILE` wrote"
        raise PlanError(f"{path} is a folder, not a plan; {found}") from None
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from None


def _check_no_record(path: Path, content: bytes) -> None:
    """Refuse a run's record, which lies beside its plan.

    Raises:
        PlanError: it is one; with where the plan is.
    """
    try:
        msgspec.json.decode(content, type=_Record)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return
    plan = path.parent / "plan.json"
    found = f"its plan is {plan}" if plan.is_file() else "give the plan that it was made from"
    raise PlanError(f"{path} is a run's record, not a plan; {found}")
