"""Training steps of every kind, simulated and done for real: on a CPU the two agree to a thousandth.

One kind of byte is in no simulation: the scratch memory of oneDNN's half-precision products, which depends on the chip.
Cases that multiply in bfloat16 therefore have their peak elsewhere, in the loss or in the optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes
import peft
import pytest
import torch
import transformers
from transformers import PreTrainedModel

import shallowflow
from shallowflow.planner.profiler.user_step import simulate
from shallowflow.runtime.simulated import register_quantization
from shallowflow.runtime.user_step import measure

BATCH, VOCABULARY = 2, 500
SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""What most families call these facts; some ignore a few."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 32},
    "mistral": {**SMALL, "sliding_window": 16},
    "phi3": SMALL,
    "gemma2": {**SMALL, "head_dim": 32, "sliding_window": 16},
    "gemma3_text": {**SMALL, "head_dim": 32, "sliding_window": 16},
    "gpt2": {"n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY},
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 384, "word_embed_proj_dim": 96},
    "bloom": {"hidden_size": 96, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "falcon": {**SMALL, "alibi": True},
}
DROPOUTS = ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training step: which model, which weights learn how, and what happens around it."""

    family: str
    attention: Literal["eager", "sdpa"] = "sdpa"
    weights: Literal["float32", "bfloat16", "int8", "nf4", "nf4 twice"] = "float32"
    adapter: Literal["none", "LoRA", "DoRA", "rsLoRA"] = "none"
    optimizer: str = "AdamW"
    recompute: Literal["no", "reentrant", "non-reentrant"] = "no"
    accumulation: int = 1
    clip: bool = False
    autocast: bool = False
    dropout: float = 0.0
    tokens: int = 48
    vocabulary: int = VOCABULARY


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW single": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3),
    "PagedAdamW8bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "Adafactor, transformers": transformers.Adafactor,
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD momentum foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
}

CASES: dict[str, Case] = {
    "llama": Case(family="llama"),
    "llama, eager": Case(family="llama", attention="eager", optimizer="AdamW foreach"),
    "llama, LoRA": Case(family="llama", adapter="LoRA"),
    "llama, DoRA": Case(family="llama", adapter="DoRA", optimizer="AdamW8bit"),
    "llama, nf4": Case(family="llama", weights="nf4", adapter="LoRA", optimizer="PagedAdamW8bit"),
    "llama, recomputed": Case(family="llama", recompute="non-reentrant", accumulation=2, clip=True),
    "llama, autocast": Case(family="llama", autocast=True, clip=True, optimizer="AdamW foreach"),
    "llama, LoRA, autocast": Case(family="llama", autocast=True, adapter="LoRA", accumulation=2),
    "llama, fused": Case(family="llama", optimizer="AdamW fused"),
    "qwen2": Case(family="qwen2", optimizer="Adafactor"),
    "qwen2, rsLoRA": Case(family="qwen2", adapter="rsLoRA", optimizer="SGD momentum", dropout=0.1),
    "qwen2, nf4 twice": Case(family="qwen2", weights="nf4 twice", adapter="LoRA", recompute="reentrant"),
    "qwen2, int8": Case(family="qwen2", weights="int8", adapter="LoRA", attention="eager"),
    "qwen3": Case(family="qwen3", recompute="reentrant", optimizer="SGD"),
    "qwen3, nf4, DoRA": Case(family="qwen3", weights="nf4", adapter="DoRA"),
    "qwen3, bfloat16": Case(family="qwen3", weights="bfloat16", optimizer="AdamW8bit"),
    "mistral": Case(family="mistral", optimizer="SGD momentum foreach", clip=True),
    "mistral, dropout": Case(family="mistral", dropout=0.1, adapter="LoRA", optimizer="Adafactor"),
    "mistral, eager": Case(
        family="mistral", attention="eager", autocast=True, recompute="non-reentrant", vocabulary=2000, accumulation=2
    ),
    "phi3": Case(family="phi3", optimizer="AdamW8bit", accumulation=3),
    "phi3, int8": Case(family="phi3", weights="int8", adapter="rsLoRA", recompute="non-reentrant"),
    "gemma2": Case(family="gemma2", attention="eager", optimizer="Adafactor, transformers"),
    "gemma3": Case(family="gemma3_text", adapter="LoRA", optimizer="AdamW single", autocast=True),
    "gemma3, full": Case(family="gemma3_text", optimizer="PagedAdamW8bit"),
    "gpt2": Case(family="gpt2", dropout=0.1, clip=True),
    "gpt2, eager": Case(family="gpt2", attention="eager", dropout=0.1, recompute="reentrant", adapter="LoRA"),
    "gpt2, recomputed": Case(
        family="gpt2", dropout=0.1, recompute="reentrant", autocast=True, vocabulary=2000, optimizer="SGD"
    ),
    "gpt2, int8": Case(family="gpt2", weights="int8", adapter="LoRA", dropout=0.1),
    "gpt_neox": Case(family="gpt_neox", attention="eager", optimizer="AdamW single", accumulation=2),
    "gpt_neox, nf4": Case(family="gpt_neox", weights="nf4", adapter="LoRA", autocast=True, dropout=0.1),
    "opt": Case(family="opt", dropout=0.1, optimizer="SGD momentum"),
    "opt, eager": Case(family="opt", attention="eager", adapter="LoRA", dropout=0.1, optimizer="SGD"),
    "bloom": Case(family="bloom", attention="eager", recompute="non-reentrant"),
    "bloom, dropout": Case(family="bloom", attention="eager", dropout=0.1, adapter="LoRA", clip=True),
    "falcon": Case(family="falcon", attention="eager", optimizer="Adafactor"),
    "falcon, SDPA": Case(family="falcon", adapter="LoRA", optimizer="AdamW foreach", accumulation=2),
    # Few tokens, so that the optimizer has the peak.
    "AdamW": Case(family="llama", tokens=4),
    "AdamW foreach, bfloat16": Case(family="qwen3", tokens=4, weights="bfloat16", optimizer="AdamW foreach"),
    "AdamW single, clipped": Case(family="opt", tokens=4, optimizer="AdamW single", clip=True),
    "AdamW fused": Case(family="qwen2", tokens=4, optimizer="AdamW fused"),
    "AdamW8bit": Case(family="llama", tokens=4, optimizer="AdamW8bit"),
    "PagedAdamW8bit": Case(family="gpt2", tokens=4, vocabulary=2000, optimizer="PagedAdamW8bit"),
    "Adafactor": Case(family="phi3", tokens=4, optimizer="Adafactor"),
    "Adafactor, transformers": Case(family="qwen3", tokens=4, optimizer="Adafactor, transformers"),
    "SGD momentum foreach": Case(family="gpt_neox", tokens=4, optimizer="SGD momentum foreach", clip=True),
    "LoRA, AdamW8bit": Case(family="bloom", attention="eager", tokens=4, adapter="LoRA", optimizer="AdamW8bit"),
}


