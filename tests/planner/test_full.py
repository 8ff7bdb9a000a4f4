"""Full fine-tuning is planned as exactly as an adapter: composed, traced, proved, refused, and read from its file."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from shallowflow.planner import allowed, costs, problem
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.simulate import trace_step
from shallowflow.planner.remedies import changes
from shallowflow.planner.serialize import PlanError, from_json, to_json
from shallowflow.planner.strategies import Activations, Cell, Configuration, Optimizer, Strategy
from shallowflow.planner.verify import doubts
from shallowflow.planning import make_plan
from shallowflow.profiles import ModelSpec, load_gpu
from shallowflow.profiles.load import gpu_names, load_instances
from shallowflow.runtime.simulated import make_meta_step
from shallowflow.session import Session
from tests.planner import planned, tiny
from tests.planner.test_costs import block_levels
from tests.strategies import STRATEGIES

FAMILIES: dict[str, dict[str, Any]] = {
    **tiny.FAMILIES,
    "tied": {**tiny.LLAMA, "tie_word_embeddings": True},
    "qwen2": {**tiny.LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 4096},
    "phi": {**tiny.GPT_NEOX, "model_type": "phi"},
    "gemma2": {**tiny.LLAMA, "model_type": "gemma2", "head_dim": 16},
}
"""A head of its own, which GPT-NeoX and Llama have here, with a bias in Phi's, or one that is the embeddings."""
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw8bit")
WORK = Workload(sequence_length=128, global_batch_size=4, adapter="full")


def depth(family: str, num_layers: int) -> dict[str, Any]:
    """The facts of a family's model with so many layers."""
    facts = FAMILIES[family]
    alike = {"layer_types": ["full_attention"] * num_layers} if family == "gemma2" else {}
    return {**facts, **alike, "n_layer" if "n_layer" in facts else "num_hidden_layers": num_layers}


@cache
def posed(family: str, gpu: str, num_layers: int, sequence_length: int) -> problem.Problem:
    """The problem of a tiny model under every strategy, optimizer and cut of the loss."""
    work = replace(WORK, sequence_length=sequence_length, global_batch_size=24)
    spec = ModelSpec(name=family, config=depth(family, num_layers))
    cells = tuple(
        Cell(micro_batch_size=1, gradient_accumulation_steps=24, rank=None, loss_chunks=chunks, optimizer=optimizer)
        for chunks in ((1,) if family == "gemma2" else (1, 4))
        for optimizer in OPTIMIZERS
    )
    return Session(spec, load_gpu(gpu), adapter="full").problem(work, cells, None)


def configured(
    activations: Activations,
    num_layers: int,
    *,
    sequence_length: int = 64,
    micro_batch_size: int = 2,
    accumulation: int = 1,
    loss_chunks: int = 1,
    optimizer: Optimizer = "adamw",
) -> Configuration:
    """One policy for all layers, with every weight learning."""
    cell = Cell(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        rank=None,
        loss_chunks=loss_chunks,
        optimizer=optimizer,
    )
    strategies = [Strategy(weight_format="fp32", activations=activations)] * num_layers
    return allowed.configured(replace(WORK, sequence_length=sequence_length), cell, strategies)


