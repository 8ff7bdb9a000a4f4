"""Options and defaults that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click

from shallowflow.planner.plan import Objective, Quantization, Workload

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
DEFAULTS = Workload()


def workload_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every option that a ``Workload`` is made from, and the GPU's."""
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
            "--eval-data", type=click.Path(path_type=Path), help="Held-out text, whose evaluation takes time, too."
        ),
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