def model_of(case: Case, device: str) -> PreTrainedModel:
    """The model, its adapter attached, in training mode."""
    facts = {**FAMILIES[case.family], "model_type": case.family, "vocab_size": case.vocabulary}
    facts.update(dict.fromkeys(DROPOUTS, case.dropout))
    quantized = case.weights in ("int8", "nf4", "nf4 twice")
    model: Any = shallowflow.load_model(
        facts,
        quantization="int8" if case.weights == "int8" else "nf4" if quantized else None,
        double_quantization=case.weights == "nf4 twice",
        compute_dtype="bfloat16" if case.weights == "bfloat16" else "float32",
        device=device,
        attn_implementation=case.attention,
    )
    if case.adapter == "none":
        model.requires_grad_(True)
    else:
        config = peft.LoraConfig(
            r=8,
            target_modules="all-linear",
            lora_dropout=case.dropout,
            use_dora=case.adapter == "DoRA",
            use_rslora=case.adapter == "rsLoRA",
            fan_in_fan_out=case.family == "gpt2" and not quantized,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    if case.recompute != "no":
        if case.adapter != "none":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": case.recompute == "reentrant"})
    made: PreTrainedModel = model.train()
    return made


def make_step_of(case: Case) -> Callable[[str], Callable[[], None]]:
    """The step as a function of the device."""

    def make_step(device: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = model_of(case, device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[case.optimizer](parameters)
        shape = (BATCH, case.tokens)
        batches = [torch.randint(0, VOCABULARY, shape, device=device) for _ in range(case.accumulation)]

        def step() -> None:
            for tokens in batches:
                with torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext():
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                (loss / case.accumulation).backward()
            if case.clip:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make_step


@pytest.fixture(autouse=True, scope="module")
def _ready() -> None:
    """bitsandbytes makes its code tables when first used, and keeps them for the process: no part of a step."""
    register_quantization()
    model_of(Case(family="llama", weights="nf4 twice", adapter="LoRA"), "cpu")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # whatever libraries say while they build and train
def test_simulated_equals_measured(name: str) -> None:
    """Resident bytes and the peak of the allocated ones are those that the CPU's allocator reports."""
    make_step = make_step_of(CASES[name])

    predicted, truth = simulate(make_step, "cpu"), measure(make_step, "cpu")

    assert predicted.resident_bytes == pytest.approx(truth.resident_bytes, rel=1e-3)
    assert predicted.peak_allocated_bytes == pytest.approx(truth.peak_allocated_bytes, rel=1e-3)
