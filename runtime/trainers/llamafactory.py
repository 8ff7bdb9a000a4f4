"""LLaMA-Factory's YAML, read and written (after its ``hparams`` and ``model/``, 0.9.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import trl
from .settings import DTYPES, ConfigurationError, Dtype, Entries, Packing, Precision, Quantized, Settings

DISTINCT = (
    "model_name_or_path",
    "finetuning_type",
    "cutoff_len",
    "lora_target",
    "stage",
    "template",
    "quantization_bit",
)
_ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def read(entries: Mapping[str, Any], where: str, *, claims_bf16: bool) -> Settings:
    """*entries* as LLaMA-Factory takes them on a GPU of which PyTorch says, truly or not, that it has bf16.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type, or a way to train that is none known here.
    """
    own = Entries(entries, where)
    stage = own.text("stage", "sft")
    kind = own.text("finetuning_type", "lora", "adapter")
    bits = own.whole("quantization_bit", 0, "quantization", least=0)
    _refuse(own, where, stage, kind, bits)
    quantization: Quantized = "nf4" if bits == 4 else "int8" if bits == 8 else "none"
    full, pure = kind == "full", own.flag("pure_bf16")
    precision = _precision(own, pure=pure)
    product = _product(precision, claims_bf16=claims_bf16)
    rank = None if full else own.whole("lora_rank", 8, "rank")
    targets = own.names("lora_target", "target_modules")
    return Settings(
        tool="llamafactory",
        model=own.model("model_name_or_path"),
        sequence_length=own.whole("cutoff_len", 2048, "sequence_length"),
        micro_batch_size=own.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=own.flag("double_quantization", default=True) and quantization == "nf4",
        # ``load_model`` has it "auto", and makes fp32 of what learns
        weights_dtype="float32" if full and not pure else "auto",
        product_dtype=product,
        precision="fp32" if pure else precision,
        adapter="full" if full else trl.kind_of(own),
        adapter_dtype=product if pure else "float32",
        rank=rank,
        alpha=None if rank is None else own.whole("lora_alpha", 2 * rank, "alpha"),
        dropout=own.number("lora_dropout", 0.0, "dropout"),
        target_modules=() if targets in ((), ("all",)) else targets,
        trained_whole=own.names("additional_target", "trained_whole"),
        recomputes=not own.flag("disable_gradient_checkpointing", "recomputes"),
        attention=_attention(own, where),
        loss="fused" if own.flag("enable_liger_kernel", "loss") else "whole",
        packing=_packing(own, stage),
        shards=own.has("fsdp", "fsdp_config", "deepspeed") or "",
        longest_first=trl.groups(own),
        optimizer=own.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 5e-5, "learning_rate"),
        resumes_blindly=_resumes(own, entries),
        keys={**own.keys, "weights_dtype": "the checkpoint's dtype", "product_dtype": own.keys["precision"]},
        values=own.values,
        ignored=own.unread(),
        misspelled=own.misspelled(),
    )


def _refuse(own: Entries, where: str, stage: str, kind: str, bits: int) -> None:
    if stage not in ("sft", "pt"):
        raise ConfigurationError(f"{where}: stage is {stage}; sft and pt can be checked")
    if kind not in ("lora", "full"):
        raise ConfigurationError(f"{where}: finetuning_type is {kind}; lora and full can be checked")
    if bits not in (0, 4, 8):
        raise ConfigurationError(f"{where}: quantization_bit is {bits}; 4 and 8 can be checked")
    if bits and (method := own.text("quantization_method", "bnb")) not in ("bnb", "bitsandbytes"):
        raise ConfigurationError(f"{where}: quantization_method is {method}; bnb can be checked")
    if bits and kind == "full":
        raise ConfigurationError(f"{where}: quantized weights cannot learn; give finetuning_type lora")


def _precision(own: Entries, *, pure: bool) -> Precision:
    bf16, fp16 = own.flag("bf16"), own.flag("fp16")
    own.name("precision", "pure_bf16" if pure else "fp16" if fp16 and not bf16 else "bf16")
    return "bf16" if bf16 or pure else "fp16" if fp16 else "fp32"


def _product(precision: Precision, *, claims_bf16: bool) -> Dtype:
    """Its ``compute_dtype``: where neither is wanted it is the best that the GPU claims (``infer_optim_dtype``)."""
    if precision == "fp32":
        return "bfloat16" if claims_bf16 else "float16"
    return DTYPES[precision]


def _attention(own: Entries, where: str) -> str:
    word = own.text("flash_attn", "auto", "attention").lower()
    if word == "disabled":
        return "eager"
    if word not in _ATTENTION:
        raise ConfigurationError(f"{where}: flash_attn is {word}; LLaMA-Factory has {', '.join(_ATTENTION)}, disabled")
    return _ATTENTION[word]


def _resumes(own: Entries, entries: Mapping[str, Any]) -> bool:
    """Whether it takes the newest one: unasked, too, where it finds one and may not overwrite it (its ``parser.py``).

    One that is named is somebody's choice.
    """
    overwrites = own.flag("overwrite_output_dir", "resumes_blindly")
    if entries.get("resume_from_checkpoint") is None:
        return not overwrites
    own.name("resumes_blindly", "resume_from_checkpoint")
    return str(entries["resume_from_checkpoint"]).lower() == "true"


def _packing(own: Entries, stage: str) -> Packing:
    if own.flag("neat_packing"):
        own.name("packing", "neat_packing")
        return "separate"
    return "leaking" if own.flag("packing", "packing", default=stage == "pt") else "none"


def write(settings: Settings) -> dict[str, Any]:
    """The entries of a file that trains *settings*, but for the data."""
    full = settings.adapter == "full"
    entries: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "do_train": True,
        "finetuning_type": "full" if full else "lora",
        "cutoff_len": settings.sequence_length,
        "output_dir": "run",
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_train_epochs": 1.0,
    }
    if not full:
        entries |= {
            "lora_rank": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "lora_target": ",".join(settings.target_modules or ()) or "all",
        }
        entries |= {"use_rslora": True} if settings.adapter == "rslora" else {}
        entries |= {"use_dora": True} if settings.adapter == "dora" else {}
    if settings.quantization != "none":
        entries |= {
            "quantization_bit": 4 if settings.quantization == "nf4" else 8,
            "quantization_method": "bnb",
            "double_quantization": settings.double_quantization,
        }
    entries |= {
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "flash_attn": {"eager": "disabled", "flash_attention_2": "fa2"}.get(settings.attention, "sdpa"),
        "packing": settings.packing != "none",
        "neat_packing": settings.packing == "separate",
        "train_sampling_strategy": "group_by_length" if settings.longest_first else "random",
        "disable_gradient_checkpointing": not settings.recomputes,
        "optim": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
    }
    return entries
