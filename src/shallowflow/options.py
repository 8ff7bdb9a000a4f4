"""Options and defaults that commands share, and the request that they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from shallowflow import completing
from shallowflow.data_command import data_format_option
from shallowflow.numbers import FiniteRange
from shallowflow.planner import machines
from shallowflow.planner.allowed import HEADROOM
from shallowflow.planner.bounds import MOST_GPUS
from shallowflow.planner.plan import Objective, Quantization, Workload
from shallowflow.planner.strategies import (
    MODULE_NAME,
    Activations,
    Method,
    Optimizer,
    Sharding,
    TargetGroup,
    TargetModules,
)
from shallowflow.planner.weighed import MOST_ERROR
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.profiles.load import load_instances
from shallowflow.session import RequestError
from shallowflow.work import size_of_work

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
DEFAULTS = Workload()
POSITIVE = FiniteRange(min=0, min_open=True)
MOST_FIXED = 65_536
FIXABLE = (
    "micro_batch_size",
    "loss_chunks",
    "rank",
    "activations",
    "quantization",
    "double_quantization",
    "packing",
    "optimizer",
    "parts_per_stage",
)
BOOLEANS = ("double_quantization", "packing")


def fixed_fields(fixed: tuple[str, ...]) -> dict[str, object]:
    """Fields of a workload from ``KEY=VALUE`` texts.

    Raises:
        RequestError: a key is none, or a value is of another kind.
    """
    found: dict[str, object] = {}
    for text in fixed:
        key, separator, value = text.partition("=")
        if not separator or key not in FIXABLE:
            raise RequestError(f"--fix {text!r} pins nothing; give KEY=VALUE with one of {', '.join(FIXABLE)}")
        found[key] = _field(key, value)
    return found


def _field(key: str, value: str) -> object:
    texts: dict[str, tuple[str, ...]] = {
        "activations": get_args(Activations),
        "quantization": get_args(Quantization),
        "optimizer": get_args(Optimizer),
        **dict.fromkeys(BOOLEANS, ("true", "false")),
    }
    if key in texts:
        if value not in texts[key]:
            raise RequestError(f"--fix {key}={value}: not one of {', '.join(texts[key])}")
        return value == "true" if key in BOOLEANS else value
    if not value.isdecimal() or not 1 <= int(value) <= MOST_FIXED:
        raise RequestError(f"--fix {key}={value}: not a whole number from 1 to {MOST_FIXED}")
    return int(value)


def _choice(name: str, among: tuple[str, ...], default: str, told: str) -> Callable[..., Any]:
    return click.option(name, type=click.Choice(among), default=default, show_default=True, help=told)


def _target_modules(_context: click.Context, _option: click.Parameter, value: str) -> TargetModules:
    """What ``--target-modules`` says.

    Raises:
        RequestError: it names nothing.
    """
    if value in get_args(TargetGroup):
        return cast("TargetGroup", value)
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name in get_args(TargetGroup):
            raise RequestError(f"--target-modules {value!r}: {name} stands alone; give it by itself, or modules")
        if not re.fullmatch(MODULE_NAME, name):
            raise RequestError(
                f"--target-modules {value!r}: {name!r} names no module; give all-linear, attention, or names such as "
                "q_proj,v_proj"
            )
    return names


def adapter_options(command: Callable[..., None]) -> Callable[..., None]:
    """The kind of adapter, or none, and what it is on."""
    told = "The kind of LoRA, or full: every weight learns."
    kind = _choice("--adapter", get_args(Method), DEFAULTS.adapter, told)
    on = click.option(
        "--target-modules",
        default=DEFAULTS.target_modules,
        show_default=True,
        metavar="all-linear|attention|NAME,NAME,...",
        callback=_target_modules,
        help="The layers' linear modules that have an adapter.",
    )
    return kind(on(command))  # type: ignore[no-any-return]


def workload_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every option that a ``Workload`` is made from, and the GPU's."""
    count = click.IntRange(1, MOST_GPUS)
    gpu = click.option(
        "--gpu",
        default="t4",
        show_default=True,
        metavar="NAME",
        help="The GPU, or cpu.",
        shell_complete=completing.gpus,
    )
    gpus = click.option("--gpus", type=count, default=1, show_default=True, help="How many of them.")
    nodes = click.option("--nodes", type=count, help="How many machines they are in.  [default: as few as have them]")
    region = click.option("--region", default=DEFAULTS.region, show_default=True, help="Where prices are taken from.")
    return gpu(gpus(nodes(work_options(region(command)))))


