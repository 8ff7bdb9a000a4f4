"""The commands that look and change nothing: profiles of layers, memory of any step, what is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click

from shallowflow import completing
from shallowflow.numbers import FiniteRange
from shallowflow.options import DEFAULT_MODEL, DEFAULTS, adapter_options
from shallowflow.planner.memory_record import MemoryRecord
from shallowflow.planner.strategies import MOST_RANK, MOST_TOKENS, Method, TargetModules
from shallowflow.printing import echo_json
from shallowflow.profiles import gpu_names, load_gpu, load_model, model_names
from shallowflow.runtime.files import write_text
from shallowflow.session import RequestError


@click.command("profile")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completing.models)
@click.option(
    "--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU, or cpu.", shell_complete=completing.gpus
)
@click.option(
    "--sequence-length",
    type=click.IntRange(2, MOST_TOKENS),
    default=DEFAULTS.sequence_length,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option("--micro-batch-size", type=click.IntRange(1, 65_536), default=1, show_default=True, help="Sequences.")
@click.option("--rank", type=click.IntRange(1, MOST_RANK), help="LoRA's rank.  [default: 16]")
@adapter_options
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def profile_command(
    model: str,
    gpu: str,
    sequence_length: int,
    micro_batch_size: int,
    rank: int | None,
    adapter: Method,
    target_modules: TargetModules,
    as_json: bool,
) -> None:
    """Say what one layer of MODEL takes under every strategy: weight formats, and what becomes of activations.

    \b
    sfplan profile SmolLM2-135M --gpu t4
    """
    from shallowflow.hub import find_model
    from shallowflow.profiling import model_profile
    from shallowflow.session import Session
    from shallowflow.terminal import status

    spec, device = find_model(model), load_gpu(gpu)
    with status(f"profiling {spec.name}") as tell:
        session = Session(spec, device, tell, adapter, target_modules)
        made = model_profile(session, sequence_length, micro_batch_size, rank)
    if as_json:
        echo_json(made)
        return
    from shallowflow.planner import render
    from shallowflow.terminal import show

    show(render.model_profile(made))


@click.command("simulate")
@click.argument("step", metavar="FILE.py:FUNCTION")
@click.option(
    "--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU, or cpu.", shell_complete=completing.gpus
)
@click.option(
    "--capacity-mib",
    type=FiniteRange(min=0, min_open=True),
    help="What the allocator may reserve; what does not fit fails as on the device.  [default: no bound]",
)
@click.option("--expandable-segments", is_flag=True, help="As with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with the step's timeline."
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def simulate_command(
    step: str, gpu: str, capacity_mib: float | None, expandable_segments: bool, report: Path | None, as_json: bool
) -> None:
    """Say what any training step takes of a GPU's memory, without the GPU.

    FUNCTION(device) builds model, data and optimizer on the device and returns a function that runs one step.
    FILE.py is run.

    \b
    sfplan simulate step.py:make_step --gpu t4
    sfplan simulate step.py:make_step --gpu t4 --capacity-mib 14000 --report step.html
    """
    from shallowflow.terminal import status

    device = load_gpu(gpu)
    if capacity_mib is not None and not math.isfinite(capacity_mib):
        raise RequestError(f"a capacity of {capacity_mib} MiB is none; give a number of MiB, or leave it out")
    capacity = None if capacity_mib is None else int(capacity_mib * 2**20)
    with status(f"simulating {step}"):
        from shallowflow.runtime.user_step import simulated

        record = simulated(step, device, capacity, expandable_segments=expandable_segments)
    if report:
        from shallowflow.runtime.report import memory_html

        try:
            write_text(report, memory_html(record, step))
        except OSError as error:
            raise RequestError(f"cannot write {report}: {error.strerror}") from None
    _show_memory(record, as_json)


@click.command("measure")
@click.argument("step", metavar="FILE.py:FUNCTION")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="The device to run it on."
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def measure_command(step: str, device: str, as_json: bool) -> None:
    """Run a training step for real and say what it took: the truth beside `sfplan simulate`.

    \b
    sfplan measure step.py:make_step --device cpu
    """
    from shallowflow.terminal import status

    with status(f"measuring {step}"):
        from shallowflow.runtime.user_step import measured

        record = measured(step, device)
    _show_memory(record, as_json)


@click.command("calibrate")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What to measure.")
@click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON.")
def calibrate_command(device: str, as_json: bool) -> None:
    """Measure this machine for about a minute, so that plans for it know its own rates.

    Times single operators and a dozen short training steps with random weights, fits the rates to them, and keeps the
    profile in the user's configuration folder. Plans for that device use it from then on, and say so.

    \b
    sfplan calibrate
    sfplan calibrate --device cuda
    """
    from shallowflow.planner import render
    from shallowflow.terminal import show, status

    with status("calibrating") as tell:
        from shallowflow.runtime.calibrate import calibrate

        found = calibrate(device, tell)  # type: ignore[arg-type]  # click has checked it
        path = found.save()
    if as_json:
        from shallowflow.told_runtime import kept

        echo_json(kept(found, path))
        return
    show(render.calibration(found.device, found.rates(), found.step_rows()))
    click.echo(
        f"\nnine of ten steps within {found.gpu.step_error:.0%}, by rates fitted to the other model's steps\n"
        f"plans for --gpu {found.gpu.name} use this profile from now on: {_short(path)}"
    )


def _short(path: Path) -> str:
    """*path* as people write it."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _show_memory(record: MemoryRecord, as_json: bool) -> None:
    if as_json:
        echo_json(record)
        return
    from shallowflow.planner import render
    from shallowflow.terminal import show

    show(render.memory_record(record))


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that can be planned offline.

    Attributes:
        name: ``organisation/name`` as on the Hub.
        num_parameters: the published count of distinct parameters; None where none is.
    """

    name: str
    num_parameters: int | None


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def models_command(as_json: bool) -> None:
    """List the models that can be planned offline."""
    specs = [load_model(name) for name in model_names()]
    if as_json:
        echo_json([KnownModel(name=spec.name, num_parameters=spec.num_parameters) for spec in specs])
        return
    for spec in specs:
        count = "" if spec.num_parameters is None else f"{spec.num_parameters:>16,}"
        click.echo(f"{spec.name:<45}{count}")


@click.command("gpus")
@click.option("--json", "as_json", is_flag=True, help="Print every number with its source as JSON.")
def gpus_command(as_json: bool) -> None:
    """List the GPUs that can be planned for."""
    specs = [load_gpu(name) for name in gpu_names()]
    if as_json:
        echo_json(specs)
        return
    for spec in specs:
        click.echo(f"{spec.name:<12}{spec.memory_bytes / 2**30:>8.2f} GiB  {spec.compute_dtype:<10}{spec.title}")
