"""Full fine-tuning: gradients of plain fp32, a run from end to end, and a model that any library loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import Activations, Configuration, Optimizer
from shallowflow.runtime import checkpoint, gradients, optimizers
from shallowflow.runtime.request import learning_rate
from shallowflow.runtime.run import RunError, RunRequest, train
from shallowflow.runtime.step import make_trainee
from tests.front.shell import sfplan
from tests.runtime import reference, tiny
from tests.runtime.test_merge import perplexity
from tests.runtime.test_reference import WHOLE_ONLY, check, configuration, tolerance

Requests = Callable[..., RunRequest]
DTYPES = ("float32", "float16", "bfloat16")


def full(*activations: Activations, loss_chunks: int = 1) -> Configuration:
    """Every weight learns, one policy a layer."""
    chosen = configuration("fp32", activations or ("recompute", "save"), loss_chunks=loss_chunks)
    return replace(chosen, adapter="full", rank=None, alpha=None, target_modules=None)


# Gradients


@pytest.mark.parametrize("loss_chunks", [1, 3])
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("family", reference.FAMILIES)
def test_every_weight_learns_as_in_plain_fp32(family: str, compute_dtype: str, loss_chunks: int) -> None:
    """Over uneven micro-batches, with heads of their own and tied ones, whole losses and losses in parts."""
    chosen = full(loss_chunks=1 if family in WHOLE_ONLY else loss_chunks)

    check(family, compute_dtype, chosen, tolerance(compute_dtype))


@pytest.mark.parametrize("loss_chunks", [1, 4])
@pytest.mark.parametrize("activations", get_args(Activations))
@pytest.mark.parametrize("compute_dtype", ["float32", "float16"])
def test_it_does_so_under_every_policy(compute_dtype: str, activations: Activations, loss_chunks: int) -> None:
    """What is computed again under autocast is rounded as it was at first."""
    check("qwen2", compute_dtype, full(activations, activations, loss_chunks=loss_chunks), tolerance(compute_dtype))


@pytest.mark.parametrize("padding", [None, 2])
def test_rows_are_added_as_autograd_adds_them(padding: int | None) -> None:
    """Repeated tokens add up, also over several passes, and the row of padding does not learn."""
    plain, ours = (torch.nn.Embedding(9, 4, padding_idx=padding) for _ in range(2))
    gradients.add_rows(ours)
    outer = torch.randn(3, 5, 4)
    for seed in range(2):
        tokens = torch.randint(0, 9, (3, 5), generator=torch.Generator().manual_seed(seed))
        for table in (plain, ours):
            (table(tokens) * outer).sum().backward()

    assert plain.weight.grad is not None and ours.weight.grad is not None
    assert torch.allclose(ours.weight.grad, plain.weight.grad)
    assert bool(ours.weight.grad.any())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_and_gradients_are_fp32(family: str) -> None:
    """Only products are in fp16: small updates are not lost to its rounding."""
    ours = reference.trainee(family, full(loss_chunks=3), "float16")
    before = [p.detach().clone() for p in ours.parameters]
    ours.optimizer.param_groups[0]["lr"] = 1e-6

    ours.step([tiny.random_batch([16, 9])])

    assert {p.dtype for p in ours.parameters} == {torch.float32}
    assert len(ours.parameters) == len(list(ours.model.parameters()))
    changed = [float((p.detach() - was).abs().max()) for p, was in zip(ours.parameters, before, strict=True)]
    assert all(0 < change < 2e-6 for change in changed)


# Optimizers


def test_8_bits_are_not_for_embeddings() -> None:
    """Moments of layers are in bytes, of embeddings and of what is small in fp32; tied heads are embeddings."""
    base: Any = tiny.base(hidden_size=128).requires_grad_(True)
    made: Any = optimizers.make_full("adamw8bit", base, 1e-3)
    for parameter in base.parameters():
        parameter.grad = torch.ones_like(parameter)

    made.step()

    kinds = {name: made.state[p]["state1"].dtype for name, p in base.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert base.get_input_embeddings().weight.numel() > made.args.min_8bit_size
    assert {kind for name, kind in kinds.items() if "proj" in name} == {torch.uint8}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {torch.float32}


@pytest.mark.parametrize(("before", "after"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("adamw", "adamw")])
def test_a_state_goes_over_to_the_other_optimizer(before: Optimizer, after: Optimizer) -> None:
    """Embeddings' moments are kept to the bit, and the step after is nearly the same."""
    trainees = []
    names: tuple[Optimizer, ...] = (before, before, after)
    for name in names:
        torch.manual_seed(0)
        chosen = replace(full("save", "save", "save"), optimizer=name)
        trainees.append(make_trainee(tiny.base(hidden_size=128), chosen, "float32", tiny.CPU))
    old, same, new = trainees
    batch = tiny.random_batch([16, 9])
    for one in (old, same):
        one.step([batch])

    with torch.no_grad():
        checkpoint.put_learned(new, checkpoint.learned(old))
        optimizers.restore(new.optimizer, optimizers.state(old.optimizer))
    moments = ("exp_avg" if after == "adamw" else "state1", "exp_avg" if before == "adamw" else "state1")
    embeddings = [next(iter(one.model.parameters())) for one in (new, same)]
    kept = [one.optimizer.state[p][moment] for one, p, moment in zip((new, same), embeddings, moments, strict=True)]
    assert kept[0].equal(kept[1])
    same.step([batch])
    new.step([batch])
    for path, tensor in checkpoint.learned(new).items():
        moved = (tensor - checkpoint.learned(same)[path]).abs().max()
        assert float(moved) <= (0 if before == after else 2e-4), path


