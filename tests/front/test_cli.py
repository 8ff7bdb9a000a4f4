"""Every command's output and exit code, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest

import shallowflow
from shallowflow import cli
from shallowflow.options import DEFAULT_MODEL
from shallowflow.planner import serialize
from shallowflow.profiles import gpu_names, load_gpu, load_model, model_names
from tests.front.shell import AS_PROGRAM, SMALL, sfplan

# Help


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command(words: list[str]) -> None:
    """Both spellings print the same help, with each command in it."""
    done = sfplan(*words)

    assert done.code == 0 and done.errors == ""
    assert done.output == sfplan("--help").output
    assert all(name in done.output for name in cli.cli.commands)


@pytest.mark.parametrize("command", ["plan", "model", "train", "data", "simulate", "measure", "models", "gpus"])
def test_every_command_has_help(command: str) -> None:
    """Each command explains each of its options, for both spellings of help."""
    done = sfplan(command, "--help")

    assert done == sfplan(command, "-h")
    assert done.code == 0 and done.output.startswith("Usage: sfplan ")
    real = cli.cli.commands["plan" if command == "model" else command]
    assert all(option in done.output for parameter in real.params for option in parameter.opts if "--" in option)


def test_a_line_that_another_command_reads_changes_no_help() -> None:
    """What launching reads a run's options with leaves the command as it was."""
    made = click.Command("alone")
    cli.cli.add_command(made)
    try:
        made.make_context("alone", []).command.get_help_option(click.Context(made))
        assert sfplan("alone", "-h") == sfplan("alone", "--help")
    finally:
        del cli.cli.commands["alone"]


def test_nothing_at_all_is_answered_with_help() -> None:
    """Without a word the program says what it can do."""
    done = sfplan()

    assert "Usage: sfplan" in done.output + done.errors
    assert "Traceback" not in done.errors


def test_the_version_is_the_installed_one() -> None:
    """Program, package and distribution agree on the version, and the installed script is this command line."""
    done = sfplan("--version")

    assert done.code == 0
    assert done.output.split()[-1] == shallowflow.__version__ == version("shallowflow")
    (script,) = entry_points(group="console_scripts", name="sfplan")
    assert script.load() is cli.main


# Plans


def test_the_word_plan_may_be_left_out(tiny_folder: Path) -> None:
    """``sfplan MODEL``, ``sfplan plan MODEL`` and ``sfplan model MODEL`` are one command."""
    bare, plan, model = (sfplan(*word, tiny_folder, *SMALL) for word in ([], ["plan"], ["model"]))

    assert bare.code == 0
    assert bare.output.startswith("tiny on one CPU\n")
    assert bare == plan == model


def test_the_model_may_be_left_out() -> None:
    """``sfplan model --gpu t4`` plans the model that the help names, and so do the other ways to say it."""
    named = sfplan(DEFAULT_MODEL)
    others = [sfplan(*words) for words in (["model", "--gpu", "t4"], ["plan"], ["--gpu", "t4"])]

    assert named.code == 0
    assert named.output.startswith(f"{DEFAULT_MODEL} on one T4\n")
    assert all((other.code, other.output) == (0, named.output) for other in others)


def test_a_plan_in_json_is_the_plan(tiny_folder: Path, tmp_path: Path) -> None:
    """What is printed and what is written are the same JSON, and reading it gives the plan of the Python call."""
    words = (tiny_folder, *SMALL, "--rank", 8, "--tokens", 5000, "--objective", "quality")
    printed = sfplan(*words, "--json")
    written = sfplan(*words, "--output", tmp_path / "plan.json")

    assert printed.code == written.code == 0
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == printed.output
    assert written.output == sfplan(*words).output
    made = serialize.from_json(printed.output)
    assert serialize.to_json(made) == printed.output
    asked: dict[str, Any] = {"sequence_length": 32, "rank": 8, "total_tokens": 5000, "objective": "quality"}
    assert made == shallowflow.plan(str(tiny_folder), "cpu", **asked)


