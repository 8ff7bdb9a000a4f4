"""A merged model is the adapted one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import TargetModules
from shallowflow.runtime import batches, build
from shallowflow.runtime.documents import read_documents
from shallowflow.runtime.merge import merge
from shallowflow.runtime.run import RunError, RunRequest, train
from shallowflow.runtime.weights import find_weights, load_weights
from tests.front.shell import sfplan
from tests.runtime import tiny

Requests = Callable[..., RunRequest]


def perplexity(folder: Path, held_out: Path, length: int) -> float:
    """Of a folder's model, loaded by transformers alone and computed in fp32."""
    return perplexity_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder, held_out, length)


def perplexity_of(model: Any, folder: Path, held_out: Path, length: int) -> float:
    """Of *model*, whose tokenizer is in *folder*."""
    windows = batches.windows(read_documents(held_out), AutoTokenizer.from_pretrained(folder), length)
    total = 0.0
    for window in windows:
        tokens, labels = torch.tensor([window.input_ids]), torch.tensor([window.labels])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
    return math.exp(total / sum(window.num_targets for window in windows))


@pytest.mark.parametrize("weight_format", tiny.PLANNED_FORMATS)
def test_its_loss_is_the_adapters(
    weight_format: str, plans: dict[str, Plan], request_for: Requests, held_out: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Held-out perplexity is the run's own, to fp16's rounding of the weights, from whatever format it was trained."""
    plan = plans[weight_format]
    record = train(plan, request_for(eval_data=held_out, num_steps=8, learning_rate=5e-3))

    merged = merge(request_for().output, tmp_path / "merged", tiny_folder)

    assert record.perplexity_before is not None and record.perplexity_after is not None
    found = perplexity(merged, held_out, plan.configuration.sequence_length)
    # int8 rounds activations, too, which a merged model does not
    assert found == pytest.approx(record.perplexity_after, rel=5e-3 if weight_format == "int8" else 1e-3)
    assert found < 0.95 * record.perplexity_before
    weights = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not any("lora" in name or "absmax" in name for name in weights)


def test_rslora_is_planned_trained_and_merged(
    plans: dict[str, Plan], request_for: Requests, held_out: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """It takes what LoRA takes, is scaled by the root of the rank, named to PEFT, and merged as it was trained."""
    sizes: dict[str, Any] = {"sequence_length": 32, "global_batch_size": 4, "rank": 8}
    plan = shallowflow.plan(str(tiny_folder), "cpu", adapter="rslora", quantization="fp16", **sizes)
    plain = plans["fp16"]
    assert plan.prediction == plain.prediction
    assert plan.configuration == replace(plain.configuration, adapter="rslora", alpha=8)
    assert (plan.configuration.scaling, plain.configuration.scaling) == (8 / math.sqrt(8), 32 / 8)

    record = train(plan, request_for(eval_data=held_out, num_steps=8, learning_rate=5e-3))
    merged = merge(request_for().output, tmp_path / "merged", tiny_folder)

    told = json.loads((request_for().output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (told["use_rslora"], told["lora_alpha"], told["r"]) == (True, 8, 8)
    assert record.perplexity_before is not None and record.perplexity_after is not None
    assert perplexity(merged, held_out, 32) == pytest.approx(record.perplexity_after, rel=1e-3)
    assert record.perplexity_after < 0.95 * record.perplexity_before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize(
    ("weight_format", "adapter", "target_modules"),
    [
        ("fp16", "dora", "all-linear"),
        ("int8", "dora", "attention"),
        ("nf4", "dora", ("q_proj", "up_proj")),
        ("nf4", "lora", ("v_proj", "down_proj")),
    ],
)
def test_dora_and_chosen_modules_are_planned_trained_and_merged(
    weight_format: str,
    adapter: str,
    target_modules: TargetModules,
    request_for: Requests,
    held_out: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """Bytes are those predicted; what was learned is the same in the run, in PEFT on its own, and merged."""
    sizes: dict[str, Any] = {"sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 4, "rank": 8}
    sizes |= {"quantization": weight_format, "activations": "save", "double_quantization": False, "loss_chunks": 1}
    plan = shallowflow.plan(str(tiny_folder), "cpu", adapter=adapter, target_modules=target_modules, **sizes)
    request = request_for(eval_data=held_out, num_steps=8, learning_rate=5e-3)

    record = train(plan, request)
    merged = merge(request.output, tmp_path / "merged", tiny_folder)

    assert record.configuration == plan.configuration
    for comparison in record.comparisons:
        assert comparison.unit != "bytes" or abs(comparison.error) < 0.01
    told = json.loads((request.output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert told["use_dora"] == (adapter == "dora")
    assert isinstance(target_modules, str) or sorted(told["target_modules"]) == sorted(target_modules)
    assert record.perplexity_before is not None and record.perplexity_after is not None
    assert record.perplexity_after < 0.95 * record.perplexity_before
    near = pytest.approx(record.perplexity_after, rel=5e-3 if weight_format == "int8" else 1e-3)
    assert perplexity(merged, held_out, 32) == near
    if weight_format != "int8":  # of which PEFT's DoRA loses the scales on a CPU
        base = load_weights(find_weights("tiny", tiny_folder), plan.model_config, "float32", plan.num_parameters)
        build.apply_formats(base, plan.configuration.strategies(), "float32")
        by_peft = PeftModel.from_pretrained(base, str(request.output / "adapter"))
        by_peft.train()  # or a CPU repacks 4-bit weights, which PEFT's DoRA reads
        assert perplexity_of(by_peft, tiny_folder, held_out, 32) == near


@pytest.mark.parametrize("weight_format", ["fp16", "nf4"])
def test_transposed_layers_stay_transposed(
    weight_format: str, request_for: Requests, held_out: Path, tmp_path: Path
) -> None:
    """GPT-2's Conv1D layers come back as such, though a quantized one was not."""
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": tiny.VOCABULARY}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "eos_token_id": tiny.END, **shape}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": tiny.END}
    folder = tiny.save(tmp_path / "gpt2", config={**config, **plain})
    plan = shallowflow.plan(str(folder), "cpu", quantization=weight_format, sequence_length=32, global_batch_size=4)
    request = request_for(weights=folder, eval_data=held_out, num_steps=2, learning_rate=5e-3)

    record = train(plan, request)

    found = perplexity(merge(request.output, tmp_path / "merged", folder), held_out, 32)
    assert record.perplexity_after is not None
    assert found == pytest.approx(record.perplexity_after, rel=1e-3)