def work_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every option that a ``Workload`` is made from, but for those that say where it runs."""
    count = click.IntRange(min=1)
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option(
            "--sharding",
            type=click.Choice(get_args(Sharding)),
            help="What of the model several GPUs share: nothing, or the frozen weights.  [default: what is faster]",
        ),
        click.option(
            "--stages",
            type=click.IntRange(1, MOST_GPUS),
            help="Parts to cut the model into, each on GPUs of its own.  [default: what is faster]",
        ),
        click.option(
            "--sequence-length",
            type=click.IntRange(min=2),
            default=DEFAULTS.sequence_length,
            show_default=True,
            help="Tokens per sequence.",
        ),
        click.option("--tokens", type=count, help="Size of the work in tokens.  [default: 10,000,000]"),
        click.option(
            "--data", type=click.Path(path_type=Path), help="Size of the work: a file to learn, or hf:ORG/NAME."
        ),
        click.option(
            "--eval-data", type=click.Path(path_type=Path), help="Held-out data, whose evaluation takes time, too."
        ),
        data_format_option,
        click.option(
            "--global-batch-size",
            type=click.IntRange(min=1, max=65_536),
            default=DEFAULTS.global_batch_size,
            show_default=True,
            help="Sequences per optimizer update, over all GPUs.",
        ),
        click.option(
            "--packing/--no-packing",
            default=None,
            help="Several documents to a sequence, or one.  [default: what takes fewer hours]",
        ),
        adapter_options,
        click.option(
            "--optimizer",
            type=click.Choice(get_args(Optimizer)),
            help="AdamW, or AdamW with its state in 8 bits.  [default: what is faster]",
        ),
        click.option("--rank", type=count, help="LoRA's rank, fixed."),
        click.option("--min-rank", type=count, help=f"LoRA's rank, at least.  [default: {DEFAULTS.min_rank}]"),
        _choice(
            "--quantization",
            get_args(Quantization),
            DEFAULTS.quantization,
            "Format of the base weights; fp16 means not quantized.",
        ),
        _choice("--objective", get_args(Objective), DEFAULTS.objective, "What the best plan is best at."),
        click.option(
            "--headroom",
            type=FiniteRange(0, 1, max_open=True),
            help=f"Share of the GPU's memory that stays free.  [default: {HEADROOM}]",
        ),
        click.option("--max-process-gib", type=POSITIVE, help="What the process may take of the GPU's memory."),
        click.option(
            "--max-weight-error",
            type=FiniteRange(0, MOST_ERROR),
            help="How coarse the base weights may be.",
        ),
        click.option("--deadline-hours", type=POSITIVE, help="When the run must be over, on the wall."),
        click.option("--budget-usd", type=POSITIVE, help="What the run may cost, on demand."),
        click.option(
            "--fix",
            "fixed",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"Pin a decision: {', '.join(FIXABLE)}.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def request(
    model: tuple[str, str],
    gpu: str,
    gpus: int,
    nodes: int | None,
    stages: int | None,
    tokens: int | None,
    data: Path | None,
    eval_data: Path | None,
    data_format: Format | None,
    rank: int | None,
    min_rank: int | None,
    max_process_gib: float | None,
    fixed: tuple[str, ...],
    **same: Any,
) -> tuple[GpuSpec, Workload, tuple[str, ...]]:
    """The GPU, the workload and notes on it, from what the command line says.

    *model* is as it was asked for, and its name; *same* are the workload's own fields.
    """
    device = load_gpu(gpu)
    work, notes = size_of_work(model, tokens, data, eval_data, data_format, same["sequence_length"])
    if rank and min_rank and rank < min_rank:
        raise RequestError(f"--rank {rank} is less than --min-rank {min_rank}; give one of them")
    pinned = fixed_fields(fixed)
    twice = {"rank": rank, **{name: same[name] for name in ("packing", "quantization", "optimizer")}}
    for name, value in twice.items():
        if name in pinned and value not in (None, getattr(DEFAULTS, name), pinned[name]):
            raise RequestError(f"--fix {name}={pinned[name]} contradicts the option of that name, {value}; give one")
    options: dict[str, Any] = {
        **same,
        "num_gpus": gpus,
        "num_machines": nodes or machines.fewest(load_instances(device.name), gpus),
        "num_stages": stages,
        "rank": rank,
        "min_rank": min_rank or DEFAULTS.min_rank,
        "max_process_bytes": None if max_process_gib is None else max(1, int(max_process_gib * 2**30)),
        **work,
        **pinned,
    }
    return device, Workload(**options), notes
