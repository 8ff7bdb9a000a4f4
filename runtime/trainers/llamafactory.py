"""LLaMA-Factory's YAML (its ``hparams`` and ``model/``), read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import Adapter, ConfigurationError, Dtype, Entries, Loss, Packing, Precision, Quantized, Settings

DISTINCT = (
    "model_name_or_path",
    "finetuning_type",
    "cutoff_len",
    "lora_target",
    "stage",
    "template",
    "quantization_bit",
)
_ATTENTION = {
    "auto": "sdpa",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "disabled": "eager",
}


def read(entries: Mapping[str, Any], where: str) -> Settings:
    """*entries* as LLaMA-Factory takes them.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type, or the stage is none that is known here.
    """
    own = Entries(entries, where)
    stage = own.text("stage", "sft")
    if stage not in ("sft", "pt"):
        raise ConfigurationError(f"{where}: stage is {stage}; sft and pt can be checked")
    kind = own.text("finetuning_type", "lora", "adapter")
    if kind not in ("lora", "full"):
        raise ConfigurationError(f"{where}: finetuning_type is {kind}; lora and full can be checked")
    bits = own.whole("quantization_bit", 0, "quantization", least=0)
    if bits not in (0, 4, 8):
        raise ConfigurationError(f"{where}: quantization_bit is {bits}; bitsandbytes has 4 and 8")
    quantization: Quantized = "nf4" if bits == 4 else "int8" if bits == 8 else "none"
    pure = own.flag("pure_bf16")
    bf16, fp16 = own.flag("bf16", "precision"), own.flag("fp16")
    if fp16 and not bf16:
        own.keys["precision"], own.values["precision"] = "fp16", "true"
    precision: Precision = "bf16" if bf16 or pure else "fp16" if fp16 else "fp32"
    dtype: Dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]  # type: ignore[assignment]
    full = kind == "full"
    targets = own.names("lora_target", "target_modules")
    adapter: Adapter = "dora" if own.flag("use_dora") else "rslora" if own.flag("use_rslora") else "lora"
    rank = None if full else own.whole("lora_rank", 8, "rank")
    liger = own.flag("enable_liger_kernel", "loss")
    loss: Loss = "fused" if liger else "whole"
    attention = own.text("flash_attn", "auto", "attention").lower()
    return Settings(
        tool="llamafactory",
        model=own.text("model_name_or_path"),
        sequence_length=own.whole("cutoff_len", 2048, "sequence_length"),
        micro_batch_size=own.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=own.flag("double_quantization", default=True) and quantization == "nf4",
        weights_dtype="float32" if full and not pure else dtype,
        product_dtype=dtype,
        precision=precision,
        adapter="full" if full else adapter,
        adapter_dtype=dtype if pure else "float32",
        rank=rank,
        alpha=None if rank is None else own.whole("lora_alpha", 2 * rank, "alpha"),
        dropout=own.number("lora_dropout", 0.0, "dropout"),
        target_modules=() if targets in ((), ("all",)) else targets,
        trained_whole=own.names("additional_target", "trained_whole"),
        recomputes=not own.flag("disable_gradient_checkpointing", "recomputes"),
        attention=_ATTENTION.get(attention, attention),
        loss=loss,
        packing=_packing(own, stage),
        longest_first=own.flag("group_by_length", "longest_first"),
        optimizer=own.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 5e-5, "learning_rate"),
        resumes_blindly=bool(own.text("resume_from_checkpoint", "", "resumes_blindly"))
        if _is_word(entries)
        else (own.flag("resume_from_checkpoint", "resumes_blindly")),
        keys=own.keys,
        values=own.values,
        ignored=own.unread(),
    )


def _is_word(entries: Mapping[str, Any]) -> bool:
    return isinstance(entries.get("resume_from_checkpoint"), str)


def _packing(own: Entries, stage: str) -> Packing:
    if own.flag("neat_packing"):
        return "separate"
    return "leaking" if own.flag("packing", "packing", default=stage == "pt") else "none"


def write(settings: Settings, data: str) -> dict[str, Any]:
    """The entries of a file that trains *settings*, on a dataset called *data* in ``dataset_info.json``."""
    full = settings.adapter == "full"
    entries: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if full else "lora",
        "dataset": data,
        "dataset_dir": ".",
        "template": "default",
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
            "lora_target": ",".join(settings.target_modules) or "all",
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
        "group_by_length": settings.longest_first,
        "disable_gradient_checkpointing": not settings.recomputes,
        "optim": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_ratio": 0.03,
    }
    return entries
