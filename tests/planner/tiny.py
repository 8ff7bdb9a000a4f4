"""Tiny models of three families, their steps on ``meta``, and traces and profiles that are made once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from shallowflow.planner.costs import PROFILED_LAYERS, StepProfile
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.profile import profile_step, profile_update
from shallowflow.planner.profiler.simulate import trace_step
from shallowflow.planner.profiler.trace import Trace
from shallowflow.planner.strategies import (
    Activations,
    Adapter,
    Configuration,
    Optimizer,
    Strategy,
    TargetModules,
    WeightFormat,
    uniform,
)
from shallowflow.profiles import load_gpu
from shallowflow.runtime.simulated import MetaStep, make_meta_step

VOCABULARY = 512
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
GPT_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": GPT_NEOX}
NAMES = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj"), "gpt_neox": ("dense_4h_to_h",)}
"""Of each family, some linear modules of a layer."""


def configuration(
    weight_format: WeightFormat,
    activations: Activations,
    *,
    num_layers: int = 3,
    rank: int = 8,
    sequence_length: int = 64,
    micro_batch_size: int = 2,
    gradient_accumulation_steps: int = 1,
) -> Configuration:
    """One strategy for all layers."""
    return Configuration(
        layers=uniform(Strategy(weight_format=weight_format, activations=activations), num_layers),
        rank=rank,
        alpha=2 * rank,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )


def target(gpu: str) -> Target:
    """What the profiler knows of a shipped GPU."""
    return Target.of(load_gpu(gpu))


def meta_step(family: str, gpu: str, chosen: Configuration) -> MetaStep:
    """The step of a tiny model, with no more than two micro-batches."""
    num_micro_batches = min(2, chosen.gradient_accumulation_steps)
    return make_meta_step(FAMILIES[family], chosen, load_gpu(gpu).compute_dtype, num_micro_batches)


@cache
def traced(family: str, gpu: str, chosen: Configuration) -> Trace:
    """Two steps of a tiny model; the caller must not change the trace."""
    return trace_step(meta_step(family, gpu, chosen), target(gpu))


@cache
def updated(family: str, gpu: str, optimizer: Optimizer, rank: int) -> StepProfile:
    """What *optimizer* does to a tiny model's adapter of *rank*."""
    chosen = configuration("fp16", "save", rank=rank, sequence_length=16, gradient_accumulation_steps=2)
    return profile_update(meta_step(family, gpu, replace(chosen, optimizer=optimizer)), target(gpu))


@cache
def profiled(
    family: str,
    gpu: str,
    strategy: Strategy,
    sequence_length: int = 64,
    adapter: Adapter = "lora",
    target_modules: TargetModules = "all-linear",
    shared_by: int = 1,
) -> StepProfile:
    """The profile of a tiny model."""

    def make(micro_batch_size: int, rank: int) -> MetaStep:
        chosen = Configuration(
            layers=uniform(strategy, PROFILED_LAYERS),
            rank=rank,
            alpha=2 * rank,
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=2,
            adapter=adapter,
            target_modules=target_modules,
            num_gpus=shared_by,
            sharding="none" if shared_by == 1 else "weights",
        )
        made = meta_step(family, gpu, chosen)
        made.update_alone()
        return made

    return profile_step(make, target(gpu))