def test_every_option_reaches_the_plan(tiny_folder: Path) -> None:
    """Each option of the workload is in the plan with the value given."""
    given = {
        "gpus": ("num_gpus", 2),
        "nodes": ("num_machines", 1),
        "sharding": ("sharding", "weights"),
        "sequence-length": ("sequence_length", 48),
        "tokens": ("total_tokens", 123_456),
        "global-batch-size": ("global_batch_size", 6),
        "rank": ("rank", 24),
        "min-rank": ("min_rank", 8),
        "quantization": ("quantization", "nf4"),
        "adapter": ("adapter", "dora"),
        "target-modules": ("target_modules", "attention"),
        "optimizer": ("optimizer", "adamw8bit"),
        "objective": ("objective", "cost"),
        "region": ("region", "eu-west-1"),
        "headroom": ("headroom", 0.1),
        "max-weight-error": ("max_weight_error", 0.5),
        "deadline-hours": ("deadline_hours", 1000.0),
        "budget-usd": ("budget_usd", 900.0),
    }
    fixed: dict[str, object] = {"micro_batch_size": 3, "loss_chunks": 4, "activations": "recompute"}
    fixed |= {"double_quantization": True, "packing": True}
    words = [word for option, (_, value) in given.items() for word in (f"--{option}", value)]
    words += [word for key, value in fixed.items() for word in ("--fix", f"{key}={value}".lower())]
    words += ["--max-process-gib", 10]

    done = sfplan(tiny_folder, "--gpu", "t4", "--json", *words)

    assert done.code == 0, done.errors
    workload = json.loads(done.output)["workload"]
    unsaid: dict[str, object] = {"num_sequences": None, "num_packed_sequences": None, "window_counts": []}
    unsaid |= {"num_eval_sequences": 0, "num_stages": None, "parts_per_stage": None, "max_process_bytes": 10 * 2**30}
    assert workload == {**unsaid, **fixed, **dict(given.values())}


def test_data_gives_the_size_of_the_work(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Tokens and sequences are counted by the tokenizer beside the model, or estimated, which is said."""
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())

    counted, estimated = (
        serialize.from_json(sfplan(model, *SMALL, "--data", data, "--json").output) for model in (tiny_folder, tmp_path)
    )

    assert counted.workload.total_tokens == sum(len(text.encode()) + 1 for text in texts)
    assert counted.workload.num_sequences == sum(-(-len(text.encode()) // 32) for text in texts)
    assert any("counted by the model's tokenizer" in note for note in counted.notes)
    assert abs(estimated.workload.total_tokens - sum(map(len, texts)) / 4) < 12
    assert estimated.workload.num_packed_sequences is not None and estimated.workload.num_packed_sequences <= 12
    assert (estimated.workload.num_sequences, estimated.num_steps) == (12, 1)
    assert any("data.jsonl: about" in note and "estimated at 4 characters" in note for note in estimated.notes)


@pytest.mark.parametrize(
    ("words", "packed"),
    [
        ((), None),
        (("--packing",), True),
        (("--no-packing",), False),
        (("--fix", "packing=true"), True),
        (("--fix", "packing=false"), False),
    ],
)
def test_packing_is_chosen_or_given(
    words: tuple[str, ...], packed: bool | None, tiny_folder: Path, tmp_path: Path
) -> None:
    """Short documents are packed by choice; whatever is said is done, shown, and has a proof that holds."""
    file, data = tmp_path / "plan.json", tmp_path / "short.jsonl"
    data.write_text('{"text": "word"}\n' * 200, encoding="utf-8")

    done = sfplan(tiny_folder, *SMALL, "--data", data, *words, "--output", file)

    assert done.code == 0, done.errors
    made = serialize.from_json(file.read_text(encoding="utf-8"))
    assert (made.workload.packing, made.configuration.packing) == (packed, packed is not False)
    assert (made.workload.num_sequences, made.workload.num_packed_sequences) == (200, 25)
    shown = "packing  on: 8 documents per sequence on average" in done.output
    assert shown == made.configuration.packing
    assert made.num_steps == (2 if packed is not False else 13)
    assert sfplan("verify", file).code == 0


def test_a_plan_is_the_same_every_time(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced now or remembered, in this process or its own, a plan is byte for byte the same and needs no terminal."""
    words = (str(tiny_folder), *map(str, SMALL), "--quantization", "nf4")
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))

    traced, remembered = sfplan(*words), sfplan(*words)
    environment = {**os.environ, "SHALLOWFLOW_CACHE": str(tmp_path), "COLUMNS": "40"}
    alone = subprocess.run([*AS_PROGRAM, *words], capture_output=True, env=environment, check=True)

    assert traced == remembered
    assert alone.stdout.decode() == traced.output
    assert alone.stderr == b""
    assert max(map(len, traced.output.splitlines())) <= 100


