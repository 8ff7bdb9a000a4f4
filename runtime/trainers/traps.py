"""What goes wrong with a trainer's settings on a GPU, and what to write instead.

Each trap is a function of settings, the model's facts and the GPU. Sources: the trainers' own code, as named, and what
was measured on a T4 (`profiles/gpus/t4.toml`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shallowflow.profiles import GpuSpec, model_facts

from . import precision_traps, resolve
from .findings import Finding, Severity, Trap, a, is_old
from .precision_traps import LOW_SCALE
from .settings import DTYPES, TITLES, VARLEN, Settings, Tool, is_any


def found(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> tuple[Finding, ...]:
    """All traps that *settings* walk into on *gpu*, the worst first."""
    order: tuple[Severity, ...] = ("fails", "wrong", "slow", "late")
    everything = [finding for trap in TRAPS for finding in trap(settings, config, gpu)]
    return tuple(sorted(everything, key=lambda finding: order.index(finding.severity)))


def _attention(settings: Settings, config: Mapping[str, Any], gpu: GpuSpec) -> Iterator[Finding]:
    if resolve.caps_scores(config) and settings.attention == "sdpa":
        yield Finding(
            trap="capped scores",
            severity="fails",
            where=settings.said("attention"),
            what="this model caps its attention scores, which SDPA does not do: transformers refuses it",
            instead="eager",
        )
    if not is_old(gpu) or not is_any(settings.attention, _FLASH):
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
    if not is_old(gpu) or settings.attention != "sdpa" or settings.tool == "unsloth" or settings.is_masked:
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
            f"kernel of {a(gpu)} refuses; the whole score matrix is made, {square / 2**20:,.0f} MiB a layer in fp32"
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
    if not is_old(gpu) or not (settings.kernels or settings.loss == "cut"):
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
    *precision_traps.TRAPS,
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
    if is_old(gpu):
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
    if settings.loss == "cut" and is_old(gpu):
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
