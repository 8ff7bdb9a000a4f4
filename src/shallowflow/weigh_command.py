"""``sfplan weigh``: what weight formats do to a model's own weights."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shallowflow import completing
from shallowflow.options import DEFAULT_MODEL
from shallowflow.planner import quality
from shallowflow.planner.strategies import Strategy
from shallowflow.planner.weighed import Weighed
from shallowflow.printing import echo_json

QUANTIZED = (
    Strategy(weight_format="int8", activations="save"),
    Strategy(weight_format="nf4", activations="save"),
    Strategy(weight_format="nf4", activations="save", double_quantization=True),
)


@click.command("weigh")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completing.models)
@click.option("--weights", type=click.Path(path_type=Path), help="A folder with weights, or a .gguf file.")
@click.option("--json", "as_json", is_flag=True, help="Print every layer's errors as JSON.")
def weigh_command(model: str, weights: Path | None, as_json: bool) -> None:
    """Measure what int8 and nf4 change in MODEL's own weights; plans for it use that from then on, and say so.

    The weights are read one matrix at a time. Each layer is kept when it is done: after Ctrl-C the same command goes
    on. Plans go by typical errors again where the weights' files have changed.

    \b
    sfplan weigh SmolLM2-135M-Instruct
    sfplan weigh Llama-3.1-8B --weights ./llama
    """
    from shallowflow.hub import find_model
    from shallowflow.terminal import show, status

    spec = find_model(model)
    done = "no layer"
    try:
        with status(f"weighing {spec.name}") as tell:
            from shallowflow.runtime.weigh import weigh

            def progress(number: int, of: int) -> None:
                nonlocal done
                done = f"{number} of {of} layers"
                tell(done)

            found = weigh(spec, weights, progress)
    except KeyboardInterrupt:
        click.echo(f"{done} kept; the same command goes on", err=True)
        raise
    if as_json:
        echo_json(found)
        return
    show(_shown(spec.name, found))


def _shown(model: str, found: Weighed) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layer", "int8", "nf4", "nf4 double-quantized"):
        table.add_column(name, justify="right")
    for number, layer in enumerate(found.layers):
        table.add_row(str(number), *(f"{error:.4f}" for error in (layer.int8, layer.nf4, layer.double_quantized)))
    for name, own in (("all", found.layers), ("usual", ())):
        errors = [quality.mean_error([strategy] * len(found.layers), own) for strategy in QUANTIZED]
        table.add_row(name, *(f"{error:.4f}" for error in errors), style="bold" if own else "dim")
    title = Text(f"{model}: relative errors of its weights when stored", style="bold")
    return Group(title, table, Text("Plans for this model go by these errors from now on.", style="dim"))
