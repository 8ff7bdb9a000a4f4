"""axolotl's YAML (its ``utils/schemas`` and ``loaders/model.py``), read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import Entries, Packing, Precision, Quantized, Settings

DISTINCT = ("base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "sample_packing", "load_in_4bit")
"""Keys that tell this tool's files from others'."""

_TRITON_PRODUCTS = ("cut_cross_entropy",)
_SEPARATING = ("flash_attention", "flash_attn_2_attention", "xformers_attention", "flex_attention")


def read(entries: Mapping[str, Any], where: str, *, has_bf16: bool, supports_packing: bool = True) -> Settings:
    """*entries* as axolotl takes them on a GPU that has, or claims to have, bf16.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type.
    """
    del supports_packing
    own = Entries(entries, where)
    kind = own.text("adapter", "full", "adapter")
    in_4, in_8 = own.flag("load_in_4bit", "quantization"), own.flag("load_in_8bit")
    quantization: Quantized = "none"
    if kind == "qlora" and in_4:
        quantization = "nf4"
    elif kind == "lora" and in_8:
        quantization = "int8"
    precision = _precision(own, entries, has_bf16=has_bf16)
    constants = own.table("bnb_config_kwargs")
    attention = _attention(own)
    weights = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
    if quantization == "int8" and precision == "fp32":
        weights = "float16"
    full = kind not in ("lora", "qlora")
    rank = None if full else own.whole("lora_r", 8, "rank")
    modules = own.names("lora_target_modules", "target_modules")
    everything = own.flag("lora_target_linear") or modules in (("all-linear",), ())
    plugins = own.names("plugins")
    fused = own.flag("liger_fused_linear_cross_entropy", "loss") and any("liger" in name.lower() for name in plugins)
    cut = own.flag("cut_cross_entropy") or any("cut_cross_entropy" in name.lower() for name in plugins)
    own.flag("chunked_cross_entropy")  # of its logits only the cast to fp32 is done in parts
    return Settings(
        tool="axolotl",
        model=own.text("base_model"),
        sequence_length=own.whole("sequence_len", 512, "sequence_length"),
        micro_batch_size=own.whole("micro_batch_size", 1, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=bool(constants.get("bnb_4bit_use_double_quant", quantization == "nf4")),
        weights_dtype=weights,  # type: ignore[arg-type]  # of three words
        product_dtype=_dtype(constants.get("bnb_4bit_compute_dtype")) or weights,  # type: ignore[arg-type]
        precision=precision,
        adapter=(
            "full"
            if full
            else "dora"
            if own.flag("peft_use_dora")
            else "rslora"
            if own.flag("peft_use_rslora")
            else "lora"
        ),
        rank=rank,
        alpha=None if full else own.whole("lora_alpha", 16, "alpha"),
        dropout=own.number("lora_dropout", 0.0, "dropout"),
        target_modules=() if everything else modules,
        trained_whole=own.names("lora_modules_to_save", "trained_whole"),
        recomputes=own.flag("gradient_checkpointing", "recomputes"),
        attention=attention,
        loss="cut" if cut else "fused" if fused else "whole",
        packing=_packing(own, attention),
        longest_first=own.flag("group_by_length", "longest_first"),
        optimizer=own.text("optimizer", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 2e-4, "learning_rate"),
        kernels=tuple(key for key in _TRITON_PRODUCTS if entries.get(key)),
        resumes_blindly=own.flag("auto_resume_from_checkpoints", "resumes_blindly"),
        keys=own.keys,
        values=own.values,
        ignored=own.unread(),
    )


def _precision(own: Entries, entries: Mapping[str, Any], *, has_bf16: bool) -> Precision:
    """As ``normalize_config`` decides: bf16 where it is wanted, or left to itself and claimed by the GPU."""
    wanted = entries.get("bf16", entries.get("bfloat16"))
    own.text("bf16", "", "precision") if isinstance(wanted, str) else own.flag("bf16", "precision")
    own.flag("bfloat16"), own.flag("float16"), own.flag("tf32")
    half = own.flag("fp16") or bool(entries.get("float16"))
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp16"
    if wanted in (True, "true", "full"):
        return "bf16"
    return "fp16" if half else "fp32"


def _attention(own: Entries) -> str:
    named = own.text("attn_implementation", "", "attention")
    flags = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "flex_attention": "flex_attention",
        "xformers_attention": "xformers",
        "eager_attention": "eager",
    }
    for key, meant in flags.items():
        if own.flag(key):
            own.keys["attention"], own.values["attention"] = key, "true"
            named = named or meant
    return named or "sdpa"


def _packing(own: Entries, attention: str) -> Packing:
    if not own.flag("sample_packing", "packing"):
        return "none"
    return "separate" if attention.startswith(("flash", "flex", "xformers")) else "leaking"


def _dtype(word: Any) -> str | None:
    if word is None:
        return None
    return str(word).removeprefix("torch.")


def write(settings: Settings, data: str) -> dict[str, Any]:
    """The entries of a file that trains *settings*, on the rows of *data*."""
    full = settings.adapter == "full"
    entries: dict[str, Any] = {
        "base_model": settings.model,
        "datasets": [{"path": data, "ds_type": "json", "type": "chat_template"}],
        "output_dir": "run",
        "sequence_len": settings.sequence_length,
        "micro_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_epochs": 1,
    }
    if not full:
        entries |= {
            "adapter": "qlora" if settings.quantization == "nf4" else "lora",
            "load_in_4bit": settings.quantization == "nf4",
            "load_in_8bit": settings.quantization == "int8",
            "lora_r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
        }
        if settings.target_modules:
            entries["lora_target_modules"] = list(settings.target_modules)
        else:
            entries["lora_target_linear"] = True
        entries |= {"peft_use_dora": True} if settings.adapter == "dora" else {}
        entries |= {"peft_use_rslora": True} if settings.adapter == "rslora" else {}
    if settings.quantization == "nf4":
        entries["bnb_config_kwargs"] = {
            "bnb_4bit_use_double_quant": settings.double_quantization,
            "bnb_4bit_compute_dtype": settings.product_dtype,
        }
    entries |= {
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "tf32": False,
        "attn_implementation": settings.attention,
        "sample_packing": settings.packing != "none",
        "group_by_length": settings.longest_first,
        "gradient_checkpointing": settings.recomputes,
    }
    if settings.recomputes:
        entries["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    entries |= {
        "optimizer": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant_with_warmup",
        "warmup_ratio": 0.03,
    }
    return entries