def test_what_cannot_be_merged_is_told(
    plans: dict[str, Plan], request_for: Requests, tiny_folder: Path, tmp_path: Path
) -> None:
    """No run, a folder in use, an adapter of another model: one line, and nothing is written."""
    train(plans["fp16"], request_for(num_steps=1))
    run, merged = request_for().output, tmp_path / "merged"
    with pytest.raises(RunError, match="holds no adapter and plan"):
        merge(tmp_path, merged, tiny_folder)
    with pytest.raises(RunError, match="is not empty"):
        merge(run, tiny_folder, tiny_folder)
    path = run / "adapter" / "adapter_model.safetensors"
    saved = load_file(path)
    huge = {name: tensor * 0 + 1e4 if "q_proj" in name else tensor for name, tensor in saved.items()}
    save_file(huge, path)
    with pytest.raises(RunError, match=r"q_proj\.weight exceeds what fp16 holds"):
        merge(run, merged, tiny_folder)
    save_file({name.replace("q_proj", "x_proj"): tensor for name, tensor in saved.items()}, path)
    with pytest.raises(RunError, match="which the plan's model does not have"):
        merge(run, merged, tiny_folder)
    assert not merged.exists() and not list(tmp_path.glob(".*partial"))


def test_from_the_command_line(
    plans: dict[str, Plan], request_for: Requests, tiny_folder: Path, tmp_path: Path
) -> None:
    """``sfplan merge`` writes the folder and says so; a folder without a run is refused."""
    train(plans["nf4"], request_for(num_steps=1))

    done = sfplan("merge", request_for().output, "--output", tmp_path / "merged", "--weights", tiny_folder)
    refused = sfplan("merge", tiny_folder, "--output", tmp_path / "other")

    assert (done.code, refused.code) == (0, 2), done.errors
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"
    assert "holds no adapter and plan" in refused.error()


def test_a_run_that_learned_nothing_is_not_merged(
    plans: dict[str, Plan], request_for: Requests, tiny_folder: Path, tmp_path: Path
) -> None:
    """An adapter of no steps is refused, and one of an interrupted run is merged and said to be so."""
    output = request_for().output
    train(plans["fp16"], request_for(num_steps=2))
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))

    (output / "run.json").write_text(json.dumps({**record, "outcome": "interrupted"}), encoding="utf-8")
    cut = sfplan("merge", output, "--output", tmp_path / "merged", "--weights", tiny_folder)
    (output / "run.json").write_text(json.dumps({**record, "steps": []}), encoding="utf-8")
    with pytest.raises(RunError, match="learned nothing"):
        merge(output, tmp_path / "other", tiny_folder)

    assert cut.code == 0 and "interrupted after 2 steps" in cut.output
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "merged").iterdir()} == {
        oct((output / "run.json").stat().st_mode & 0o777)
    }
