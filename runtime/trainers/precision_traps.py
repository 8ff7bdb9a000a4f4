"""Traps of the dtypes that a trainer computes and learns in, and of its loss scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from shallowflow.profiles import GpuSpec, model_facts

from .findings import Finding, Trap, a, is_old
from .settings import Settings

LOW_SCALE, HIGH_SCALE = 1024.0, 4096.0
"""Where our own loss scale begins, and from where on a beginning is told of."""


def _bf16(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not is_old(gpu) or settings.multiplied != "bfloat16":
        return
    where = settings.said("precision")
    if settings.tool == "unsloth":
        yield Finding(
            trap="bf16 refused",
            severity="fails",
            where=where,
            what=f"Unsloth asks for compute capability 8.0, loads fp16 weights on {a(gpu)}, and refuses bf16 for them",
            instead="fp16, or neither of the two",
        )
        return
    slower = gpu.fp16_flops_per_second / gpu.bf16_flops_per_second
    yield Finding(
        trap="emulated bf16",
        severity="slow",
        where=where,
        what=(
            f"{a(gpu)} has no bf16; PyTorch emulates it and says that it is supported, at {slower:.0f} times the "
            "time of a product in fp16"
        ),
        instead="fp16, and no bf16",
    )


def _quantized_products(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    """bitsandbytes multiplies in the compute dtype whatever autocast says of other products (its ``nn/modules.py``)."""
    if not is_old(gpu) or settings.quantization != "nf4" or settings.product_dtype in ("float16", settings.multiplied):
        return
    emulated = settings.product_dtype == "bfloat16"
    rate = gpu.bf16_flops_per_second if emulated else gpu.fp32_flops_per_second
    yield Finding(
        trap="quantized products",
        severity="slow",
        where=settings.said("product_dtype"),
        what=(
            f"weights of 4 bits are multiplied in {'bf16, which is emulated here' if emulated else 'fp32'}: "
            f"{gpu.fp16_flops_per_second / rate:.1f} times the time of fp16"
        ),
        instead="a compute dtype of float16",
    )


def _stored_in_bf16(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not is_old(gpu) or settings.precision != "fp16" or settings.weights_dtype != "bfloat16":
        return
    yield Finding(
        trap="bf16 left over",
        severity="slow",
        where=settings.said("weights_dtype"),
        what=(
            "weights stay in the checkpoint's bf16 under fp16: products convert theirs every time, and norms, "
            "residuals and the quantization's own state stay in bf16, which is emulated here"
        ),
        instead=(
            "a copy of the checkpoint that was saved in float16"
            if settings.tool == "llamafactory"
            else "dtype float16 where the model is loaded"
        ),
    )


def _fp32(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not is_old(gpu) or settings.multiplied != "float32" or model_facts.overflows_fp16(config):
        return
    if settings.tool == "axolotl" and settings.adapter == "full":
        return  # it has no fp32 weights under fp16
    yield Finding(
        trap="no fp16",
        severity="slow",
        where=settings.said("precision"),
        what=(
            "products in fp32 take "
            f"{gpu.fp16_flops_per_second / gpu.fp32_flops_per_second:.1f} times as long as in fp16"
        ),
        instead="fp16",
    )


def _scale(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.precision != "fp16" or settings.initial_scale <= HIGH_SCALE:
        return
    yield Finding(
        trap="loss scale",
        severity="late",
        where=settings.said("precision"),
        what=(
            f"the loss scale begins at {settings.initial_scale:,.0f}, and is halved with every update that overflows "
            f"and is left out: up to {_halvings(settings.initial_scale)} of the first ones, while the learning rate's "
            "schedule goes on; a run of few steps learns little"
        ),
        instead=f"more steps than a few dozen, or a script that makes the scaler begin at {LOW_SCALE:,.0f}",
    )


def _halvings(scale: float) -> int:
    """From *scale* to 1."""
    return max(0, math.ceil(math.log2(scale)))


def _adapter_dtype(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.precision != "fp16":
        return
    learning = settings.weights_dtype if settings.adapter == "full" else settings.adapter_dtype
    if learning == "float32":
        return
    what = "an adapter" if settings.adapter != "full" else "weights that learn"
    why = (
        " (TRL casts the adapters of quantized models)" if settings.tool == "trl" and settings.adapter != "full" else ""
    )
    yield Finding(
        trap="16-bit gradients",
        severity="fails",
        where=settings.said("quantization" if why else "adapter_dtype" if _is_told(settings) else "weights_dtype"),
        what=f"{what} in {learning}{why}: the fp16 gradient scaler refuses its gradients at the first update",
        instead="fp32 for what learns" + ("; cast it after the trainer is made, which takes a script" if why else ""),
    )


def _is_told(settings: Settings) -> bool:
    return settings.adapter != "full" and settings.is_said("adapter_dtype")


def _overflow(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if settings.precision != "fp16" or not model_facts.overflows_fp16(config) or settings.tool == "unsloth":
        return  # Unsloth computes such models in fp32 by itself (its ``models/loader.py``)
    yield Finding(
        trap="fp16 overflow",
        severity="wrong",
        where=f"{config.get('model_type')} in fp16",
        what="this architecture's activations leave fp16's range: the loss becomes nan, or every update is left out",
        instead=f"fp32 on {gpu.title}, or a GPU with bf16",
    )


TRAPS: tuple[Trap, ...] = (_bf16, _quantized_products, _stored_in_bf16, _fp32, _scale, _adapter_dtype, _overflow)
