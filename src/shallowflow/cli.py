"""The command line: parse, call, print."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from shallowflow import __version__, completing
from shallowflow.check_command import check_command
from shallowflow.cost_command import cost_command
from shallowflow.data_command import data_command
from shallowflow.evaluation import evaluate_command
from shallowflow.exporting import export_command
from shallowflow.frontier_command import frontier_command
from shallowflow.inspection import (
    calibrate_command,
    gpus_command,
    measure_command,
    models_command,
    profile_command,
    simulate_command,
)
from shallowflow.launch_command import launch_command
from shallowflow.merge_command import merge_command
from shallowflow.options import DEFAULT_MODEL, request, workload_options
from shallowflow.outputs import check_apart
from shallowflow.planner.memory_record import OutOfDeviceMemory
from shallowflow.planner.plan import Plan
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.serialize import PlanError, to_json
from shallowflow.planning import beside_one, make_plan
from shallowflow.prices_command import prices_command
from shallowflow.printing import echo_json
from shallowflow.profiles import FactsError
from shallowflow.reporting import check_report, write_report
from shallowflow.runs_command import runs_command, stop_command
from shallowflow.runtime.files import write_text
from shallowflow.schema_command import schema_command
from shallowflow.session import RequestError
from shallowflow.training import train_command
from shallowflow.ui_command import ui_command
from shallowflow.verify_command import verify_command
from shallowflow.weigh_command import weigh_command
from shallowflow.whatif_command import whatif_command

HELP_NAMES = ["-h", "--help"]


class Commands(click.Group):
    """A group whose command may be left out: ``sfplan MODEL`` is ``sfplan plan MODEL``."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Each knows both spellings of help, also where its line is read without the group's."""
        cmd.context_settings.setdefault("help_option_names", HELP_NAMES)
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``plan`` before arguments that name no command."""
        first = args[0] if args else ""
        near = difflib.get_close_matches(first, self.commands, n=1, cutoff=0.75)
        if (
            near
            and not ctx.resilient_parsing
            and first not in self.commands
            and first != "model"
            and not Path(first).exists()
        ):
            raise click.UsageError(f"there is no command {first!r}; did you mean {near[0]!r}?", ctx)
        if args and first not in self.commands and first not in ("model", "--help", "-h", "--version"):
            args = ["plan", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and where none begins so, models."""
        return super().shell_complete(ctx, incomplete) or completing.models(ctx, self.params[0], incomplete)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """``model`` is another name of ``plan``."""
        return super().get_command(ctx, "plan" if cmd_name == "model" else cmd_name)


@click.group(cls=Commands, context_settings={"help_option_names": HELP_NAMES})
@click.version_option(__version__, prog_name="sfplan")
def cli() -> None:
    """Plan, prove and run the best way to fine-tune a language model on a small GPU.

    \b
    sfplan MODEL --gpu t4               how to train it, its memory, speed and price
    sfplan train PLAN --data FILE --output FOLDER
                                        the run: exactly that plan
    sfplan data FILE                    what a data file holds, and how long its documents are
    sfplan merge RUN --output FOLDER    the adapter and its base as one model
    sfplan evaluate RUN --tasks NAMES   how well it does on tasks of lm-evaluation-harness
    sfplan launch PLAN --data FILE      the run on an instance of EC2, which ends by itself
    sfplan runs                         the instances that were launched; sfplan stop RUN ends one
    sfplan cost RUN                     what AWS billed for a run, beside what it reckoned
    sfplan verify PLAN                  whether a plan's proof holds
    sfplan export PLAN --to TOOL --data FILE
                                        the run as SkyPilot's task, or for axolotl, LLaMA-Factory, TRL or Unsloth
    sfplan check FILE                   whether another trainer's configuration will do, and a corrected one
    sfplan ui                           plans in a browser, served to this machine alone
    sfplan frontier MODEL               what memory and finer weights buy
    sfplan whatif MODEL                 every instance, region, spot or on demand, in hours and dollars
    sfplan prices                       what instances cost, from when and where; --update asks AWS
    sfplan weigh MODEL                  what int8 and nf4 do to its own weights
    sfplan profile MODEL --gpu t4       what one layer takes under every strategy
    sfplan schema                       what the JSON of every command holds
    sfplan simulate FILE.py:FUNCTION    what any training step of yours takes of a GPU's memory
    """


