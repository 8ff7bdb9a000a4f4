"""The command that measures what a run learned on the harness's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shallowflow.merge_command import check_run
from shallowflow.printing import echo_json

if TYPE_CHECKING:
    from rich.table import Table

    from shallowflow.runtime.harness import Score


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, help="Names of tasks, or paths of their YAML files, with commas between.")
@click.option("--weights", type=click.Path(path_type=Path), help="The base: a folder with weights, or a .gguf file.")
@click.option("--limit", type=click.IntRange(1, 10**9), help="Examples of each task.  [default: all]")
@click.option("--batch-size", type=click.IntRange(1, 10**6), default=1, show_default=True, help="Sequences at once.")
@click.option("--base", "with_base", is_flag=True, help="Measure the base as it was, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate_command(
    run: Path, tasks: str, weights: Path | None, limit: int | None, batch_size: int, with_base: bool, as_json: bool
) -> None:
    """Measure what is in the folder RUN by lm-evaluation-harness: an adapter over its base as trained on, or a model.

    Needs the extra `eval`. Tasks whose data are not local need a network.

    \b
    sfplan evaluate run --tasks arc_easy,hellaswag --limit 100
    sfplan evaluate run --tasks mine.yaml --base
    """
    from shallowflow.terminal import console, status

    names = tuple(name for name in (part.strip() for part in tasks.split(",")) if name)
    if not names:
        raise click.UsageError("--tasks names no task; give names with commas between, such as arc_easy,hellaswag")
    check_run(run)
    from shallowflow.runtime.harness import Examination, examine

    asked = Examination(run=run, tasks=names, weights=weights, limit=limit, batch_size=batch_size, with_base=with_base)
    with status("evaluating") as tell:
        scores = examine(asked, tell)
    if as_json:
        echo_json(scores)
    else:
        console().print(_table(scores))


def _table(scores: list[Score]) -> Table:
    """A row for each metric; the base's score where there is one."""
    from rich.table import Table

    shown = any(score.base is not None for score in scores)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("task", "metric", *(["base"] if shown else []), "trained", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for score in scores:
        base = [f"{score.base:.4f}"] if score.base is not None else []
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        table.add_row(score.task, score.metric, *base, f"{score.trained:.4f}", error)
    return table
