"""``sfplan evaluate`` hands lm-evaluation-harness the model that was trained."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.runtime.run import RunRequest, train
from tests.front.schemas import held
from tests.front.shell import sfplan
from tests.runtime import tiny

Requests = Callable[..., RunRequest]
TEXTS = [" ".join(topics[name].split())[:50] for name in sorted(topics)[:4]]
TASK = """\
task: topics
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """How likely Python's reference topics are, as a YAML file of the harness over a local data file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "topics.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    path = tmp_path / "topics.yaml"
    path.write_text(TASK.format(data=data), encoding="utf-8")
    return path


def bits_per_byte(model: Any, tokenizer: Any) -> float:
    """Of the texts, each after the end of another, by plain transformers."""
    bits = 0.0
    for text in TEXTS:
        tokens = torch.tensor([[tiny.END, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        bits += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")) / math.log(2)
    return bits / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.filterwarnings("ignore")  # of other libraries, each with its own
def test_the_harness_measures_what_plain_peft_computes(
    plans: dict[str, Plan], request_for: Requests, tiny_folder: Path, task: Path
) -> None:
    """Its score is that of base and adapter loaded by their own libraries, and the base's is the base's."""
    train(plans["fp16"], request_for(num_steps=8, learning_rate=5e-3))
    run = request_for().output

    done = sfplan("evaluate", run, "--tasks", task, "--weights", tiny_folder, "--base", "--json")

    assert done.code == 0, done.errors
    (score,) = held("evaluate", done.output)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert (score["task"], score["metric"]) == ("topics", "bits_per_byte")
    assert score["base"] == pytest.approx(bits_per_byte(base, tokenizer), rel=1e-4)
    trained = PeftModel.from_pretrained(base, run / "adapter")
    assert score["trained"] == pytest.approx(bits_per_byte(trained, tokenizer), rel=1e-4)
    assert abs(score["trained"] / score["base"] - 1) > 0.01


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_measured_is_told(
    plans: dict[str, Plan], request_for: Requests, tiny_folder: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run, no such task, data out of reach, half an adapter, no harness: one line and exit code 2."""
    train(plans["fp16"], request_for(num_steps=1))
    run = request_for().output

    def refusal(*words: object) -> str:
        done = sfplan("evaluate", *words)
        assert done.code == 2
        return done.error()

    assert "holds no adapter and plan" in refusal(tiny_folder, "--tasks", task)
    assert "has no task 'topicz'" in refusal(run, "--tasks", f"{task}, topicz")
    assert "the data of task 'arc_easy' cannot be had" in refusal(run, "--tasks", "arc_easy")
    assert "names no task" in refusal(run, "--tasks", " , ")
    path = run / "adapter" / "adapter_model.safetensors"
    kept = load_file(path)
    lost = next(name for name in kept if "lora_B" in name)
    save_file({name: tensor for name, tensor in kept.items() if name != lost}, path)
    halved = sfplan("evaluate", run, "--tasks", task, "--weights", tiny_folder)
    assert halved.code == 2 and halved.errors.splitlines()[-1].startswith("Error: the adapter lacks base_model.")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert "pip install 'shallowflow[eval]'" in refusal(run, "--tasks", task)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_is_measured_by_itself(request_for: Requests, tiny_folder: Path, task: Path) -> None:
    """Its weights are the run's own; the base is read only where it is measured, too."""
    sizes: dict[str, Any] = {"sequence_length": 32, "global_batch_size": 4}
    train(shallowflow.plan(str(tiny_folder), "cpu", adapter="full", **sizes), request_for(learning_rate=1e-3))
    run = request_for().output

    alone = sfplan("evaluate", run, "--tasks", task, "--json")
    both = sfplan("evaluate", run, "--tasks", task, "--weights", tiny_folder, "--base", "--json")

    assert alone.code == both.code == 0, (alone.errors, both.errors)
    (score,), (compared,) = json.loads(alone.output), json.loads(both.output)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_folder, run / "model"))
    assert score["trained"] == compared["trained"] == pytest.approx(bits_per_byte(model, tokenizer), rel=1e-4)
    assert compared["base"] == pytest.approx(bits_per_byte(base, tokenizer), rel=1e-4)
    assert abs(compared["trained"] / compared["base"] - 1) > 0.005