@cli.command("plan")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completing.models)
@workload_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan to a file.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write a page on the plan, FILE.html.")
def plan_command(model: str, as_json: bool, output: Path | None, report: Path | None, **options: Any) -> None:
    """Find the best way to fine-tune MODEL on a GPU, without a GPU.

    MODEL is a shipped name, a folder or config.json, or a Hub id where there is a network.

    \b
    sfplan Llama-3.1-8B --gpu t4
    sfplan Qwen2.5-1.5B --gpu t4 --sequence-length 1024 --tokens 5000000
    sfplan Qwen2.5-1.5B --gpu t4 --max-process-gib 10 --fix micro_batch_size=2
    sfplan Qwen2.5-1.5B --gpu t4 --output plan.json --report plan.html
    """
    from shallowflow.hub import find_model
    from shallowflow.terminal import status

    spec = find_model(model)
    device, workload, notes = request((model, spec.name), **options)
    check_report(report)
    check_apart({"--output": output, "--report": report}, (model, options["data"], options["eval_data"]))
    try:
        with status(f"planning {spec.name}") as tell:
            made = make_plan(spec, device, workload, progress=tell, notes=notes)
            made = beside_one(made, spec, device, progress=tell)
    except Infeasible as refusal:
        if as_json:
            echo_json(refusal.as_dict())
        raise
    if output:
        try:
            write_text(output, to_json(made))
        except OSError as error:
            raise RequestError(f"cannot write {output}: {error.strerror}") from None
    if report:
        with status("writing the page") as tell:
            write_report(made, report, tell)
    _show(made, as_json)


def _show(made: Plan, as_json: bool) -> None:
    if as_json:
        click.echo(to_json(made), nl=False)
        return
    from shallowflow.planner import render
    from shallowflow.terminal import show

    show(render.plan(made))


for _command in (
    frontier_command,
    whatif_command,
    ui_command,
    prices_command,
    train_command,
    merge_command,
    evaluate_command,
    launch_command,
    runs_command,
    stop_command,
    cost_command,
    verify_command,
    export_command,
    check_command,
    data_command,
    weigh_command,
    profile_command,
    simulate_command,
    measure_command,
    calibrate_command,
    models_command,
    gpus_command,
    schema_command,
):
    cli.add_command(_command)


def _fail(message: str, code: int) -> NoReturn:
    joining = sys.modules.get("shallowflow.runtime.joining")
    if joining is None or not joining.is_silent():
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _one_line(error: click.ClickException) -> str:
    """What click says of a wrong option, and where the right ones stand."""
    said = " ".join(error.format_message().split()).removesuffix(".")
    said = said.replace("a valid integer range", "a whole number").replace("a valid float range", "a number")
    where = getattr(getattr(error, "ctx", None), "command_path", "sfplan")
    return f"{said}; see {where} --help"


def _bad_input() -> tuple[type[Exception], ...]:
    """The exceptions that mean bad input; those of modules that were never loaded cannot have been raised."""
    found: list[type[Exception]] = [FactsError, PlanError, RequestError]
    later = {
        "documents": "DataError",
        "request": "RunError",
        "calibrate": "CalibrationError",
        "user_step": "StepError",
        "sources": "WeightsError",
        "skypilot": "ExportError",
        "trainers.settings": "ConfigurationError",
        "aws.bills": "BillError",
        "aws.clients": "AwsError",
        "machine": "ScriptError",
        "storage": "StoreError",
    }
    return (*found, *_loaded(later))


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that mean that what was begun could not be ended."""
    return (Infeasible, OutOfDeviceMemory, *_loaded({"request": "RunFailed", "trainers.export": "InexpressibleError"}))


def _loaded(exceptions: dict[str, str]) -> list[type[Exception]]:
    """By module, those of modules that are loaded."""
    modules = {name: sys.modules.get(f"shallowflow.runtime.{name}") for name in exceptions}
    return [getattr(module, exceptions[name]) for name, module in modules.items() if module is not None]


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit code 1 where nothing fits or a run fails, 2 for bad input, 130 for Ctrl-C."""
    try:
        return cli.main(args=arguments, prog_name="sfplan", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(_one_line(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except Exception as error:
        if isinstance(error, _failures()):
            _fail(str(error), 1)
        if isinstance(error, _bad_input()):
            _fail(str(error), 2)
        raise