# Runs


@pytest.fixture(scope="module")
def plan(tiny_folder: Path) -> Plan:
    """The tiny model's, on this CPU."""
    return planned(tiny_folder)


def planned(folder: Path, **changes: Any) -> Plan:
    """A plan in which every weight learns."""
    return shallowflow.plan(str(folder), "cpu", adapter="full", sequence_length=32, global_batch_size=4, **changes)


def test_a_run_learns_and_leaves_a_whole_model(
    plan: Plan, request_for: Requests, held_out: Path, tiny_folder: Path
) -> None:
    """Held-out perplexity falls, bytes are those predicted, and transformers alone loads what was evaluated."""
    request = request_for(eval_data=held_out, num_steps=8, learning_rate=2e-3, samples=("the cat",))

    record = train(plan, request)

    assert record.outcome == "completed"
    assert record.perplexity_before is not None and record.perplexity_after is not None
    assert record.perplexity_after < 0.9 * record.perplexity_before
    for comparison in record.comparisons:
        if comparison.unit == "bytes":
            assert abs(comparison.error) < 0.001, comparison
    model = request.output / "model"
    assert {path.name for path in model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert perplexity(model, held_out, 32) == pytest.approx(record.perplexity_after, rel=1e-5)
    weights = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).named_parameters())
    assert weights.keys() == base.keys()  # tied: the head is there once
    assert all(not tensor.equal(base[name]) for name, tensor in weights.items())
    assert AutoTokenizer.from_pretrained(model).decode([72, 73]) == AutoTokenizer.from_pretrained(tiny_folder).decode(
        [72, 73]
    )
    assert record.samples[0].before != record.samples[0].after
    assert not (request.output / "adapter").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_is_as_in_one_go(optimizer: Optimizer, tiny_folder: Path, request_for: Requests) -> None:
    """Three steps and three more give the losses of six and the same model, to the last bit."""
    made = planned(tiny_folder, optimizer=optimizer, activations="recompute", micro_batch_size=2, loss_chunks=4)
    whole = request_for().output.with_name("whole")
    in_one = train(made, request_for(num_steps=6, output=whole))
    train(made, request_for(num_steps=3))

    record = train(made, request_for(num_steps=6, resume=True))

    assert [step.loss for step in record.steps] == [step.loss for step in in_one.steps]
    assert "resumed after step 3" in record.notes
    told = [hashlib.sha256((f / "model" / "model.safetensors").read_bytes()) for f in (whole, request_for().output)]
    assert told[0].digest() == told[1].digest()


