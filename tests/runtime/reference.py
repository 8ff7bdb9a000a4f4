"""The training step in plain transformers, PEFT and autograd, all in fp32: what ours is compared with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from shallowflow.planner.strategies import Configuration
from shallowflow.runtime import build, quantized
from shallowflow.runtime.loss import IGNORED_LABEL
from shallowflow.runtime.step import MAX_GRADIENT_NORM, MicroBatch, Trainee, make_trainee
from tests.runtime import tiny

NUM_LAYERS = 2
_SHARED = {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
_LLAMA = {
    **_SHARED,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama"},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},  # biases in attention
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 32},  # queries and keys normalised
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": 5},
    "phi3": {**_LLAMA, "model_type": "phi3", "sliding_window": None},  # fused projections
    "gemma2": {**_LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True},
    "gpt2": {
        **_SHARED,
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "gpt_neox": {  # attention and MLP side by side, biases
        **_SHARED,
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
    },
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a step came to: mean loss, norm before clipping, and what the optimizer was handed, by parameter."""

    loss: float
    norm: float
    gradients: Mapping[str, torch.Tensor]

    def error(self, exact: Told) -> float:
        """The relative error of all gradients together."""
        assert self.gradients.keys() == exact.gradients.keys()
        pairs = [(self.gradients[name].double(), g.double()) for name, g in exact.gradients.items()]
        off = sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)
        return math.sqrt(off / sum(float(theirs.square().sum()) for _, theirs in pairs))

    def furthest(self, exact: Told) -> float:
        """The largest relative error of one gradient."""
        return max(
            float((self.gradients[name] - theirs).norm() / theirs.norm()) for name, theirs in exact.gradients.items()
        )


def trainee(family: str, configuration: Configuration, compute_dtype: str) -> Trainee:
    """Ours, with random weights, norms, biases and adapters, so that each of them matters; lengths stay near theirs."""
    dtype = build.weights_dtype(configuration, compute_dtype)
    made = build.empty_model(build.transformers_config(FAMILIES[family]), dtype, "cpu")
    _randomise(made, scale=0.15)
    ours = make_trainee(made, configuration, compute_dtype, tiny.CPU)
    maker = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=0.05, generator=maker)
            else:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=maker))
    return ours


def _randomise(model: torch.nn.Module, scale: float) -> None:
    maker = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=maker).mul_(scale)
            parameter.copy_(noise if parameter.dim() > 1 else parameter.float() + noise)


def plain(family: str, ours: Trainee, configuration: Configuration) -> torch.nn.Module:
    """The same weights and adapters in fp32, in transformers' and PEFT's own modules with eager attention.

    Where ours are quantized these are what the quantized ones stand for.
    """
    config = build.transformers_config(FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False)
    held = dict(build.without_adapter(ours.model).named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            counterpart = held[name]
            base: Any = getattr(counterpart, "base_layer", counterpart)
            for key, parameter in module.named_parameters(recurse=False):
                meant = _meant(base, key)
                turned = isinstance(module, Conv1D) and not isinstance(base, Conv1D) and key == "weight"
                parameter.copy_(meant.t() if turned else meant)
    names = configuration.target_modules
    if names is None:
        whole: torch.nn.Module = model.requires_grad_(True).train()
        return whole
    lora = LoraConfig(
        r=configuration.rank,
        lora_alpha=configuration.alpha,
        use_dora=configuration.adapter == "dora",
        use_rslora=configuration.adapter == "rslora",
        target_modules=names if isinstance(names, str) else list(names),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: torch.nn.Module = get_peft_model(model, lora)
    learned = {name: p for name, p in ours.model.named_parameters() if p.requires_grad}
    mine = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert mine.keys() == learned.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(learned[name])
    return adapted.train()


def _meant(module: torch.nn.Module, key: str) -> torch.Tensor:
    """The values that *module*'s tensor stands for."""
    held: Any = getattr(module, key)
    if key != "weight" or not quantized.is_quantized(module):
        plain: torch.Tensor = held.detach().float()
        return plain
    whole: torch.Tensor = held.data.float() * held.SCB[:, None] / 127 if hasattr(held, "SCB") else _nf4(held)
    return whole


def _nf4(weight: Any) -> torch.Tensor:
    """By the definition in the QLoRA paper: two codes a byte, the first one higher, times the block's constant."""
    state = weight.quant_state
    constants = state.absmax
    if state.nested:
        blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: constants.numel()]
        constants = state.state2.code[constants.long()] * blocks + state.offset
    codes = torch.stack([weight.data >> 4, weight.data & 15], dim=-1).flatten()
    values: torch.Tensor = state.code[codes.long()].view(-1, state.blocksize) * constants.view(-1, 1)
    return values.view(*state.shape)


def expected(model: torch.nn.Module, micro_batches: Sequence[MicroBatch]) -> Told:
    """One step's loss and clipped gradients by plain autograd."""
    num_targets = sum(batch.num_targets for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        (loss / num_targets).backward()
        total += float(loss.detach()) / num_targets
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(learned.values(), MAX_GRADIENT_NORM)
    return Told(total, float(norm), {name: p.grad for name, p in learned.items() if p.grad is not None})


def told(ours: Trainee, micro_batches: Sequence[MicroBatch]) -> Told:
    """The same of our step."""
    named = [(name, p) for name, p in ours.model.named_parameters() if p.requires_grad]
    seen: dict[str, torch.Tensor] = {}

    def keep(*_arguments: object) -> None:
        seen.update((name, p.grad.clone()) for name, p in named if p.grad is not None)

    handle = ours.optimizer.register_step_pre_hook(keep)
    outcome = ours.step(micro_batches)
    handle.remove()
    return Told(outcome.loss, outcome.gradient_norm, seen)
