"""axolotl's YAML, read and written (after its ``utils/schemas``, ``utils/config`` and ``loaders/model.py``, 0.19)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import (
    DTYPES,
    VARLEN,
    Adapter,
    ConfigurationError,
    Dtype,
    Entries,
    Loss,
    Packing,
    Precision,
    Quantized,
    Settings,
    dtype_of,
)

DISTINCT = ("base_model", "micro_batch_size", "sequence_len", "lora_target_linear", "sample_packing", "load_in_4bit")
"""Keys that tell this tool's files from others'."""

FLAGS = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
"""Flags of old, each with the ``attn_implementation`` that it means; the first one that is set counts."""


def read(entries: Mapping[str, Any], where: str, *, claims_bf16: bool) -> Settings:
    """*entries* as axolotl takes them on a GPU of which PyTorch says, truly or not, that it has bf16.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type.
    """
    own = Entries(entries, where)
    kind = own.text("adapter", "full", "adapter")
    if kind not in ("full", "lora", "qlora"):
        raise ConfigurationError(f"{where}: adapter is {kind}; lora, qlora and none can be checked")
    if stage := own.text("rl"):
        raise ConfigurationError(f"{where}: rl is {stage}; supervised fine-tuning can be checked")
    full = kind == "full"
    precision = _precision(own, entries, claims_bf16=claims_bf16)
    quantization = _quantization(own, kind)
    # as ``resolve_dtype`` decides; it is also what embeddings and norms are brought to once adapters are on
    weights: Dtype = DTYPES[precision]
    if quantization == "int8" and precision == "fp32":
        weights = "float16"
    constants = own.table("bnb_config_kwargs")
    product = dtype_of(constants.get("bnb_4bit_compute_dtype"), weights)
    named = _attention(own)
    attention = named or "sdpa"
    packing = _packing(own, named)
    if packing == "separate" and attention == "sdpa" and own.flag("sdpa_varlen", default=True) and precision != "fp32":
        attention = VARLEN
    modules = own.names("lora_target_modules", "target_modules")
    everything = own.flag("lora_target_linear") or "all-linear" in modules or not modules
    return Settings(
        tool="axolotl",
        model=own.model("base_model"),
        sequence_length=own.whole("sequence_len", 512, "sequence_length"),
        micro_batch_size=own.whole("micro_batch_size", 1, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=quantization == "nf4" and bool(constants.get("bnb_4bit_use_double_quant", True)),
        weights_dtype=weights,
        product_dtype=weights if product == "auto" else product,
        precision=precision,
        adapter="full" if full else _kind(own),
        adapter_dtype="float32" if own.flag("peft_autocast_adapter_dtype", "adapter_dtype", default=True) else weights,
        rank=None if full else own.whole("lora_r", 8, "rank"),
        alpha=None if full else own.whole("lora_alpha", 16, "alpha"),
        dropout=own.number("lora_dropout", 0.0, "dropout"),
        target_modules=() if everything else modules,
        trained_whole=own.names("lora_modules_to_save", "trained_whole"),
        recomputes=own.flag("gradient_checkpointing", "recomputes"),
        attention=attention,
        loss=_loss(own),
        packing=packing,
        shards=own.has("fsdp", "fsdp_config", "deepspeed") or "",
        longest_first=own.flag("group_by_length", "longest_first"),
        optimizer=own.text("optimizer", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 2e-4, "learning_rate"),
        kernels=tuple(key for key in ("cut_cross_entropy",) if own.flag(key)),
        resumes_blindly=own.flag("auto_resume_from_checkpoints", "resumes_blindly"),
        keys={**own.keys, "product_dtype": "bnb_4bit_compute_dtype", "weights_dtype": own.keys["precision"]},
        values={"weights_dtype": own.values["precision"], **own.values} if "precision" in own.values else own.values,
        ignored=own.unread(),
        misspelled=own.misspelled(),
        inert=_inert(own, kind, where),
    )


def _inert(own: Entries, kind: str, where: str) -> tuple[str, ...]:
    """Quantization that ``loaders/model.py`` passes over, as it looks at the adapter first.

    Raises:
        ConfigurationError: what ``utils/schemas/peft.py`` refuses.
    """
    in_4, in_8 = own.flag("load_in_4bit"), own.flag("load_in_8bit")
    if kind == "full" and (in_4 or in_8):
        key, needed = ("load_in_4bit", "qlora") if in_4 else ("load_in_8bit", "lora")
        raise ConfigurationError(f"{where}: axolotl refuses {key} without an adapter; give adapter: {needed}")
    if kind == "qlora" and (in_8 or not in_4):
        found = "load_in_8bit" if in_8 else "no load_in_4bit"
        raise ConfigurationError(f"{where}: axolotl refuses adapter: qlora with {found}; give load_in_4bit: true")
    if kind == "lora" and in_4:
        instead = "load_in_8bit is what counts" if in_8 else "weights stay as they are; adapter: qlora does it"
        return (f"axolotl ignores load_in_4bit with adapter: lora: {instead}.",)
    return ()


def _quantization(own: Entries, kind: str) -> Quantized:
    in_4, in_8 = own.flag("load_in_4bit"), own.flag("load_in_8bit")
    own.name("quantization", "load_in_8bit" if in_8 else "load_in_4bit")
    if kind == "qlora" and in_4:
        return "nf4"
    return "int8" if kind == "lora" and in_8 else "none"


def _precision(own: Entries, entries: Mapping[str, Any], *, claims_bf16: bool) -> Precision:
    """As ``resolve_dtype`` decides: bf16 where it is wanted, or left to itself and claimed by the GPU."""
    half = own.flag("fp16") or own.flag("float16")
    own.flag("tf32"), own.flag("bfloat16")
    wanted = entries.get("bf16", "auto")
    if isinstance(wanted, str) and wanted.lower() == "auto":
        wanted = claims_bf16 and not half
        half = half or not claims_bf16
    else:
        wanted = own.flag("bf16")
    is_bf16 = bool(wanted) or bool(entries.get("bfloat16"))
    own.name("precision", "fp16" if half and not is_bf16 else "bf16")
    return "bf16" if is_bf16 else "fp16" if half else "fp32"


def _kind(own: Entries) -> Adapter:
    if own.flag("peft_use_dora"):
        return "dora"
    return "rslora" if own.flag("peft_use_rslora") else "lora"


def _loss(own: Entries) -> Loss:
    plugins = [name.lower() for name in own.names("plugins")]
    if own.flag("cut_cross_entropy", default=any("cut_cross_entropy" in name for name in plugins)):
        own.name("loss", "cut_cross_entropy")
        return "cut"
    if own.flag("liger_fused_linear_cross_entropy") and any("liger" in name for name in plugins):
        own.name("loss", "liger_fused_linear_cross_entropy")
        return "fused"
    own.flag("chunked_cross_entropy")  # of its logits only the cast to fp32 is done in parts
    return "whole"


def _attention(own: Entries) -> str:
    """What it is told to pass to transformers, or nothing."""
    named = own.text("attn_implementation", "", "attention")
    for key, meant in FLAGS.items():
        if own.flag(key) and not named:
            own.name("attention", key)
            named = meant
    return named


def _packing(own: Entries, named: str) -> Packing:
    """Apart where it is told an attention that it knows to keep them so (its ``attn_decontaminates_packing``)."""
    if not own.flag("sample_packing", "packing"):
        return "none"
    return "leaking" if named in ("", "fp8") else "separate"


def write(settings: Settings) -> dict[str, Any]:
    """The entries of a file that trains *settings*, but for the data."""
    full = settings.adapter == "full"
    entries: dict[str, Any] = {
        "base_model": settings.model,
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
        # packed documents leak where it is told no attention
        "attn_implementation": None if settings.packing == "leaking" else settings.attention,
        "sample_packing": settings.packing != "none",
        "group_by_length": settings.longest_first,
        "gradient_checkpointing": settings.recomputes,
    }
    if settings.packing == "separate" and settings.attention == "sdpa":
        entries["sdpa_varlen"] = False
    if settings.recomputes:
        entries["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    entries |= {
        "optimizer": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "constant_with_warmup",
        "warmup_ratio": 0.03,
    }
    return entries
