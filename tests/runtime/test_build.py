"""A model is built as its configuration and its plan say, on ``meta`` as on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shallowflow
from shallowflow.planner.strategies import Strategy, StrategyRun, TargetModules, WeightFormat
from shallowflow.profiles import FactsError, load_model
from shallowflow.runtime import build, quantized
from tests.runtime import tiny

SMOLLM2, GPT2 = "HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2"


def test_a_shipped_model_is_built_without_weights() -> None:
    """By its name alone: all on ``meta``, every linear module of its layers in nf4, head and embedding as they are."""
    model = shallowflow.load_model(SMOLLM2, "nf4")

    config = load_model(SMOLLM2).config
    hidden, inner, num_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shared = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    kept = [p for p in model.parameters() if p.dtype != torch.uint8]
    assert all(p.is_meta for p in model.parameters())
    assert len(packed) == 7 * num_layers
    assert sum(p.numel() for p in packed) == num_layers * (2 * hidden + 2 * shared + 3 * inner) * hidden // 2
    assert sum(p.numel() for p in kept) == config["vocab_size"] * hidden + (2 * num_layers + 1) * hidden
    assert {p.dtype for p in kept} == {torch.float16}


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_nothing_of_the_base_learns(quantization: Any) -> None:
    """A built model is frozen, whatever its format."""
    assert not any(p.requires_grad for p in build.load_model(tiny.CONFIG, quantization).parameters())


def test_parameters_are_counted_once() -> None:
    """A tied head is the embedding; an untied one counts on its own."""
    tied = build.count_parameters(tiny.CONFIG)
    untied = build.count_parameters({**tiny.CONFIG, "tie_word_embeddings": False})

    assert tied == sum(p.numel() for p in tiny.base().parameters())
    assert untied - tied == tiny.VOCABULARY * tiny.CONFIG["hidden_size"]


@pytest.mark.parametrize("num_layers", [1, 5])
def test_a_model_can_be_cut_or_grown_by_layers(num_layers: int) -> None:
    """A configuration of another depth builds that many layers and is otherwise the same."""
    config = {**tiny.CONFIG, "layer_types": ["full_attention"] * tiny.NUM_LAYERS}
    model = build.empty_model(build.transformers_config(config, num_layers), "float32", "meta")

    layers = build.decoder_layers(model)
    assert len(layers) == num_layers
    per_layer = {sum(p.numel() for p in layer.parameters()) for layer in layers}
    assert len(per_layer) == 1
    whole = sum(p.numel() for p in tiny.base().parameters())
    grown = sum(p.numel() for p in model.parameters())
    assert whole - grown == (tiny.NUM_LAYERS - num_layers) * per_layer.pop()


@pytest.mark.parametrize("num_layers", [tiny.NUM_LAYERS - 1, tiny.NUM_LAYERS + 1])
def test_a_plan_of_another_depth_is_refused(num_layers: int) -> None:
    """Strategies for more or fewer layers than the model has belong to another model."""
    strategies = tiny.configuration(num_layers=num_layers).strategies()

    with pytest.raises(ValueError, match=f"the plan has {num_layers} layers, the model {tiny.NUM_LAYERS}"):
        build.apply_formats(tiny.base(), strategies, "float32")


def test_each_layer_gets_its_own_strategy() -> None:
    """Formats may differ from layer to layer."""
    formats: tuple[WeightFormat, ...] = ("nf4", "fp32", "int8")
    runs = [
        StrategyRun(first=i, last=i, strategy=Strategy(weight_format=f, activations="save"))
        for i, f in enumerate(formats)
    ]
    model = tiny.base()

    build.apply_formats(model, [run.strategy for run in runs], "float32")

    weights = [layer.get_submodule("mlp.up_proj").weight for layer in build.decoder_layers(model)]
    assert [w.dtype for w in weights] == [torch.uint8, torch.float32, torch.int8]


@pytest.mark.parametrize(
    ("name", "meant", "targets"),
    [
        (SMOLLM2, "all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (GPT2, "all-linear", ["c_attn", "c_fc", "c_proj"]),
        (SMOLLM2, "attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (GPT2, "attention", ["attn.c_proj", "c_attn"]),
        (SMOLLM2, ("v_proj", "mlp.up_proj"), ["up_proj", "v_proj"]),
        (GPT2, ("c_proj",), ["c_proj"]),
        (GPT2, ("mlp.c_proj",), ["mlp.c_proj"]),
    ],
)
def test_adapters_go_on_the_linear_modules_that_are_meant(name: str, meant: TargetModules, targets: list[str]) -> None:
    """The targets are the linear modules' own names, GPT-2's transposed ones included, and never the head.

    A name that others have, too, is told from theirs by what it is in.
    """
    model: Any = build.load_model(name)
    assert build.adapter_targets(model, meant) == targets

    adapted = build.add_adapters(model, rank=4, alpha=8, target_modules=meant)

    ends = tuple(f".{target}" for target in targets)
    wanted = {f"base_model.model.{name}" for name, _ in build.load_model(name).named_modules() if name.endswith(ends)}
    assert {path.partition(".lora_")[0] for path, p in adapted.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize(
    ("config", "meant", "told"),
    [
        (tiny.CONFIG, ("q_proj", "q_prj"), "'q_prj'; the layers of LlamaForCausalLM have down_proj, gate_proj, k_proj"),
        (tiny.CONFIG, ("lm_head",), "'lm_head'"),
        (tiny.CONFIG, ("input_layernorm",), "'input_layernorm'"),
        (
            {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
            "attention",
            "have dt_proj, in_proj, x_proj",
        ),
    ],
    ids=["misspelt", "head", "norm", "no attention"],
)
def test_modules_that_are_not_there_are_refused(config: dict[str, Any], meant: TargetModules, told: str) -> None:
    """One line names what is missing and what the layers have."""
    with pytest.raises(FactsError) as caught:
        build.adapter_targets(build.load_model(config), meant)

    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_new_adapter_changes_nothing() -> None:
    """Before the first update the adapted model computes what its base does, and its base parameters are unchanged."""
    tokens = tiny.random_batch([16]).input_ids
    expected = tiny.base()(input_ids=tokens).logits

    adapted = build.add_adapters(tiny.base(), rank=4, alpha=8)

    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "no_such_model"}, "knows no such model_type"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"hidden_act": "no_such_function"}, "no_such_function"),
        ({"pad_token_id": 10**9}, "pad"),
    ],
    ids=["unknown", "encoder-decoder", "activation", "padding"],
)
def test_what_cannot_be_built_is_told_in_one_line(change: dict[str, Any], told: str) -> None:
    """Whatever a model's own code says, the answer is one line that names the kind of model."""
    with pytest.raises(FactsError) as caught:
        build.load_model({**tiny.CONFIG, **change})

    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert told.lower() in message.lower()
    assert repr({**tiny.CONFIG, **change}["model_type"]) in message


def test_a_configuration_is_left_as_it_was() -> None:
    """Building completes no facts in the caller's own dictionary, nested ones included."""
    config = {**tiny.CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

    build.load_model(config)

    assert config == {**tiny.CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def test_a_model_without_layers_is_refused() -> None:
    """Where nothing repeats, nothing can be planned layer by layer."""
    with pytest.raises(ValueError, match="no repeated layers found in Linear"):
        build.decoder_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no linear layers to adapt"):
        build.adapter_targets(torch.nn.ModuleList([torch.nn.LayerNorm(2)]))
    assert not quantized.is_quantized(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("options", [{"quantization": "int3"}, {"quantization": "fp16"}, {"compute_dtype": "half"}])
def test_a_format_that_is_none_is_refused(options: dict[str, Any]) -> None:
    """What is asked for is never silently left out."""
    with pytest.raises(FactsError, match=next(iter(options.values()))):
        build.load_model("SmolLM2-135M", **options)
