"""A trainer's own training step, built as that trainer builds it, on ``meta`` for ``simulate`` or on a real device."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shallowflow.planner.profiler.user_step import MakeStep
from shallowflow.profiles import model_facts
from shallowflow.runtime import build, loss, optimizers, quantized
from shallowflow.runtime.simulated import register_quantization

from . import resolve, tiled
from .settings import DTYPES, ConfigurationError, Settings

PART_TOKENS = 1024
"""Of Unsloth's loss, which takes as many at a time as free memory allows."""


def make_step(settings: Settings, config: Mapping[str, Any], device_type: str = "cuda") -> MakeStep:
    """What ``simulate`` takes: the last micro-batch of an update, and the update, of *settings* on a model of *config*.

    Where there are more micro-batches, gradients are there when it begins. The first call only makes the optimizer's
    state. Left out: a paged optimizer's state, which is counted as on the device; what Unsloth offloads of recomputed
    layers; the fused kernels of axolotl, Unsloth and Liger; FSDP and DeepSpeed.

    Args:
        settings: resolved for the model.
        device_type: of the device that is meant, as "meta" is none.
    """

    def built(device: str) -> Callable[[], None]:
        register_quantization()
        model = _model(settings, config, device)
        model.train()
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = _optimizer(settings, learning, device_type)
        tokens = _tokens(settings, device)
        lower = build.DTYPES[DTYPES[settings.precision]]

        def step() -> None:
            is_first = not optimizer.state
            if is_first or settings.gradient_accumulation_steps > 1:
                for parameter in learning:
                    parameter.grad = torch.zeros_like(parameter)
            if not is_first:
                context = contextlib.nullcontext() if lower == torch.float32 else torch.autocast(device, lower)
                with context:
                    found = _loss(settings, model, tokens, device_type)
                found.backward()
                del found
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return built


def _tokens(settings: Settings, device: str) -> torch.Tensor:
    rows, length = settings.micro_batch_size, settings.sequence_length
    shape = (1, rows * length) if settings.is_flattened else (rows, length)
    return torch.zeros(shape, dtype=torch.int64, device=device)


def _mask(settings: Settings, tokens: torch.Tensor) -> torch.Tensor | None:
    """What keeps documents apart: LLaMA-Factory's in its compute dtype, transformers' of truth values."""
    if not settings.is_masked:
        return None
    rows, length = tokens.shape
    if settings.tool != "llamafactory" and settings.attention == "sdpa":
        return torch.ones((rows, 1, length, length), dtype=torch.bool, device=tokens.device)
    dtype = build.DTYPES[settings.product_dtype if settings.tool == "llamafactory" else _stored(settings)]
    return torch.zeros((rows, 1, length, length), dtype=dtype, device=tokens.device)


def _stored(settings: Settings) -> str:
    """The dtype of weights; bf16 where it was never resolved."""
    return "bfloat16" if settings.weights_dtype == "auto" else settings.weights_dtype


def _model(settings: Settings, config: Mapping[str, Any], device: str) -> Any:
    made = build.transformers_config(config)
    # whatever else it is called keeps no scores, as SDPA does with as many KV heads as query heads
    attention = settings.attention if settings.attention in ("sdpa", "eager") and settings.tool != "unsloth" else None
    if resolve.caps_scores(config):
        attention = "eager"
    model: Any = build.empty_model(made, _stored(settings), device, attention)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the method's coming name
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
        use_dora=settings.adapter == "dora",
        target_modules=_targets(settings, model),
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


def _targets(settings: Settings, model: Any) -> list[str] | None:
    if settings.target_modules is None:
        return None
    if not settings.target_modules:
        return build.adapter_targets(model)
    there = {name.rpartition(".")[2] for name, module in model.named_modules() if quantized.is_linear(module)}
    if not any(f".{name}".endswith(f".{end}") for name, _ in model.named_modules() for end in settings.target_modules):
        raise ConfigurationError(
            f"{settings.key('target_modules')} names {', '.join(settings.target_modules)}, and the model has no such "
            f"module; its linear ones are {', '.join(sorted(there))}"
        )
    return list(settings.target_modules)


def _optimizer(settings: Settings, learning: list[torch.nn.Parameter], device_type: str) -> torch.optim.Optimizer:
    """Of PyTorch's AdamW, the implementation that it would choose on the device itself."""
    if settings.in_8_bits:
        return optimizers.make("adamw8bit", learning, settings.learning_rate)
    fused = "fused" in settings.optimizer
    return torch.optim.AdamW(
        learning, lr=settings.learning_rate, fused=fused or None, foreach=None if fused else device_type == "cuda"
    )


def _loss(settings: Settings, model: Any, tokens: torch.Tensor, device_type: str) -> torch.Tensor:
    base = build.without_adapter(model)
    lower = build.DTYPES[DTYPES[settings.precision]]
    given = {"input_ids": tokens, "attention_mask": _mask(settings, tokens), "use_cache": False}
    if settings.loss == "tiled":
        head = base.get_output_embeddings()
        dtype = head.weight.dtype if lower == torch.float32 else lower
        hidden = base.get_decoder()(**given).last_hidden_state
        return tiled.mean_loss(hidden, head.weight, tokens, dtype, has_kernels=device_type == "cuda")
    if settings.loss != "whole" and not model_facts.changes_logits(base.config.to_dict()):
        return loss.chunked(model, tokens, tokens, _part(settings, base), dtype=lower)
    output = model(**given, labels=tokens)
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
