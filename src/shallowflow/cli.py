"""The command line: parse, call, print."""

from __future__ import annotations

import difflib
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import click
import msgspec

from shallowflow import __version__
from shallowflow.planner.memory_record import MemoryRecord, OutOfDeviceMemory
from shallowflow.planner.plan import Objective, Plan, Quantization, Workload
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.serialize import PlanError, from_json, to_json
from shallowflow.planner.strategies import MOST_RANK, MOST_TOKENS
from shallowflow.planning import RequestError, make_plan
from shallowflow.profiles import FactsError, gpu_names, load_gpu, load_model, model_names, validate_config
from shallowflow.runtime.files import write_text

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
DEFAULTS = Workload()


class Commands(click.Group):
    """A group whose command may be left out: ``sfplan MODEL`` is ``sfplan plan MODEL``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``plan`` before arguments that name no command."""
        first = args[0] if args else ""
        near = difflib.get_close_matches(first, self.commands, n=1, cutoff=0.75)
        if near and first not in self.commands and first != "model" and not Path(first).exists():
            raise click.UsageError(f"there is no command {first!r}; did you mean {near[0]!r}?", ctx)
        if args and first not in self.commands and first not in ("model", "--help", "-h", "--version"):
            args = ["plan", *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """``model`` is another name of ``plan``."""
        return super().get_command(ctx, "plan" if cmd_name == "model" else cmd_name)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sfplan")
def cli() -> None:
    """Plan, prove and run the best way to fine-tune a language model on a small GPU.

    \b
    sfplan MODEL --gpu t4               how to train it, its memory, speed and price
    sfplan train PLAN --data FILE       the run: exactly that plan
    sfplan profile MODEL --gpu t4       what one layer takes under every strategy
    sfplan simulate FILE.py:FUNCTION    what any training step of yours takes of a GPU's memory
    """


def _workload_options(command: Callable[..., None]) -> Callable[..., None]:
    count = click.IntRange(min=1)
    options = [
        click.option("--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU, or cpu."),
        click.option("--gpus", type=count, default=1, show_default=True, help="How many of them."),
        click.option(
            "--sequence-length",
            type=click.IntRange(min=2),
            default=DEFAULTS.sequence_length,
            show_default=True,
            help="Tokens per sequence.",
        ),
        click.option("--tokens", type=count, help="Size of the work in tokens.  [default: 10,000,000]"),
        click.option("--data", type=click.Path(path_type=Path), help="Size of the work: a JSONL, CSV or text file."),
        click.option(
            "--global-batch-size",
            type=click.IntRange(min=1, max=65_536),
            default=DEFAULTS.global_batch_size,
            show_default=True,
            help="Sequences per optimizer update, over all GPUs.",
        ),
        click.option("--rank", type=count, help="LoRA's rank, fixed."),
        click.option("--min-rank", type=count, help=f"LoRA's rank, at least.  [default: {DEFAULTS.min_rank}]"),
        click.option(
            "--quantization",
            type=click.Choice(get_args(Quantization)),
            default=DEFAULTS.quantization,
            show_default=True,
            help="Format of the base weights; fp16 means not quantized.",
        ),
        click.option(
            "--objective",
            type=click.Choice(get_args(Objective)),
            default=DEFAULTS.objective,
            show_default=True,
            help="What the best plan is best at.",
        ),
        click.option("--region", default=DEFAULTS.region, show_default=True, help="Where prices are taken from."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("plan")
@click.argument("model", default=DEFAULT_MODEL)
@_workload_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan to a file.")
def plan_command(
    model: str,
    gpu: str,
    gpus: int,
    sequence_length: int,
    tokens: int | None,
    data: Path | None,
    global_batch_size: int,
    rank: int | None,
    min_rank: int | None,
    quantization: Quantization,
    objective: Objective,
    region: str,
    as_json: bool,
    output: Path | None,
) -> None:
    """Find the best way to fine-tune MODEL on a GPU, without a GPU.

    MODEL is a shipped name, a folder or config.json, or a Hub id where there is a network.

    \b
    sfplan Llama-3.1-8B --gpu t4
    sfplan Qwen2.5-1.5B --gpu t4 --sequence-length 1024 --tokens 5000000
    """
    from shallowflow.hub import find_model
    from shallowflow.terminal import status

    spec = find_model(model)
    work, notes = _work(tokens, data, sequence_length)
    if rank and min_rank and rank < min_rank:
        raise RequestError(f"--rank {rank} is less than --min-rank {min_rank}; give one of them")
    workload = Workload(
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        num_gpus=gpus,
        rank=rank,
        min_rank=min_rank or DEFAULTS.min_rank,
        quantization=quantization,
        objective=objective,
        region=region,
        **work,
    )
    _check_writable(output)
    device = load_gpu(gpu)
    try:
        with status(f"planning {spec.name}") as tell:
            made = make_plan(spec, device, workload, progress=tell, notes=notes)
    except Infeasible as refusal:
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(refusal.as_dict()), indent=2).decode())
        raise
    if output:
        try:
            write_text(output, to_json(made))
        except OSError as error:
            raise RequestError(f"cannot write {output}: {error.strerror}") from None
    _show(made, as_json)


def _work(tokens: int | None, data: Path | None, sequence_length: int) -> tuple[dict[str, int], tuple[str, ...]]:
    if tokens is not None and data is not None:
        raise RequestError("give either --tokens or --data, not both")
    if data is None:
        return ({"total_tokens": tokens} if tokens else {}), ()
    from shallowflow.runtime.documents import CHARACTERS_PER_TOKEN, estimated_sequences, read_documents

    sequences, total = estimated_sequences(read_documents(data), sequence_length)
    note = (
        f"{data.name}: about {total:,} tokens in {sequences:,} sequences, estimated at "
        f"{CHARACTERS_PER_TOKEN} characters per token; the hours follow from it."
    )
    return {"total_tokens": total, "num_sequences": sequences}, (note,)


def _check_writable(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        raise RequestError(f"folder {output.parent} for --output does not exist")


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        click.echo(to_json(made), nl=False)
        return
    from shallowflow.planner import render
    from shallowflow.terminal import console

    console().print(render.plan(made))


@cli.command("train")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL, CSV or text to learn.")
@click.option("--eval-data", type=click.Path(path_type=Path), help="Held-out text for the perplexity.")
@click.option("--weights", type=click.Path(path_type=Path), help="A folder with weights, or a .gguf file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder for the results.")
@click.option("--steps", type=click.IntRange(1, 10**9), help="Optimizer updates.  [default: one pass over the data]")
@click.option(
    "--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-4, show_default=True, help="AdamW's."
)
@click.option("--usd-per-hour", type=click.FloatRange(min=0), help="What the machine costs, for the meter.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the adapter and the order of the data.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record of the run as JSON.")
def train_command(
    plan: Path,
    data: Path,
    eval_data: Path | None,
    weights: Path | None,
    output: Path,
    steps: int | None,
    learning_rate: float,
    usd_per_hour: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run PLAN: fine-tune on real text, with predicted beside measured.

    Writes the adapter (safetensors, for PEFT), run.json, plan.json and report.html.

    \b
    sfplan train plan.json --data train.jsonl --output run
    """
    from shallowflow.terminal import console, results, watching

    loaded = _read_plan(plan)
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
    )
    signal.signal(signal.SIGTERM, _interrupt)  # a spot instance's end, or a job limit's: save, as for Ctrl-C
    with watching(loaded) as watcher:
        record = train(loaded, request, watcher)
    if as_json:
        click.echo((output / "run.json").read_text(encoding="utf-8"), nl=False)
    else:
        console().print(results(record, output))
    if record.outcome == "interrupted":
        sys.exit(130)


@cli.command("profile")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU, or cpu.")
@click.option(
    "--sequence-length",
    type=click.IntRange(2, MOST_TOKENS),
    default=DEFAULTS.sequence_length,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option("--micro-batch-size", type=click.IntRange(1, 65_536), default=1, show_default=True, help="Sequences.")
@click.option("--rank", type=click.IntRange(1, MOST_RANK), default=16, show_default=True, help="LoRA's rank.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def profile_command(
    model: str, gpu: str, sequence_length: int, micro_batch_size: int, rank: int, as_json: bool
) -> None:
    """Say what one layer of MODEL takes under every strategy: weight formats, and what becomes of activations.

    \b
    sfplan profile SmolLM2-135M --gpu t4
    """
    from shallowflow.hub import find_model
    from shallowflow.planning import Session
    from shallowflow.profiling import model_profile
    from shallowflow.terminal import status

    spec, device = find_model(model), load_gpu(gpu)
    with status(f"profiling {spec.name}") as tell:
        made = model_profile(Session(spec, device, tell), sequence_length, micro_batch_size, rank)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(made), indent=2).decode())
        return
    from shallowflow.planner import render
    from shallowflow.terminal import console

    console().print(render.model_profile(made))


@cli.command("simulate")
@click.argument("step", metavar="FILE.py:FUNCTION")
@click.option("--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU, or cpu.")
@click.option(
    "--capacity-mib",
    type=click.FloatRange(min=0, min_open=True),
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


@cli.command("measure")
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


def _show_memory(record: MemoryRecord, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
        return
    from shallowflow.planner import render
    from shallowflow.terminal import console

    console().print(render.memory_record(record))


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _read_plan(path: Path) -> Plan:
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


@cli.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def models_command(as_json: bool) -> None:
    """List the models that can be planned offline."""
    specs = [load_model(name) for name in model_names()]
    if as_json:
        click.echo(json.dumps([{"name": s.name, "num_parameters": s.num_parameters} for s in specs], indent=2))
        return
    for spec in specs:
        count = "" if spec.num_parameters is None else f"{spec.num_parameters:>16,}"
        click.echo(f"{spec.name:<45}{count}")


@cli.command("gpus")
@click.option("--json", "as_json", is_flag=True, help="Print every number with its source as JSON.")
def gpus_command(as_json: bool) -> None:
    """List the GPUs that can be planned for."""
    specs = [load_gpu(name) for name in gpu_names()]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(specs), indent=2).decode())
        return
    for spec in specs:
        click.echo(f"{spec.name:<12}{spec.memory_bytes / 2**30:>8.2f} GiB  {spec.compute_dtype:<10}{spec.title}")


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _bad_input() -> tuple[type[Exception], ...]:
    """The exceptions that mean bad input; those of modules that were never loaded cannot have been raised."""
    found: list[type[Exception]] = [FactsError, PlanError, RequestError]
    later = {"documents": "DataError", "run": "RunError", "user_step": "StepError", "weights": "WeightsError"}
    for module, name in later.items():
        loaded = sys.modules.get(f"shallowflow.runtime.{module}")
        if loaded is not None:
            found.append(getattr(loaded, name))
    return tuple(found)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit code 1 where nothing fits, 2 for bad input, 130 for Ctrl-C."""
    try:
        return cli.main(args=arguments, prog_name="sfplan", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except Infeasible as error:
        _fail(str(error), 1)
    except OutOfDeviceMemory as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except Exception as error:
        if isinstance(error, _bad_input()):
            _fail(str(error), 2)
        raise
