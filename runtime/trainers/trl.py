"""TRL's YAML for ``trl sft --config``, read (after its ``scripts/sft.py`` and ``trainer/``, 1.16).

None is written: TRL makes the adapters of a quantized model bf16, which an fp16 gradient scaler refuses, and only a
script can undo it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import Adapter, Dtype, Entries, Packing, Precision, Quantized, Settings, dtype_of

DISTINCT = (
    "model_name_or_path",
    "use_peft",
    "max_length",
    "load_in_4bit",
    "lora_target_modules",
    "dataset_name",
    "bnb_4bit_quant_type",
)


def read(entries: Mapping[str, Any], where: str) -> Settings:
    """*entries* as ``trl sft`` takes them, which loads weights in fp32 where nothing is said of their dtype.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type.
    """
    own = Entries(entries, where)
    in_4, in_8 = own.flag("load_in_4bit"), own.flag("load_in_8bit")
    own.name("quantization", "load_in_8bit" if in_8 and not in_4 else "load_in_4bit")
    quantization: Quantized = "nf4" if in_4 else "int8" if in_8 else "none"
    peft = own.flag("use_peft", "adapter")
    precision = precision_of(own)
    old = own.text("torch_dtype", "float32", "weights_dtype" if "dtype" not in entries else None)
    dtype = dtype_of(own.text("dtype", old, "weights_dtype" if "torch_dtype" not in entries else None), "float32")
    targets = own.names("lora_target_modules", "target_modules")
    own.flag("use_liger_kernel"), own.text("loss_type")  # neither brings whole logits back: the head is fused always
    return Settings(
        tool="trl",
        model=own.model("model_name_or_path"),
        sequence_length=own.whole("max_length", own.whole("max_seq_length", 1024), "sequence_length"),
        micro_batch_size=own.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=own.flag("use_bnb_nested_quant") and in_4,
        weights_dtype=dtype,
        product_dtype="bfloat16" if dtype == "auto" else dtype,
        precision=precision,
        adapter=kind_of(own) if peft else "full",
        adapter_dtype=adapter_dtype(quantization),
        rank=own.whole("lora_r", 16, "rank") if peft else None,
        alpha=own.whole("lora_alpha", 32, "alpha") if peft else None,
        dropout=own.number("lora_dropout", 0.05, "dropout") if peft else 0.0,
        target_modules=() if targets == ("all-linear",) else targets or None,
        trained_whole=own.names("lora_modules_to_save", "trained_whole"),
        recomputes=recomputes(own, default=True),
        attention=own.text("attn_implementation", "sdpa", "attention"),
        loss="tiled",
        packing=packing_of(own),
        shards=own.has("fsdp", "fsdp_config", "deepspeed") or "",
        longest_first=groups(own),
        optimizer=own.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 2e-5, "learning_rate"),
        resumes_blindly=own.text("resume_from_checkpoint", "", "resumes_blindly").lower() == "true"
        if isinstance(entries.get("resume_from_checkpoint"), str)
        else own.flag("resume_from_checkpoint", "resumes_blindly"),
        keys={**own.keys, "weights_dtype": "torch_dtype" if "torch_dtype" in entries else "dtype"},
        values=own.values,
        ignored=own.unread(),
        misspelled=own.misspelled(),
    )


def precision_of(own: Entries) -> Precision:
    """TRL's own default is bf16, where fp16 is not wanted (its ``base_config.py``)."""
    fp16 = own.flag("fp16")
    bf16 = own.flag("bf16", default=not fp16)
    own.name("precision", "fp16" if fp16 else "bf16")
    return "fp16" if fp16 else "bf16" if bf16 else "fp32"


def adapter_dtype(quantization: Quantized) -> Dtype:
    """TRL makes the adapters of quantized models bf16 (its ``SFTTrainer.__init__``); PEFT has the others in fp32."""
    return "float32" if quantization == "none" else "bfloat16"


def kind_of(own: Entries) -> Adapter:
    """LoRA, by PEFT's flags."""
    return "dora" if own.flag("use_dora") else "rslora" if own.flag("use_rslora") else "lora"


def packing_of(own: Entries) -> Packing:
    """Apart, by the positions that transformers makes a mask of, unless documents are cut up (``wrapped``)."""
    strategy = own.text("packing_strategy", "bfd")
    if not own.flag("packing", "packing"):
        return "none"
    if strategy != "wrapped":
        return "separate"
    own.name("packing", "packing_strategy")
    return "leaking"


def recomputes(own: Entries, *, default: bool) -> bool:
    """Whether layers are computed again; transformers 5.23 has a new name for it."""
    new = own.flag("activation_checkpointing", "recomputes", default=default)
    if "recomputes" in own.values:
        return new
    return own.flag("gradient_checkpointing", "recomputes", default=default)


def groups(own: Entries) -> bool:
    """Whether sequences of like length come together, the longest first."""
    if own.flag("group_by_length", "longest_first"):
        return True
    return own.text("train_sampling_strategy", "", "longest_first") == "group_by_length"
