"""Stages of a model compute, one after the other, what the whole model does, with nothing but their own weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.simulate import traced_peak
from shallowflow.planner.strategies import Configuration, Strategy, StrategyRun, traced_micro_batches
from shallowflow.profiles import load_gpu, model_facts
from shallowflow.runtime import build, checkpoint, folder, pipeline, stages
from shallowflow.runtime.ranks import Ranks
from shallowflow.runtime.simulated import make_meta_step
from shallowflow.runtime.sources import WeightsError, WeightsSource
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee
from shallowflow.runtime.weights import load_share, load_weights
from tests.runtime import tiny

NUM_LAYERS = 5
STAGES = (0, 2, 3)
LENGTH = 24
FAMILIES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in sorted(model_facts._CUTTABLE)},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "phi3": {"tie_word_embeddings": False},
}
"""Of each kind what makes its layers differ from one another, where anything does."""


def config_of(kind: str, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """A small model of this kind, whose layers differ as far as they may."""
    sizes = {**tiny.CONFIG, "num_hidden_layers": num_layers, "pad_token_id": 0}
    own = {key: value[:num_layers] if isinstance(value, list) else value for key, value in FAMILIES[kind].items()}
    return {**sizes, **own, "model_type": kind}


def base(kind: str, num_layers: int = NUM_LAYERS) -> Any:
    """The model with random weights, all of which matter."""
    model = build.empty_model(build.transformers_config(config_of(kind, num_layers)), "float32", "cpu")
    maker = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=maker).mul_(0.15)
        parameter.data.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def cut() -> Configuration:
    """Three stages of two, one and two layers."""
    return replace(tiny.configuration(num_layers=NUM_LAYERS), num_gpus=3, stages=STAGES, gradient_accumulation_steps=3)


def interleaved() -> Configuration:
    """Three stages, each of two parts of a layer."""
    whole = tiny.configuration(num_layers=6)
    return replace(whole, num_gpus=3, stages=(0, 1, 2), parts_per_stage=2, gradient_accumulation_steps=3)


def of_stage(model: Any, number: int, configuration: Configuration | None = None) -> Trainee:
    """A stage's trainee, whose adapter is that of the whole."""
    chosen = configuration or cut()
    share = stages.share_of(chosen, number)
    torch.manual_seed(0)
    made = make_trainee(model, chosen, "float32", tiny.CPU, share=share)
    _fill(made)
    return pipeline.connected(made, share, Ranks(rank=number, size=3, num_stages=3), torch.float32)


def _fill(trainee: Trainee) -> None:
    for name, tensor in checkpoint.learned(trainee).items():
        maker = torch.Generator().manual_seed(sum(map(ord, name)))
        tensor.copy_(torch.randn(tensor.shape, generator=maker).mul_(0.05))


def batch_of(packed: bool) -> MicroBatch:
    """Random tokens; two documents to a sequence, where they are packed."""
    made = tiny.random_batch([20, 24], LENGTH)
    if not packed:
        return made
    positions = torch.tensor([[*range(9), *range(LENGTH - 9)]] * 2)
    return replace(made, position_ids=positions)


def through(made: list[Trainee], batch: MicroBatch, num_parts: int = 1) -> torch.Tensor:
    """The loss of the last stage, after all others."""
    hidden = None
    for part in range(num_parts):
        for trainee in made:
            assert isinstance(trainee.pipe, pipeline.Line)
            hidden = trainee.pipe.computed(trainee, batch, part, hidden)
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_stages_compute_what_the_whole_does(kind: str) -> None:
    """The loss to the last bit, and every gradient, whatever differs from layer to layer."""
    assert model_facts.why_not_cut(config_of(kind)) is None
    check_computes(kind, cut())


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_parts_of_interleaved_stages_compute_what_the_whole_does(kind: str) -> None:
    """Nor does it matter that a stage has other layers, and the last one the norm, while one part is passed."""
    check_computes(kind, interleaved())


def check_computes(kind: str, configuration: Configuration) -> None:
    """Assert that stages make the loss of the whole model, and its gradients."""
    layers, parts = configuration.num_layers, configuration.parts_per_stage
    torch.manual_seed(0)
    alone = replace(configuration, num_gpus=1, stages=(0,), parts_per_stage=1)
    whole = make_trainee(base(kind, layers), alone, "float32", tiny.CPU)
    _fill(whole)
    made = [of_stage(base(kind, layers), number, configuration) for number in range(3)]

    expected, found = whole.loss(batch_of(False)), through(made, batch_of(False), parts)
    expected.backward()
    found.backward()

    assert torch.equal(found, expected)
    wanted = {name: p.grad for name, p in whole.model.named_parameters() if p.requires_grad}
    gradients = {n: p.grad for one in made for n, p in one.model.named_parameters() if p.requires_grad}
    assert list(wanted) == list(whole.names) == list(made[0].names)
    assert sorted(gradients) == sorted(wanted)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_chunks", [1, 4])
