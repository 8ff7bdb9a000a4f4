"""Architectures of every kind are traced, and the published page is about the transformers that is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks import breadth, small_models
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.profiles import load_gpu
from shallowflow.runtime.simulated import register_quantization
from shallowflow.runtime.user_step import measure

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.fixture(autouse=True, scope="module")
def _ready() -> None:
    """bitsandbytes makes its code tables when first used, and keeps them for the process: no part of a step."""
    register_quantization()


def _has(*names: str) -> Callable[[PreTrainedModel], bool]:
    """Whether there are modules or parameters whose names have these parts."""

    def check(model: PreTrainedModel) -> bool:
        known = [*dict(model.named_modules()), *dict(model.named_parameters())]
        return all(any(name in path for path in known) for name in names)

    return check


def _ties(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _is(**facts: object) -> Callable[[PreTrainedModel], bool]:
    """Whether the configuration says so."""
    return lambda model: all(getattr(model.config, name) == value for name, value in facts.items())


def _mixes(*kinds: str) -> Callable[[PreTrainedModel], bool]:
    """Whether there are layers of all these kinds."""
    return lambda model: set(kinds) <= set(getattr(model.config, "layer_types", None) or model.config.layers_block_type)


TRAITS: dict[str, tuple[str, Callable[[PreTrainedModel], bool]]] = {
    "mixture of experts": ("mixtral", _has("experts.gate_up_proj")),
    "shared expert": ("qwen2_moe", _has("shared_expert", "experts.gate_up_proj")),
    "experts in groups, compressed keys and values": ("deepseek_v3", _has("experts", "kv_a_proj")),
    "experts with biases, attention sinks": ("gpt_oss", _has("gate_up_proj_bias", "sinks")),
    "experts in a loop": ("dbrx", _has("experts.mlp.w1")),
    "sliding window": ("mistral", _is(sliding_window=16)),
    "windows by layer": ("gemma3_text", _mixes("sliding_attention", "full_attention")),
    "tied head": ("gemma", _ties),
    "untied head": ("llama", lambda model: not _ties(model)),
    "biases": ("qwen2", _has("q_proj.bias")),
    "biases, Conv1D": ("gpt2", _has("c_attn.bias")),
    "multi-query": ("gpt_bigcode", _is(multi_query=True)),
    "ALiBi": ("bloom", lambda model: hasattr(model.transformer, "build_alibi_tensor")),
    "parallel blocks, multi-query": ("falcon", _is(parallel_attn=True, multi_query=True)),
    "parallel blocks": ("gpt_neox", _is(use_parallel_residual=True)),
    "state space": ("mamba2", _has("mixer.A_log")),
    "state-space hybrid": ("bamba", _has("mamba.A_log", "self_attn.q_proj")),
    "state-space hybrid with experts": ("jamba", _has("mamba.A_log", "self_attn.q_proj", "experts")),
    "recurrent hybrid": ("recurrent_gemma", _has("rg_lru", "q_proj")),
    "linear attention hybrid": ("qwen3_next", _mixes("linear_attention", "full_attention")),
    "decoder of an encoder-decoder": ("bart", _has("decoder.layers", "encoder_attn")),
}


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.filterwarnings("ignore")  # whatever libraries say while they build and train
def test_traces(trait: str) -> None:
    """Forward, backward and optimizer are traced, with all weights learning and with LoRA, and the trait is there."""
    model_type, has_trait = TRAITS[trait]

    assert has_trait(small_models.small_model(model_type, "float16", "meta"))
    for kind in breadth.KINDS:
        outcome = breadth.trace(model_type, kind, load_gpu("t4"))
        assert not outcome.error
        assert outcome.peak_bytes > outcome.resident_bytes > 2 * outcome.num_parameters
        if kind == "full" and model_type != "bart":  # whose layers wait for an encoder
            assert outcome.num_learning == outcome.num_parameters


@pytest.mark.filterwarnings("ignore")
def test_failures_are_told() -> None:
    """What cannot be traced has a reason and no figures."""
    unknown = breadth.trace("no_such_architecture", "full", load_gpu("t4"))
    assisting = breadth.trace("gemma4_assistant", "full", load_gpu("t4"))

    assert "no_such_architecture" in unknown.error and not unknown.peak_bytes
    assert assisting.error == breadth.REASONS["gemma4_assistant"]


ROUTED = {
    "mixtral": 1e-3,
    "qwen2_moe": 1e-3,
    "gpt_oss": 1e-3,
    "jetmoe": 1e-3,
    "deepseek_v3": 1e-3,
    "inkling2_text": 1e-3,
    "dbrx": 0.03,
    "longcat_flash": 0.03,
}
"""How near the peak comes on a CPU, where the router of an untrained model is as it happens.

Experts that are multiplied as groups take as much wherever tokens go. Where they are called one by one, the busiest is
busier than its even share.
"""


@pytest.mark.parametrize("model_type", ROUTED)
@pytest.mark.parametrize("kind", breadth.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_even_routing_is_near_the_real_one(model_type: str, kind: str) -> None:
    """Resident bytes are those that the CPU's allocator reports; so is the peak but for what routing changes."""
    make_step = breadth.make_step_of(model_type, kind, "float32")

    predicted, truth = simulate(make_step, "cpu"), measure(make_step, "cpu")

    assert predicted.resident_bytes == pytest.approx(truth.resident_bytes, rel=1e-3)
    assert predicted.peak_allocated_bytes == pytest.approx(truth.peak_allocated_bytes, rel=ROUTED[model_type])


def _rows(page: str) -> dict[str, tuple[str, str, str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    return {name: (full, lora, note) for name, full, lora, note in cells[1:]}


def test_the_page_is_of_these_versions() -> None:
    """The versions and the list of architectures are those that are installed."""
    page = PAGE.read_text(encoding="utf-8")

    assert f"transformers {transformers.__version__}," in page
    assert f"PyTorch {torch.__version__.split('+')[0]} " in page
    assert f"PEFT {peft.__version__}." in page
    assert list(_rows(page)) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_page_adds_up() -> None:
    """The counts are those of the rows, at least 95 % of them traced in both ways, and every failure has a reason."""
    page = PAGE.read_text(encoding="utf-8")
    rows = _rows(page)
    traced = [sum(row[index] == "yes" for row in rows.values()) for index in range(2)]
    said = re.search(r"\*\*(\d+) of (\d+) traced with all weights learning \(([\d.]+) %\), (\d+) with LoRA", page)

    assert said is not None
    assert [int(said[1]), int(said[4])] == traced and int(said[2]) == len(rows)
    assert float(said[3]) == pytest.approx(100 * traced[0] / len(rows), abs=0.1)
    assert min(traced) >= 0.95 * len(rows)
    assert all(note for full, lora, note in rows.values() if "no" in (full, lora))
    assert {cell for row in rows.values() for cell in row[:2]} == {"yes", "no"}
