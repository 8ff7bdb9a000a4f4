"""What ``sfplan export`` writes for other trainers: their own parsers read it, and find what is meant."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shallowflow.planner.plan import Plan
from shallowflow.planner.serialize import from_json
from shallowflow.planner.strategies import Strategy, uniform
from shallowflow.profiles import load_gpu
from shallowflow.runtime.documents import FORMATS, Format
from shallowflow.runtime.trainers import export, rows
from shallowflow.runtime.trainers.check import Outcome
from shallowflow.runtime.trainers.export import Exported, InexpressibleError, Target
from tests.front.shell import sfplan
from tests.runtime import tiny
from tests.trainers import parsers

needs_tools = pytest.mark.skipif(not parsers.TOOLS.exists(), reason=parsers.MISSING)


def layers(weight_format: Any, activations: Any = "save") -> Any:
    """All alike."""
    twice = weight_format == "nf4"
    strategy = Strategy(weight_format=weight_format, activations=activations, double_quantization=twice)
    return uniform(strategy, tiny.NUM_LAYERS)


def mixed() -> Any:
    """The first layers in fp16, the last one in nf4."""
    (first,), (last,) = layers("fp16"), layers("nf4")
    cut = tiny.NUM_LAYERS - 1
    return (replace(first, last=cut - 1), replace(last, first=cut))


PLANS: dict[str, dict[str, Any]] = {
    "fp16": {"layers": layers("fp16")},
    "nf4, recomputed": {"layers": layers("nf4", "recompute")},
    "int8": {"layers": layers("int8"), "micro_batch_size": 4},
    "mixed": {"layers": mixed()},
    "dora": {"layers": layers("fp16"), "adapter": "dora", "rank": 4, "alpha": 8},
    "rslora": {"layers": layers("nf4"), "adapter": "rslora"},
    "packed": {"layers": layers("fp16"), "packing": True, "micro_batch_size": 2},
    "8-bit": {"layers": layers("fp16"), "optimizer": "adamw8bit", "gradient_accumulation_steps": 8},
    "some modules": {"layers": layers("fp16"), "target_modules": "attention", "loss_chunks": 4},
    "full": {
        "layers": layers("fp32"),
        "adapter": "full",
        "rank": None,
        "alpha": None,
        "target_modules": None,
    },
}
"""Ten plans, by what is particular to them."""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Of the tiny model on a T4."""
    folder = tiny.save(tmp_path_factory.mktemp("models") / "tiny")
    pinned = ("--quantization", "nf4", "--fix", "activations=save", "--optimizer", "adamw")
    done = sfplan(folder, "--gpu", "t4", "--sequence-length", 32, *pinned, "--json")
    assert done.code == 0, done.errors
    made = from_json(done.output.encode(), "plan.json")
    return {
        name: replace(made, model_name=str(folder), configuration=replace(made.configuration, **changes))
        for name, changes in PLANS.items()
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of text."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES), encoding="utf-8")
    return path


@pytest.fixture
def _roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All fits, without a simulation: where it is asked how something is written, and not what."""
    outcome = Outcome(
        peak_process_bytes=1,
        peak_phase="backward",
        peak_module="",
        step_seconds=1.0,
        tokens_per_second=1.0,
        categories=(),
    )
    monkeypatch.setattr(export, "predict", lambda *_: outcome)


def exported(plan: Plan, target: Target, data: Path, data_format: Format = "prompt-completion") -> Exported:
    """*plan* for *target* on a T4."""
    return export.export(plan, target, data, data_format, load_gpu("t4"))


def written(plans: dict[str, Plan], target: Target, data: Path) -> tuple[list[Path], list[Exported]]:
    """All plans, in files beside *data*, and what they are."""
    made = [exported(plan, target, data) for plan in plans.values()]
    paths = []
    for index, one in enumerate(made):
        path = data.parent / f"{index}.yaml"
        path.write_text(one.text, encoding="utf-8")
        paths.append(path)
    return paths, made


@needs_tools
@pytest.mark.usefixtures("_roomy")
def test_axolotl_reads_its_files(plans: dict[str, Plan], data: Path) -> None:
    """Its own schema, for a T4, knows every key and takes every value."""
    paths, made = written(plans, "axolotl", data)

    for read, one in zip(parsers.read_by(parsers.AXOLOTL, paths), made, strict=True):
        wanted = one.settings
        assert read["unknown"] == []
        assert (read["fp16"], read["bf16"]) == (wanted.precision == "fp16", False)
        assert read["attn_implementation"] == "sdpa" and read["attn_decontaminates_packing"]
        assert (read["micro_batch_size"], read["sequence_len"]) == (wanted.micro_batch_size, wanted.sequence_length)
        assert read.get("load_in_4bit", False) == (wanted.quantization == "nf4")
        assert read["sample_packing"] == (wanted.packing == "separate")


@needs_tools
@pytest.mark.usefixtures("_roomy")
def test_llamafactory_reads_its_files(plans: dict[str, Plan], data: Path) -> None:
    """Its own dataclasses and checks; there are no other keys than theirs."""
    paths, made = written(plans, "llamafactory", data)

    for read, one in zip(parsers.read_by(parsers.LLAMAFACTORY, paths), made, strict=True):
        wanted = one.settings
        assert (read["fp16"], read["bf16"]) == (str(wanted.precision == "fp16"), "False")
        assert read["flash_attn"] == "sdpa" and read["neat_packing"] == str(wanted.packing == "separate")
        assert read["quantization_bit"] == {"nf4": "4", "int8": "8", "none": "None"}[wanted.quantization]
        assert read["use_dora"] == str(wanted.adapter == "dora")
        assert read["finetuning_type"] == ("full" if wanted.adapter == "full" else "lora")


@pytest.mark.usefixtures("_roomy")
def test_accelerate_reads_its_files(plans: dict[str, Plan], data: Path) -> None:
    """Its own loader, and the number of processes is the plan's of GPUs."""
    from accelerate.commands.config.config_args import load_config_from_file

    plans = {**plans, "two GPUs": _on_two(plans["fp16"])}
    paths, made = written(plans, "accelerate", data)

    for path, one in zip(paths, made, strict=True):
        read = load_config_from_file(str(path))
        assert read.num_processes == one.settings.num_gpus
        assert read.mixed_precision == ("no" if one.settings.precision == "fp32" else one.settings.precision)
        assert read.distributed_type.value == ("MULTI_GPU" if one.settings.num_gpus > 1 else "NO")


def _on_two(plan: Plan) -> Plan:
    return replace(plan, configuration=replace(plan.configuration, num_gpus=2))


@dataclass(frozen=True, slots=True)
class Call:
    """A call in a script: what is given by name."""

    name: str
    given: tuple[str, ...]


def calls(text: str) -> list[Call]:
    """Of a script."""
    found = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [Call(ast.unparse(node.func), tuple(word.arg for word in node.keywords if word.arg)) for node in found]


@pytest.mark.usefixtures("_roomy")
def test_trl_and_peft_take_every_argument(plans: dict[str, Plan], data: Path) -> None:
    """Of the scripts for TRL, each argument of each call is one of what is called."""
    import inspect

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    known: dict[str, Any] = {call.__name__: call for call in (LoraConfig, SFTConfig, SFTTrainer, BitsAndBytesConfig)}
    for plan in plans.values():
        text = exported(plan, "trl", data).text
        made = [call for call in calls(text) if call.name in known]
        assert {call.name for call in made} >= {"SFTConfig", "SFTTrainer"}
        for call in made:
            assert set(call.given) <= set(inspect.signature(known[call.name]).parameters), call


@pytest.mark.usefixtures("_roomy")
def test_unsloth_takes_every_argument(plans: dict[str, Plan], data: Path) -> None:
    """Of the scripts for Unsloth, each argument of its two functions is in their signatures, as recorded."""
    recorded = json.loads((Path(__file__).parent / "unsloth_signatures.json").read_text(encoding="utf-8"))
    known = {
        "FastLanguageModel.from_pretrained": set(recorded["from_pretrained"]),
        "FastLanguageModel.get_peft_model": {*recorded["get_peft_model"], "use_dora"},  # which it hands to PEFT
    }
    for plan in plans.values():
        made = [call for call in calls(exported(plan, "unsloth", data).text) if call.name in known]
        assert made
        for call in made:
            assert set(call.given) <= known[call.name]


@pytest.mark.timeout(300)
def test_the_script_for_trl_trains(plans: dict[str, Plan], data: Path) -> None:
    """On a CPU, as it stands, from a folder of weights to an adapter on disk."""
    path = data.parent / "train.py"
    path.write_text(exported(plans["fp16"], "trl", data, "text").text, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(data.parent / "hub")}

    done = subprocess.run(
        [sys.executable, "train.py"], cwd=data.parent, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert (data.parent / "run" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("data_format", list(FORMATS))
@pytest.mark.parametrize("target", ["axolotl", "llamafactory", "trl", "unsloth"])
@pytest.mark.usefixtures("_roomy")
def test_every_format_of_data_is_told(plans: dict[str, Plan], data: Path, target: Target, data_format: Format) -> None:
    """A YAML names its columns, a script is Python."""
    text = exported(plans["fp16"], target, data, data_format).text

    if target in ("trl", "unsloth"):
        ast.parse(text)
        assert repr(str(data)) in text
        return
    entries = yaml.safe_load(text)
    if target == "axolotl":
        assert entries["datasets"] == [rows.for_axolotl(data, data_format)]
    else:
        told = next(line for line in text.splitlines() if line.startswith("# {"))
        assert json.loads(told[2:])[entries["dataset"]]["file_name"] == str(data)


def test_what_is_lost_is_told(plans: dict[str, Plan], data: Path) -> None:
    """Comments at the head say what a plan has and its tool cannot say; a plan that is all said has none of them."""
    mixed = exported(plans["mixed"], "axolotl", data)
    chunked = exported(plans["some modules"], "axolotl", data)

    assert any("stores all layers in one format" in said for said in mixed.cannot)
    assert any("the loss in 4 parts" in said for said in chunked.cannot)
    for one in (mixed, chunked):
        assert all(f"# - {' '.join(said.split())}." in one.text for said in one.cannot)
    assert not any("parts" in said for said in exported(plans["fp16"], "axolotl", data).cannot)


def test_a_tool_that_needs_more_gets_a_leaner_plan(plans: dict[str, Plan], data: Path) -> None:
    """Fewer sequences at once, with the same global batch; and where nothing fits, it says so."""
    plan = replace(plans["fp16"], configuration=replace(plans["fp16"].configuration, micro_batch_size=8))
    whole = exported(plan, "axolotl", data)
    gpu = load_gpu("t4")
    tight = replace(plan, budget_bytes=whole.outcome.peak_process_bytes - gpu.context_bytes - 1)

    lean = exported(tight, "axolotl", data)

    assert lean.settings != whole.settings
    batch = plan.configuration.micro_batch_size * plan.configuration.gradient_accumulation_steps
    assert lean.settings.micro_batch_size * lean.settings.gradient_accumulation_steps == batch
    assert lean.outcome.peak_process_bytes < whole.outcome.peak_process_bytes
    with pytest.raises(InexpressibleError, match="nothing near this plan fits"):
        exported(replace(plan, budget_bytes=1), "axolotl", data)


@pytest.mark.usefixtures("_roomy")
def test_a_plan_is_data(plans: dict[str, Plan], data: Path) -> None:
    """Names with commands in them stay names."""
    hostile = replace(plans["fp16"], model_name='x"\n\nimport os\n#')
    texts: Sequence[str] = [exported(hostile, target, data).text for target in ("trl", "unsloth", "axolotl")]

    assert all("\nimport os" not in text for text in texts)
    assert yaml.safe_load(texts[2])["base_model"] == hostile.model_name
