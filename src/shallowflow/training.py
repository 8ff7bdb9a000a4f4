"""Commands that run a plan and use what came of it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shallowflow import processes
from shallowflow.data_command import data_format_option
from shallowflow.numbers import FiniteRange
from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.planner.serialize import PlanError, from_json
from shallowflow.profiles import load_gpu, validate_config

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format
    from shallowflow.runtime.request import RunRequest


_ENDS = {"interrupted": 130, "out of budget": 1}
"""Exit codes of runs that are to be gone on with."""


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
        told = {"nodes": nodes, "run_on_each": line}
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
    else:
        click.echo(processes.instructions(line, nodes, output))


def _rehearse(plan: Plan, request: RunRequest, as_json: bool) -> None:
    from shallowflow.runtime.dry_run import rehearse
    from shallowflow.terminal import status

    with status("checking") as tell:
        lines = rehearse(plan, request, tell)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"would": lines}), indent=2).decode())
    else:
        click.echo("\n".join(lines))


@click.command("merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder for the model.")
@click.option("--weights", type=click.Path(path_type=Path), help="The base: a folder with weights, or a .gguf file.")
@click.option("--json", "as_json", is_flag=True, help="Print what was merged as JSON.")
def merge_command(run: Path, output: Path, weights: Path | None, as_json: bool) -> None:
    """Put the adapter in the folder RUN into its base, as a model of its own in 16-bit safetensors.

    Layers that were quantized become what their rounded weights stand for: the model that was trained and evaluated.

    \b
    sfplan merge run --output merged
    """
    from shallowflow.runtime.merge import merge, record_of
    from shallowflow.terminal import status

    with status("merging") as tell:
        merge(run, output, weights, tell)
    record = record_of(run)
    outcome, steps = ("unknown", None) if record is None else (record.outcome, len(record.steps))
    if as_json:
        merged = {"output": str(output), "outcome": outcome, "steps": steps}
        click.echo(msgspec.json.format(msgspec.json.encode(merged), indent=2).decode())
        return
    click.echo(f"{output}: the merged model and its tokenizer")
    if outcome in ("interrupted", "failed"):
        click.echo(f"{run} is of a run that was {outcome} after {words.counted(steps or 0, 'step')}")


def read_plan(path: Path) -> Plan:
    """The plan in the file *path*, checked.

    Raises:
        PlanError: it is none, or contradicts itself.
    """
    try:
        loaded = from_json(path.read_bytes(), str(path))
        computes = load_gpu(loaded.gpu).compute_dtype
        if loaded.compute_dtype != computes:
            raise PlanError(f"{path}: compute_dtype is {loaded.compute_dtype}, a {loaded.gpu} computes in {computes}")
        validate_config(loaded.model_config, f"{path}: model_config")
        return loaded
    except FileNotFoundError:
        raise PlanError(f"plan file {path} does not exist; make one with: sfplan MODEL --output {path}") from None
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from None