def test_each_stage_knows_where_documents_begin(loss_chunks: int) -> None:
    """Packed documents are kept apart on every stage."""
    chosen = replace(cut(), packing=True, loss_chunks=loss_chunks)
    whole = make_trainee(base("llama"), replace(chosen, num_gpus=1, stages=(0,)), "float32", tiny.CPU)
    _fill(whole)
    made = []
    for number in range(3):
        share = stages.share_of(chosen, number)
        one = make_trainee(base("llama"), chosen, "float32", tiny.CPU, share=share)
        _fill(one)
        made.append(pipeline.connected(one, share, Ranks(rank=number, size=3, num_stages=3), torch.float32))

    assert torch.equal(through(made, batch_of(True)), whole.loss(batch_of(True)))
    assert not torch.equal(whole.loss(batch_of(True)), whole.loss(batch_of(False)))


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in sorted(FAMILIES)), ("llama", True)])
def test_a_stage_loads_its_own_weights_alone(kind: str, tied: bool, tmp_path: Path) -> None:
    """Each has the tensors that the whole model has there, buffers that no file holds among them, and no others."""
    config = {**config_of(kind), "tie_word_embeddings": tied}
    model = build.empty_model(build.transformers_config(config), "float32", "cpu")
    model.save_pretrained(tmp_path)
    number = sum(p.numel() for p in model.parameters())
    source = WeightsSource(str(tmp_path))
    whole = load_weights(source, config, "float32", number)
    wanted = {**dict(whole.named_parameters()), **dict(whole.named_buffers()), "lm_head.weight": head_of(whole)}
    for stage in range(3):
        share = stages.share_of(cut(), stage)
        assert share is not None
        found = load_share(source, config, "float32", number, share)
        held = {**dict(found.named_parameters()), **dict(found.named_buffers())}
        real = {name: tensor for name, tensor in held.items() if not tensor.is_meta}
        numbers = {int(name.split("layers.")[1].split(".")[0]) for name in real if "layers." in name}
        assert numbers == set(share.layers)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in real.items())
        assert head_of(found).is_meta == (not share.is_last)
        assert found.get_input_embeddings().weight.is_meta == (not share.is_first)
        assert share.is_last == ("lm_head.weight" in real)


def head_of(model: Any) -> torch.Tensor:
    """The weight of the head."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """A stage is not loaded from a model of other sizes."""
    base("llama").save_pretrained(tmp_path)
    other, share = {**config_of("llama"), "hidden_size": 128}, stages.share_of(cut(), 0)
    assert share is not None

    with pytest.raises(WeightsError, match="have hidden_size 64, the plan's model 128"):
        load_share(WeightsSource(str(tmp_path)), other, "float32", 1, share)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_adapter_of_all_stages_is_one_for_peft(adapter: Any, tmp_path: Path) -> None:
    """What is gathered has the names that PEFT itself writes."""
    chosen = replace(cut(), adapter=adapter)
    torch.manual_seed(0)
    whole: Any = make_trainee(base("llama"), replace(chosen, num_gpus=1, stages=(0,)), "float32", tiny.CPU)
    whole.model.save_pretrained(str(tmp_path))
    expected = load_file(tmp_path / folder.ADAPTER_FILE)
    found: dict[str, torch.Tensor] = {}
    for number in range(3):
        torch.manual_seed(0)
        made = make_trainee(base("llama"), chosen, "float32", tiny.CPU, share=stages.share_of(chosen, number))
        found |= folder._as_peft_has_it(made)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("parts", [2, 4])
def test_later_rounds_add_nothing_but_their_tokens(parts: int, stage: int) -> None:
    """What is traced of interleaved stages shows all that a step of more micro-batches takes."""
    runs = (StrategyRun(first=0, last=7, strategy=Strategy(weight_format="fp32", activations="recompute")),)
    each = 4 // parts
    chosen = replace(
        tiny.configuration(),
        layers=runs,
        num_gpus=2,
        stages=(0, each),
        parts_per_stage=parts,
        gradient_accumulation_steps=16,
    )
    traced = traced_micro_batches(chosen, stage)
    peaks = {number: peak_of(chosen, number, stage) for number in (traced - 2, traced, traced + 2, 16)}

    tokens = (peaks[16] - peaks[traced]) // (16 - traced)
    assert traced == 6 and 0 < tokens <= 16 * chosen.sequence_length * chosen.micro_batch_size
    assert peaks[traced + 2] - peaks[traced] == 2 * tokens
    assert peaks[traced] - peaks[traced - 2] > 2 * tokens


def peak_of(configuration: Configuration, num_micro_batches: int, stage: int) -> int:
    """The peak of a stage's step with so many micro-batches."""
    config = {**tiny.CONFIG, "num_hidden_layers": 8}
    step = make_meta_step(config, configuration, "float32", num_micro_batches, stage=stage)
    return traced_peak(step, Target.of(load_gpu("cpu"))).peak_allocated_bytes


@pytest.mark.parametrize("num_batches", [1, 2])
def test_both_sides_of_a_pair_have_messages_in_one_order(num_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation through two interleaved stages: what one sends next, the other asks for next; NCCL wants that."""
    told: list[list[str]] = []
    for number in range(2):
        words: list[str] = []
        told.append(words)
        chosen = replace(interleaved(), num_gpus=2, stages=(0, 1), parts_per_stage=3, gradient_accumulation_steps=2)
        share = stages.share_of(chosen, number)
        trainee = make_trainee(base("llama", 6), chosen, "float32", tiny.CPU, share=share)
        ranks: Any = SimpleNamespace(talks=True, line=None, num_stages=2, rank=number)
        pipeline.connected(trainee, share, ranks, torch.float32)
        monkeypatch.setattr(pipeline, "dist", spoken(words, first=number == 0))
        assert trainee.pipe is not None
        with torch.no_grad():
            trainee.pipe.forward(trainee, [batch_of(False)] * num_batches)

    assert told[0] == told[1] and len(told[0]) == 5 * num_batches


def spoken(words: list[str], *, first: bool) -> Any:
    """Messages that are only written down: ``to`` the second stage, or ``back``."""
    done = SimpleNamespace(wait=lambda: None)

    def sent(_tensor: torch.Tensor, **_named: Any) -> Any:
        words.append("to" if first else "back")
        return done

    def received(tensor: torch.Tensor, **_named: Any) -> Any:
        words.append("back" if first else "to")
        tensor.zero_()
        return done

    return SimpleNamespace(isend=sent, send=sent, irecv=received, recv=received)