def check(family: str, gpu: str, chosen: Configuration) -> None:
    """Composed bytes are those of the whole trace, up to the batches themselves."""
    asked = posed(family, gpu, chosen.num_layers, chosen.sequence_length)
    composed = costs.footprint(
        asked.runs(chosen), chosen.micro_batch_size, 0, accumulates=chosen.gradient_accumulation_steps > 1
    )

    device = load_gpu(gpu)
    micro_batches = min(2, chosen.gradient_accumulation_steps)
    facts = depth(family, chosen.num_layers)
    trace = trace_step(make_meta_step(facts, chosen, device.compute_dtype, micro_batches), Target.of(device))
    levels = block_levels(trace, Target.of(device).alignment_bytes)
    second = max(position for position, label in trace.marks if label == "step 1")
    end = next(position for position, label in trace.marks if label == "evaluation")
    batches = 2 * micro_batches * (chosen.micro_batch_size * chosen.sequence_length * 8 + 512)
    resident, peak = levels[second - 1], max(levels[:end])
    assert resident - batches <= composed.resident_bytes <= resident
    assert composed.peak_allocated_bytes == pytest.approx(peak, rel=0.001)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("activations", [s.activations for s in STRATEGIES if s.weight_format == "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_composition_is_the_full_trace(family: str, activations: Activations, accumulation: int) -> None:
    """Gradients and updates of embeddings and head, tied or not, are composed as exactly as those of layers."""
    check(family, "t4", configured(activations, 6, accumulation=accumulation, micro_batch_size=3))


@pytest.mark.parametrize("gpu", ["t4", "a100-40gb", "cpu"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("family", "loss_chunks"), [("llama", 4), ("tied", 4), ("gpt2", 1), ("phi", 4)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_whatever_the_loss_the_optimizer_and_the_device(
    family: str, loss_chunks: int, optimizer: Optimizer, gpu: str, accumulation: int
) -> None:
    """Cut into parts, with moments of 8 bits, in bf16, and on a CPU."""
    chosen = configured("recompute", 5, accumulation=accumulation, loss_chunks=loss_chunks, optimizer=optimizer)

    check(family, gpu, chosen)


@pytest.mark.parametrize("num_layers", [1, 2, 9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gpu", ["t4", "cpu"])
def test_an_update_beside_the_layers_does_not_grow_with_them(gpu: str, optimizer: Optimizer, num_layers: int) -> None:
    """With few tokens the peak is the update's, whose largest part may be of the embeddings alone."""
    chosen = configured("save", num_layers, sequence_length=16, micro_batch_size=1, optimizer=optimizer)

    check("qwen2", gpu, chosen)


# Plans


@cache
def plan() -> Plan:
    """The tiny model's on a T4."""
    return make_plan(planned.model(), planned.T4, WORK)


def test_a_plan_is_proved_and_survives_its_file() -> None:
    """Its proof holds, its file says of an adapter that there is none, and its weights are those that learn."""
    found = plan()
    content = json.loads(to_json(found))

    assert doubts(found, planned.T4, load_instances("t4")) == []
    assert found.proof.status == "optimal"
    assert from_json(to_json(found)) == found
    assert {name: content["configuration"][name] for name in ("adapter", "rank", "alpha", "target_modules")} == {
        "adapter": "full",
        "rank": None,
        "alpha": None,
        "target_modules": None,
    }
    assert {one.configuration.rank for one in found.alternatives} == {None}
    assert {s.weight_format for s in found.configuration.strategies()} == {"fp32"}
    assert (found.compute_dtype, found.weight_error, found.sensitivity.next_rank) == ("float16", 0.0, None)


def test_every_weight_has_a_gradient_and_two_moments() -> None:
    """At 16 bytes a parameter, of which a checkpoint keeps twelve."""
    found = plan()

    parts = {part.category: part.num_bytes for part in found.memory}
    for category, each in (("weights", 4), ("optimizer", 8)):
        assert parts[category] == pytest.approx(each * found.num_parameters, rel=0.05)
    assert found.prediction.resident_bytes > 12 * found.num_parameters
    checkpoint = 12 * found.num_parameters / 131e6
    assert found.wall.save_seconds == pytest.approx(
        checkpoint * (1 + found.wall.training_seconds // 600) + checkpoint / 3, rel=0.05
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 16}, "configuration.adapter is full, configuration.rank 16"),
        ({"alpha": 32}, "configuration.adapter is full, configuration.alpha 32"),
        ({"target_modules": "attention"}, "configuration.adapter is full, configuration.target_modules attention"),
        ({"adapter": "lora"}, "configuration.adapter is lora, configuration.rank null"),
    ],
)
def test_a_file_that_says_both_is_no_plan(changes: dict[str, Any], told: str) -> None:
    """What learns is an adapter, or every weight."""
    content = json.loads(to_json(plan()))
    content["configuration"] |= changes

    with pytest.raises(PlanError, match=told):
        from_json(json.dumps(content))


@pytest.mark.parametrize("weight_format", ["fp16", "bf16", "int8", "nf4"])
def test_weights_that_learn_are_fp32(weight_format: str) -> None:
    """A file that says otherwise is refused."""
    content = json.loads(to_json(plan()))
    content["configuration"]["layers"][0]["strategy"]["weight_format"] = weight_format

    with pytest.raises(PlanError, match=f"every weight learns, a layer's weights {weight_format}"):
        from_json(json.dumps(content))


def test_an_altered_method_breaks_the_proof() -> None:
    """A workload that asked for an adapter is not answered by full fine-tuning."""
    altered = replace(plan(), workload=replace(WORK, adapter="lora"))

    found = doubts(altered, planned.T4, load_instances("t4"))

    assert "adapter is full, the workload's is lora" in found


def test_nothing_quantized_is_tried_and_an_adapter_is_offered() -> None:
    """Where nothing fits, an adapter is a change like any other; ranks and formats are none."""
    gpus = [load_gpu(name) for name in gpu_names()]
    tried = [change for group in changes(WORK, planned.T4, gpus) for change in group]

    assert tried[0].option == "--adapter lora"
    assert tried[0].workload == replace(WORK, adapter="lora")
    assert not [change for change in tried if change.option.startswith(("--rank", "--min-rank", "--quantization"))]


def test_what_does_not_fit_is_refused_with_an_adapter_that_does() -> None:
    """The remedy is traced: with LoRA in its place the same work fits."""
    small = planned.with_budget(40 * planned.MIB)

    refusal = planned.refusal(small, WORK)

    remedies = {remedy.option: remedy.peak_process_bytes for remedy in refusal.remedies}
    assert remedies["--adapter lora"] <= 40 * planned.MIB + planned.T4.context_bytes
    make_plan(planned.model(), small, replace(WORK, adapter="lora"))


def test_casts_of_weights_do_not_outlive_a_recomputed_layer() -> None:
    """Under autocast a saved layer holds its weights in fp16 from pass to pass, and one that is recomputed none."""
    facts = depth("tied", 4)
    held: dict[str, int] = {}
    for activations in ("save", "recompute"):
        step = make_meta_step(facts, configured(activations, 4), "float16", 1)
        trace = trace_step(step, Target.of(planned.T4))
        end = next(position for position, label in trace.marks if label == "evaluation")
        turn = max(position for position, label in trace.marks if label == "head" and position < end)
        live = {event for event in trace.events[:turn] if event > 0} - {-e for e in trace.events[:turn] if e < 0}
        held[activations] = sum(trace.sizes[event - 1] for event in live if trace.phases[event - 1] == "forward")
    linear = sum(
        module.weight.numel()
        for module in make_meta_step(facts, configured("save", 4), "float16", 1).layers[0].modules()
        if isinstance(module, torch.nn.Linear)
    )

    assert held["save"] - held["recompute"] > 2 * 4 * linear
