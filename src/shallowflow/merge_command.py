"""``sfplan merge``: the adapter of a run and its base as one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from shallowflow.planner import words
from shallowflow.printing import echo_json
from shallowflow.session import RequestError

_LEARNED = (Path("adapter", "adapter_model.safetensors"), Path("model", "config.json"))
"""Of what a run leaves in its folder, one or the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A run's adapter and its base as one model.

    Attributes:
        output: the folder of the model.
        outcome: how the run ended; ``unknown`` where nothing is recorded.
        steps: updates that it made; None where nothing is recorded.
    """

    output: str
    outcome: str
    steps: int | None


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
    check_run(run)
    from shallowflow.runtime.merge import merge, record_of
    from shallowflow.terminal import status

    with status("merging") as tell:
        merge(run, output, weights, tell)
    record = record_of(run)
    outcome, steps = ("unknown", None) if record is None else (record.outcome, len(record.steps))
    if as_json:
        echo_json(Merged(output=str(output), outcome=outcome, steps=steps))
        return
    click.echo(f"{output}: the merged model and its tokenizer")
    if outcome in ("interrupted", "failed"):
        click.echo(f"{run} is of a run that was {outcome} after {words.counted(steps or 0, 'step')}")


def check_run(run: Path) -> None:
    """Refuse a folder in which no run left what it learned, before anything is loaded that takes long to.

    Raises:
        RequestError: it is not there, or none.
    """
    if not run.is_dir():
        what = f"{run} is a file" if run.exists() else f"folder {run} does not exist"
        raise RequestError(f"{what}; give the folder that sfplan train wrote")
    if not ((run / "plan.json").is_file() and any((run / path).is_file() for path in _LEARNED)):
        raise RequestError(f"{run} holds no adapter and plan; give the folder that sfplan train wrote")
