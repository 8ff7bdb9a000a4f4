"""What goes wrong with a trainer's settings on a GPU, and what to write instead.

Each trap is a function of settings, the model's facts and the GPU. Sources: the trainers' own code, as named, and what
was measured on a T4 (`profiles/gpus/t4.toml`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shallowflow.profiles import GpuSpec, model_facts

from .settings import DTYPES, TITLES, Settings

Severity = Literal["fails", "wrong", "slow", "late"]
AMPERE = (8, 0)
FIRST_UPDATES = 7
"""From a scale of 65536 to one of 512, which is where most models' first gradients fit into fp16."""


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
    if not _is_old(gpu) or settings.precision != "bf16":
        return
    slower = gpu.fp16_flops_per_second / gpu.bf16_flops_per_second
    yield Finding(
        trap="emulated bf16",
        severity="slow",
        where=settings.said("precision"),
        what=(
            f"{gpu.title} has no bf16; PyTorch emulates it and says that it is supported, at {slower:.0f} times the "
            "time of a product in fp16"
        ),
        instead="fp16, and no bf16",
    )


def _stored_in_bf16(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not _is_old(gpu) or settings.quantization != "nf4" or settings.product_dtype == "float16":
        return
    if settings.precision == "bf16":
        return
    emulated = settings.product_dtype == "bfloat16"
    what = "in bf16, which is emulated here" if emulated else "in fp32, an eighth of fp16's rate on paper"
    yield Finding(
        trap="quantized products",
        severity="slow",
        where=settings.said("product_dtype"),
        what=f"weights of 4 bits are multiplied {what}",
        instead="a compute dtype of float16",
    )


def _fp32(settings: Settings, _config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not _is_old(gpu) or settings.precision != "fp32":
        return
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
    if settings.precision != "fp16" or settings.initial_scale <= 2**12:
        return
    yield Finding(
        trap="loss scale",
        severity="late",
        where=settings.said("precision"),
        what=(
            f"the loss scale begins at {settings.initial_scale:,.0f}: about the first {FIRST_UPDATES} updates overflow "
            "and are left out, while the learning rate's schedule goes on; a run of few steps learns little"
        ),
        instead="more steps than a few dozen, or a script that makes the scaler begin at 1024",
    )


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
        where=settings.said("quantization" if why else "weights_dtype"),
        what=f"{what} in {learning}{why}: the fp16 gradient scaler refuses its gradients at the first update",
        instead="fp32 for what learns" + ("; cast it after the trainer is made, which takes a script" if why else ""),
    )


def _overflow(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if settings.precision != "fp16" or not model_facts.overflows_fp16(config):
        return
    yield Finding(
        trap="fp16 overflow",
        severity="wrong",
        where=f"{config.get('model_type')} in fp16",
        what="this architecture's activations leave fp16's range: the loss becomes nan, or every update is left out",
        instead=f"fp32 on {gpu.title}, or a GPU with bf16",
    )


def _attention(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if not _is_old(gpu):
        return
    if settings.attention.startswith("flash") or settings.attention in ("sage", "fp8"):
        yield Finding(
            trap="attention",
            severity="fails",
            where=settings.said("attention"),
            what=f"{settings.attention} runs on compute capability 8.0 and later; {gpu.title} has {_capability(gpu)}",
            instead="sdpa",
        )
    heads, kv = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if settings.attention == "sdpa" and settings.tool != "unsloth" and kv and heads and kv != heads:
        square = 4 * settings.micro_batch_size * int(heads) * settings.sequence_length**2
        yield Finding(
            trap="grouped KV heads",
            severity="slow",
            where=settings.said("attention"),
            what=(
                "transformers gives SDPA fewer KV heads than query heads, which the memory-efficient kernel, the only "
                f"fused one of {gpu.title}, refuses; the whole score matrix is made, {square / 2**30:.2f} GiB a layer "
                "in fp32"
            ),
            instead="an attention function that repeats the KV heads first, which takes a script",
        )


def _capability(gpu: GpuSpec) -> str:
    return ".".join(map(str, gpu.compute_capability or ()))


def _packing(settings: Settings, _config: Mapping[str, Any], _gpu: GpuSpec) -> Iterator[Finding]:
    if settings.packing != "leaking":
        return
    yield Finding(
        trap="packing",
        severity="wrong",
        where=settings.said("packing"),
        what=f"documents that are packed see each other: with {settings.attention}, nothing keeps them apart",
        instead={"llamafactory": "neat_packing: true"}.get(settings.tool, "no packing, and batches grouped by length"),
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
            f"the logits of {tokens:,} tokens over {words:,} words are {in_fp32 / 2**30:.2f} GiB in fp32, and are "
            "there several times over at the peak"
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
            f"{TITLES[settings.tool]} resumes from the highest number without a look at the files; one that was being "
            "written when the machine went away is taken for whole"
        ),
        instead="a checkpoint by name, after a look at its size",
    )


TRAPS: tuple[Trap, ...] = (
    _bf16,
    _stored_in_bf16,
    _fp32,
    _scale,
    _adapter_dtype,
    _overflow,
    _attention,
    _packing,
    _kernels,
    _fused_loss,
    _logits,
    _length,
    _resume,
)


def mended(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> dict[str, Any]:
    """What of *settings* to change against all that fails, learns wrong or is slow, as far as a file can say it."""
    changes: dict[str, Any] = {}
    if _is_old(gpu):
        overflows = model_facts.overflows_fp16(config)
        changes["precision"] = "fp32" if overflows else "fp16"
        dtype = DTYPES[changes["precision"]]
        changes["product_dtype"] = dtype
        if settings.adapter == "full" or (overflows and settings.quantization == "none"):
            changes["weights_dtype"] = "float32"
        else:
            changes["weights_dtype"] = dtype
        if settings.attention.startswith("flash") or settings.attention in ("sage", "fp8", "flex_attention"):
            changes["attention"] = "sdpa"
        changes["kernels"] = ()
    if settings.loss in ("fused", "cut"):
        changes["loss"] = "whole"
    if changes.get("precision", settings.precision) == "fp16":
        changes["adapter_dtype"] = "float32"
    if settings.packing == "leaking":
        changes["packing"] = "separate" if settings.tool == "llamafactory" else "none"
        changes["longest_first"] = settings.tool != "llamafactory"
    elif settings.packing == "none":
        changes["longest_first"] = True
    changes["resumes_blindly"] = False
    return {name: value for name, value in changes.items() if getattr(settings, name) != value}
