"""``sfplan check``: whether another trainer's configuration will do on a GPU, and a corrected one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shallowflow import completing
from shallowflow.printing import echo_json
from shallowflow.profiles import load_gpu
from shallowflow.runtime.files import write_text
from shallowflow.session import RequestError

if TYPE_CHECKING:
    from shallowflow.runtime.trainers.check import Verdict


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--gpu", default="t4", show_default=True, metavar="NAME", help="The GPU.", shell_complete=completing.gpus)
@click.option(
    "--tool",
    type=click.Choice(["axolotl", "llamafactory", "trl"]),
    help="Whose configuration a YAML or JSON file is.  [default: told by its keys]",
)
@click.option("--model", help="The model, where its name in FILE is none that is known here.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the corrected configuration to a file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def check_command(file: Path, gpu: str, tool: Any, model: str | None, output: Path | None, as_json: bool) -> None:
    """Say whether another trainer's configuration FILE will do on a GPU: its memory, its speed, and its traps.

    FILE is a YAML of axolotl's, LLaMA-Factory's or TRL's, or a Python script that trains with TRL, Unsloth or
    transformers' Trainer; it is read and not run. The prediction simulates that trainer's own step. Ends with 1 where
    the run would fail.

    \b
    sfplan check axolotl.yaml --gpu t4
    sfplan check train.py --gpu t4 --model Llama-3.2-1B
    sfplan check axolotl.yaml --gpu t4 --output corrected.yaml
    """
    from shallowflow.hub import find_model
    from shallowflow.runtime.trainers import files, names
    from shallowflow.terminal import show, status

    device = load_gpu(gpu)
    if output is not None and not output.parent.is_dir():
        raise RequestError(f"folder {output.parent} for --output does not exist")
    has_bf16 = device.compute_dtype == "bfloat16"
    settings = files.read(file, tool, has_bf16=has_bf16, claims_bf16=has_bf16 or device.device_type == "cuda")
    if output is not None and settings.tool not in files.WRITTEN:
        raise RequestError(
            "--output writes for axolotl and LLaMA-Factory; what others need takes code, and is printed: "
            "`sfplan export` writes scripts"
        )
    spec = find_model(names.original(model or settings.model))
    with status(f"checking {file.name}") as tell:
        from shallowflow.runtime.trainers.check import check

        verdict = check(settings, spec, device, tell)
    if output is not None:
        _write(output, file, verdict)
    if as_json:
        from shallowflow.told_runtime import checked

        echo_json(checked(verdict))
    else:
        from shallowflow.runtime.trainers.view import shown

        show(shown(verdict, device))
    if not verdict.will_run:
        sys.exit(1)


def _write(output: Path, file: Path, verdict: Verdict) -> None:
    from shallowflow.runtime.trainers import files

    if verdict.corrected is None:
        raise RequestError(
            f"{file} needs no correction" if verdict.will_run else f"no correction of {file} fits; nothing is written"
        )
    write_text(output, files.corrected(file, verdict.settings, verdict.corrected))