def test_planning_from_the_cache_loads_no_torch(tiny_folder: Path) -> None:
    """Importing the package, and planning what was traced before, stay fast: torch and transformers are not loaded."""
    assert sfplan(tiny_folder, *SMALL).code == 0
    code = (
        "import sys, shallowflow.cli, shallowflow; shallowflow.cli.main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder), *map(str, SMALL)], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("tiny on one CPU\n")
    assert done.stderr == "[]\n"


# Facts


def test_models_are_listed() -> None:
    """Every shipped model is there with its parameters, in text and in JSON."""
    text, listed = sfplan("models"), sfplan("models", "--json")

    assert text.code == listed.code == 0
    assert [line.split()[0] for line in text.output.splitlines()] == model_names()
    assert [entry["name"] for entry in json.loads(listed.output)] == model_names()
    for entry, line in zip(json.loads(listed.output), text.output.splitlines(), strict=True):
        assert entry["num_parameters"] == load_model(entry["name"]).num_parameters
        assert line.split()[1:] == ([] if entry["num_parameters"] is None else [f"{entry['num_parameters']:,}"])


def test_gpus_are_listed() -> None:
    """Every GPU is there with its memory and dtype, and in JSON each number with its source."""
    text, listed = sfplan("gpus"), sfplan("gpus", "--json")

    assert text.code == listed.code == 0
    assert [line.split()[0] for line in text.output.splitlines()] == gpu_names()
    for entry, line in zip(json.loads(listed.output), text.output.splitlines(), strict=True):
        gpu = load_gpu(entry["name"])
        assert entry["memory_bytes"] == gpu.memory_bytes
        assert entry["sources"].keys() == gpu.sources.keys()
        assert f"{gpu.memory_bytes / 2**30:.2f} GiB" in line and gpu.compute_dtype in line and gpu.title in line


# Nothing fits


def test_what_does_not_fit_says_what_would(folder: Callable[..., Path]) -> None:
    """Exit code 1, by how much it does not fit, and remedies that each make a plan; the same facts in JSON."""
    wide = folder(vocab_size=250_000, max_position_embeddings=2**20)
    words = (wide, "--gpu", "h100", "--rank", 8, "--global-batch-size", 1)
    too_long = ("--sequence-length", 2**20)

    text, refused = sfplan(*words, *too_long), sfplan(*words, *too_long, "--json")

    assert text.code == refused.code == 1
    assert text.output == "" and text.errors == refused.errors
    facts = json.loads(refused.output)
    assert facts["error"] == "infeasible"
    assert facts["smallest_bytes"] > facts["memory_bytes"] == load_gpu("h100").memory_bytes
    first, *lines = text.errors.splitlines()
    needed, most = (facts[key] / 2**30 for key in ("smallest_bytes", "memory_bytes"))
    assert first.startswith(f"Error: no plan fits in {most:.2f} GiB: the smallest needs {needed:.2f} GiB, ")
    assert facts["remedies"]
    for remedy, line in zip(facts["remedies"], lines[1:], strict=True):
        assert line.split()[:2] == remedy["option"].split()
        changed = sfplan(*words, *too_long, *remedy["option"].split(), "--json")
        assert changed.code == 0
        assert serialize.from_json(changed.output).prediction.peak_process_bytes <= facts["memory_bytes"]


# Between programs


def test_a_reader_may_stop_reading() -> None:
    """Cut off by the next program in a pipe, the command ends without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([*AS_PROGRAM, "models"], stdout=pipe, stderr=subprocess.PIPE, check=False)

    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
