"""A trainer's own training step, built as that trainer builds it, on ``meta`` for ``simulate`` or on a real device."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime import build, loss, optimizers, quantized
from runtime.simulated import register_quantization
from shallowflow.planner.profiler.user_step import MakeStep
from shallowflow.profiles import model_facts

from . import tiled
from .settings import DTYPES, Settings

PART_TOKENS = 1024
"""Of Unsloth's loss, which takes as many at a time as free memory allows."""


def make_step(settings: Settings, config: Mapping[str, Any], num_micro_batches: int) -> MakeStep:
    """What ``simulate`` takes: *settings* on a model of *config*, with so many micro-batches to an update.

    Left out: a paged optimizer's state, which is counted as on the device; what Unsloth offloads of recomputed layers;
    FSDP and DeepSpeed.
    """

    def built(device: str) -> Callable[[], None]:
        register_quantization()
        model = _model(settings, config, device)
        model.train()
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = _optimizer(settings, learning)
        shape = (settings.micro_batch_size, settings.sequence_length)
        lower = build.DTYPES[DTYPES[settings.precision]]
        batches = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(num_micro_batches)]

        def step() -> None:
            for tokens in batches:
                context = contextlib.nullcontext() if lower == torch.float32 else torch.autocast(device, lower)
                with context:
                    found = _loss(settings, model, tokens, lower)
                found.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return built


def _model(settings: Settings, config: Mapping[str, Any], device: str) -> Any:
    made = build.transformers_config(config)
    # whatever else it is called keeps no scores, as SDPA does with as many KV heads as query heads
    attention = settings.attention if settings.attention in ("sdpa", "eager") and settings.tool != "unsloth" else None
    model: Any = build.empty_model(made, settings.weights_dtype, device, attention)
    if settings.quantization != "none":
        for layer in build.decoder_layers(model):
            quantized.quantize_linears(
                layer, settings.quantization, build.DTYPES[settings.product_dtype], settings.double_quantization
            )
    if settings.casts_rest:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    if settings.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if settings.adapter == "full":
        model.requires_grad_(requires_grad=True)
        return model
    return _adapted(settings, model)


def _adapted(settings: Settings, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.rank or 1,
        lora_alpha=settings.alpha or 1,
        use_rslora=settings.adapter == "rslora",
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or build.adapter_targets(model),
        modules_to_save=list(settings.trained_whole) or None,
        task_type="CAUSAL_LM",
    )
    on_meta = next(model.parameters()).is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, lora, low_cpu_mem_usage=on_meta)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(build.DTYPES[settings.adapter_dtype])
    return adapted


def _optimizer(settings: Settings, learning: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if settings.in_8_bits:
        return optimizers.make("adamw8bit", learning, settings.learning_rate)
    fused = "fused" in settings.optimizer
    return torch.optim.AdamW(learning, lr=settings.learning_rate, fused=fused or None, foreach=None if fused else True)


def _loss(settings: Settings, model: Any, tokens: torch.Tensor, lower: torch.dtype) -> torch.Tensor:
    base = build.without_adapter(model)
    if settings.loss != "whole" and not model_facts.changes_logits(base.config.to_dict()):
        if settings.loss == "tiled":
            hidden = base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            return tiled.mean_loss(hidden, base.get_output_embeddings().weight, tokens, lower)
        return loss.chunked(model, tokens, tokens, _part(settings, base), dtype=lower)
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    if lower != torch.float32:  # accelerate returns what autocast made as fp32, all of the logits included
        output.logits = output.logits.float()
    found: torch.Tensor = output.loss
    return found


def _part(settings: Settings, base: Any) -> int:
    """Tokens at a time: Liger takes so many that its logits are no larger than its input."""
    if settings.loss != "fused":
        return PART_TOKENS
    words, size = base.get_output_embeddings().weight.shape
    tokens = settings.micro_batch_size * settings.sequence_length
    parts = math.ceil(words / size)
    return int(2 ** math.ceil(math.log2(max(1, math.ceil(tokens / parts)))))
