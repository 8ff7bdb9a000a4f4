"""``sfplan weigh``, and plans that go by what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shallowflow.planner import serialize
from shallowflow.runtime import weigh
from tests.front.shell import sfplan
from tests.runtime import tiny

WORDS = ("--gpu", "t4", "--sequence-length", 32, "--rank", 8, "--quantization", "nf4", "--fix", "activations=save")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model in a folder that nothing was measured of."""
    return tiny.save(tmp_path / "weighed")


def test_plans_go_by_what_was_weighed(folder: Path, tmp_path: Path) -> None:
    """The plan's errors are the measured ones, in JSON and in words; its proof holds; changed errors are caught."""
    before = serialize.from_json(sfplan(folder, *WORDS, "--json").output)
    told, measured = sfplan("weigh", folder), sfplan("weigh", folder, "--json")
    file = tmp_path / "plan.json"

    done = sfplan(folder, *WORDS, "--output", file)

    assert told.code == measured.code == done.code == 0, told.errors
    found = json.loads(measured.output)["layers"]
    rows = [line.split() for line in told.output.splitlines() if line.split()[:1] != ["all"]]
    assert [[f"{error:.4f}" for error in layer.values()] for layer in found] == [
        row[1:] for row in rows if row and row[0].isdigit()
    ]
    plan = serialize.from_json(file.read_bytes())
    assert serialize.to_json(plan) == file.read_text(encoding="utf-8")
    assert before.weighed is None and plan.weighed is not None
    assert [json.loads(measured.output)["digest"], len(found)] == [plan.weighed.digest, len(plan.weighed.layers)]
    assert plan.weight_error != before.weight_error
    assert "Weight errors are the model's own, measured layer by layer" in done.output
    assert sfplan("verify", file).code == 0
    changed = json.loads(file.read_text(encoding="utf-8"))
    changed["weighed"]["layers"][1]["nf4"] *= 0.5
    file.write_text(json.dumps(changed), encoding="utf-8")
    assert "the proof counts other weight errors than the plan says" in sfplan("verify", file).errors
    del changed["weighed"]["layers"][1]
    file.write_text(json.dumps(changed), encoding="utf-8")
    assert "weighed has 2 layers, configuration.layers 3" in sfplan("verify", file).error()


def test_planning_by_weighed_errors_loads_no_torch(folder: Path) -> None:
    """What was measured and traced before is planned with as fast as ever."""
    assert sfplan("weigh", folder).code == 0
    first = sfplan(folder, *WORDS)
    program = (
        "import sys; from shallowflow.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)), file=sys.stderr)"
    )

    words = (sys.executable, "-c", program, str(folder), *map(str, WORDS))
    done = subprocess.run(words, capture_output=True, text=True, check=True)

    assert done.stdout == first.output
    assert done.stderr.splitlines()[-1] == "[]"


def test_weights_that_are_not_here_are_told() -> None:
    """Exit code 2, and what to give."""
    done = sfplan("weigh", "Llama-3.1-8B")

    assert done.code == 2
    assert done.error() == (
        "the weights of meta-llama/Llama-3.1-8B are not on this machine; give a folder or .gguf file with --weights"
    )


def test_interrupted_says_what_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, and that the same command goes on."""
    measure = weigh._errors
    calls = iter(range(10))

    def slow(*given: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(weigh, "_errors", slow)
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(folder / "cache"))

    done = sfplan("weigh", folder)

    assert done.code == 130
    said = [line for line in done.errors.splitlines() if line]
    assert said == ["2 of 3 layers kept; the same command goes on", "Error: interrupted"]
    assert sfplan("weigh", folder).code == 0