def test_a_checkpoint_holds_weights_and_moments(plan: Plan, request_for: Requests) -> None:
    """Twelve bytes a parameter, all of them, verified by their SHA-256."""
    train(plan, request_for(num_steps=2))

    path, doubts = checkpoint.latest(request_for().output / "checkpoints")

    assert path is not None and not doubts
    sizes = {name: (path / f"{name}.safetensors").stat().st_size for name in ("learned", "optimizer")}
    assert sizes["learned"] == pytest.approx(4 * plan.num_parameters, rel=0.1)
    assert sizes["optimizer"] == pytest.approx(8 * plan.num_parameters, rel=0.1)


def test_the_best_model_is_the_result(plan: Plan, request_for: Requests, held_out: Path) -> None:
    """With patience the saved model is that of the best evaluation."""
    request = request_for(eval_data=held_out, eval_every=1, patience=1, num_steps=6, learning_rate=0.3)

    record = train(plan, request)

    assert record.best_step == 0 or record.perplexity_after == min(e.perplexity for e in record.evaluations)
    assert perplexity(request.output / "model", held_out, 32) == pytest.approx(record.perplexity_after, rel=1e-5)


def test_the_usual_rate_is_a_tenth_of_loras(plan: Plan, plans: dict[str, Plan], request_for: Requests) -> None:
    """Unless another is asked for."""
    asked = request_for()

    assert (learning_rate(plan, asked), learning_rate(plans["fp16"], asked)) == (2e-5, 2e-4)
    assert learning_rate(plan, replace(asked, learning_rate=1e-3)) == 1e-3


def test_nothing_is_to_be_merged(plan: Plan, request_for: Requests, tmp_path: Path) -> None:
    """One line says where the model is."""
    train(plan, request_for(num_steps=1))
    run = request_for().output

    done = sfplan("merge", run, "--output", tmp_path / "merged")

    assert done.code == 2
    assert (
        f"nothing is to be merged: {run} learned every weight, and {run / 'model'} is the whole model" in done.error()
    )
    assert not (tmp_path / "merged").exists()


def test_another_methods_run_is_not_gone_on_with(plan: Plan, plans: dict[str, Plan], request_for: Requests) -> None:
    """Weights are not put into an adapter."""
    train(plan, request_for(num_steps=1))

    with pytest.raises(RunError, match="holds a run whose plan differs"):
        train(plans["fp16"], request_for(num_steps=2, resume=True))


def test_the_command_line_plans_trains_and_tells(
    tiny_folder: Path, request_for: Requests, tmp_path: Path, held_out: Path
) -> None:
    """From ``--adapter full`` to a folder with a model."""
    path, data = tmp_path / "plan.json", request_for().data
    small = ("--gpu", "cpu", "--sequence-length", 32, "--global-batch-size", 4)

    made = sfplan(tiny_folder, *small, "--adapter", "full", "--output", path)
    words = ("train", path, "--data", data, "--weights", tiny_folder, "--output", tmp_path / "run", "--steps", 2)
    checked = sfplan(*words, "--dry-run")
    done = sfplan(*words, "--eval-data", held_out)

    assert made.code == checked.code == done.code == 0, (made.errors, checked.errors, done.errors)
    assert "none: every weight learns" in made.output and "rank" not in made.output.lower()
    assert "nf4" not in made.output
    assert "checkpoints: every 10 min or more" in checked.output
    assert ": model, run.json" in " ".join(done.output.split())
    assert json.loads(path.read_text())["configuration"]["rank"] is None
    assert sfplan("verify", path).code == 0
    assert "every weight learns" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
