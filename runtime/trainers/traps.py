"""What goes wrong with a trainer's settings on a GPU, and what to write instead.

Each trap is a function of settings, the model's facts and the GPU. Sources: the trainers' own code, as named, and what
was measured on a T4 (`profiles/gpus/t4.toml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shallowflow.profiles import GpuSpec, model_facts

from . import resolve
from .settings import DTYPES, TITLES, VARLEN, Settings, Tool, is_any

Severity = Literal["fails", "wrong", "slow", "late"]
AMPERE = (8, 0)
LOW_SCALE, HIGH_SCALE = 1024.0, 4096.0
"""Where our own loss scale begins, and from where on a beginning is told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trap that settings walk into.

    Attributes:
        trap: a short name of it.
        severity: the run fails; it learns something else than was meant; it takes longer or more memory than it
            needs; or trouble shows late.
        where: the line of the file, as ``key: value``.
        what: what happens.
        instead: what to write, or to do.
    """

    trap: str
    severity: Severity
    where: str
    what: str
    instead: str


Trap = Callable[[Settings, Mapping[str, Any], GpuSpec], Iterator[Finding]]


def found(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> tuple[Finding, ...]:
    """All traps that *settings* walk into on *gpu*, the worst first."""
    order: tuple[Severity, ...] = ("fails", "wrong", "slow", "late")
    everything = [finding for trap in TRAPS for finding in trap(settings, config, gpu)]
    return tuple(sorted(everything, key=lambda finding: order.index(finding.severity)))


def _is_old(gpu: GpuSpec) -> bool:
    return gpu.compute_capability is not None and gpu.compute_capability < AMPERE


def _bf16(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not _is_old(gpu) or settings.multiplied != "bfloat16":
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
    if not _is_old(gpu) or settings.quantization != "nf4" or settings.product_dtype in ("float16", settings.multiplied):
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
    if not _is_old(gpu) or settings.precision != "fp16" or settings.weights_dtype != "bfloat16":
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
    if not _is_old(gpu) or settings.multiplied != "float32" or model_facts.overflows_fp16(config):
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


def a(gpu: GpuSpec) -> str:
    """*gpu* with its article."""
    return f"{'an' if gpu.title.startswith(('A', 'E', 'I', 'L', 'NVIDIA', 'O')) else 'a'} {gpu.title}"


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


def _attention(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if resolve.caps_scores(config) and settings.attention == "sdpa":
        yield Finding(
            trap="capped scores",
            severity="fails",
            where=settings.said("attention"),
            what="this model caps its attention scores, which SDPA does not do: transformers refuses it",
            instead="eager",
        )
    if not _is_old(gpu) or not is_any(settings.attention, _FLASH):
        return
    falls_back = settings.tool == "llamafactory" and settings.attention == "flash_attention_2"
    name = "varlen_attn, which packed rows go through," if settings.attention == VARLEN else settings.attention
    yield Finding(
        trap="attention",
        severity="late" if falls_back else "fails",
        where=settings.said("attention"),
        what=f"{name} runs on compute capability 8.0 and later; {a(gpu)} has {_capability(gpu)}"
        + ("; only where flash-attn is not installed it is left out" if falls_back else ""),
        instead="sdpa_varlen: false" if settings.attention == VARLEN else _plain_attention(config),
    )


def _plain_attention(config: Mapping[str, Any]) -> str:
    return "eager" if resolve.caps_scores(config) else "sdpa"


_FLASH = ("flash", "sage", "fp8", VARLEN)


def _grouped_heads(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    """transformers repeats the KV heads only where there is a mask (``use_gqa_in_sdpa``): full rows have none."""
    if not _is_old(gpu) or settings.attention != "sdpa" or settings.tool == "unsloth" or settings.is_masked:
        return
    if not resolve.repeats_heads(config) or (resolve.head_size(config) or 0) > resolve.MOST_VARLEN_HEAD:
        return
    square = 4 * settings.micro_batch_size * int(config["num_attention_heads"]) * settings.sequence_length**2
    yield Finding(
        trap="grouped KV heads",
        severity="slow",
        where=settings.said("attention"),
        what=(
            "transformers gives SDPA fewer KV heads than query heads wherever a row is full, which the only fused "
            f"kernel of {a(gpu)} refuses; the whole score matrix is made, {square / 2**30:.2f} GiB a layer in fp32"
        ),
        instead=(
            "neat_packing: true, whose mask makes transformers repeat the KV heads"
            if settings.tool == "llamafactory"
            else "an attention function that repeats the KV heads first, which takes a script"
        ),
    )


def _capability(gpu: GpuSpec) -> str:
    return ".".join(map(str, gpu.compute_capability or ()))


_APART: dict[Tool, str] = {
    "axolotl": "attn_implementation: sdpa and sdpa_varlen: false, with which it keeps them apart",
    "llamafactory": "neat_packing: true",
    "trl": "packing_strategy bfd",
    "unsloth": "packing_strategy bfd",
    "transformers": "no packing, and batches grouped by length",
}


def _packing(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.packing != "leaking":
        return
    yield Finding(
        trap="packing",
        severity="wrong",
        where=settings.said("packing"),
        what="documents that share a row see each other: nothing keeps them apart",
        instead=_APART[settings.tool],
    )


def _kernels(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not _is_old(gpu) or not (settings.kernels or settings.loss == "cut"):
        return
    yield Finding(
        trap="Triton's products",
        severity="slow",
        where=f"{', '.join(settings.kernels) or settings.said('loss')}",
        what="Triton compiles products for this chip without its tensor cores, if it compiles them at all",
        instead="the loss of PyTorch",
    )


def _fused_loss(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.precision != "fp16" or settings.loss not in ("fused", "cut"):
        return
    yield Finding(
        trap="fused loss",
        severity="wrong",
        where=settings.said("loss"),
        what=(
            "its gradients are formed in the forward pass, before the loss scale is known: what is below 6e-8 becomes "
            "zero in fp16"
        ),
        instead="a loss in parts by ordinary autograd, or the whole loss",
    )


def _logits(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    words = config.get("vocab_size")
    if settings.loss != "whole" or not isinstance(words, int):
        return
    tokens = settings.micro_batch_size * settings.sequence_length
    in_fp32 = 4 * tokens * words
    if in_fp32 < gpu.memory_bytes / 32:
        return
    yield Finding(
        trap="whole logits",
        severity="slow",
        where=settings.said("micro_batch_size"),
        what=(
            f"the logits of {tokens:,} tokens over {words:,} words are {in_fp32 / 2**30:.2f} GiB in fp32, and come "
            "several times over"
        ),
        instead="fewer sequences at once and more accumulation, or a trainer whose loss is computed in parts",
    )


def _length(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.packing != "none" or settings.longest_first:
        return
    yield Finding(
        trap="longest batch",
        severity="late",
        where=settings.said("longest_first"),
        what="the longest batch comes at any time: if memory does not last, the run may fail after hours",
        instead="batches grouped by length, whose first one is the longest",
    )


def _resume(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if not settings.resumes_blindly:
        return
    yield Finding(
        trap="resume",
        severity="late",
        where=settings.said("resumes_blindly"),
        what=(
            f"{TITLES[settings.tool]} resumes from the checkpoint of the highest number without a look at its files; "
            "one that was being written when the machine went away is taken for whole"
        ),
        instead=("overwrite_output_dir, or " if settings.tool == "llamafactory" else "")
        + "a checkpoint by name, after a look at it",
    )


TRAPS: tuple[Trap, ...] = (
    _bf16,
    _quantized_products,
    _stored_in_bf16,
    _fp32,
    _scale,
    _adapter_dtype,
    _overflow,
    _attention,
    _grouped_heads,
    _packing,
    _kernels,
    _fused_loss,
    _logits,
    _length,
    _resume,
)


def mended(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """What of *settings* to change against all that fails, learns wrong or is slow, as far as the tool can say it."""
    changes: dict[str, Any] = {}
    overflows = model_facts.overflows_fp16(config)
    full = settings.adapter == "full"
    if _is_old(gpu):
        # axolotl has no weights in fp32 under fp16, which is what a gradient scaler needs of those that learn
        changes["precision"] = "fp32" if overflows or (full and settings.tool == "axolotl") else "fp16"
        dtype = DTYPES[changes["precision"]]
        changes["product_dtype"] = dtype
        if full:
            changes["weights_dtype"] = "float32"
        elif settings.tool != "llamafactory":
            changes["weights_dtype"] = dtype
        if is_any(settings.attention, (*_FLASH, "flex")):
            changes["attention"] = _plain_attention(config)
        changes["kernels"] = ()
    if resolve.caps_scores(config) and settings.attention == "sdpa":
        changes["attention"] = "eager"
    if settings.loss in ("fused", "cut") and changes.get("precision", settings.precision) == "fp16":
        changes["loss"] = "whole"
    if settings.loss == "cut" and _is_old(gpu):
        changes["loss"] = "whole"
    if changes.get("precision", settings.precision) == "fp16":
        changes["adapter_dtype"] = "float32"
        changes["initial_scale"] = LOW_SCALE if settings.tool in ("trl", "transformers") else settings.initial_scale
    changes |= _unmixed(settings, config, gpu)
    changes["resumes_blindly"] = False
    return {name: value for name, value in changes.items() if getattr(settings, name) != value}


def _unmixed(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """Packing that keeps documents apart, or none, and then the longest first."""
    if settings.packing == "leaking":
        if settings.tool == "axolotl":
            return {"packing": "separate", "attention": _plain_attention(config)}
        return {"packing": "separate"} if settings.tool in ("llamafactory", "trl", "unsloth") else {"packing": "none"}
    if settings.packing == "separate":
        return {}
    if settings.tool == "llamafactory" and any(_grouped_heads(settings, config, gpu)):
        return {"packing": "separate"}
    return {"longest_first": True}
