"""TRL's YAML for ``trl sft --config`` and its Python scripts, read; a script for a T4, written.

A script, not a YAML: TRL makes the adapters of a quantized model bf16 (its ``SFTTrainer.__init__``), which an fp16
gradient scaler refuses, and only code can undo it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import Adapter, Dtype, Entries, Packing, Precision, Quantized, Settings, is_any

DISTINCT = (
    "model_name_or_path",
    "use_peft",
    "max_length",
    "load_in_4bit",
    "lora_target_modules",
    "dataset_name",
    "bnb_4bit_quant_type",
)
_WORDS: dict[str, Dtype] = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}


def read(entries: Mapping[str, Any], where: str) -> Settings:
    """*entries* as ``trl sft`` takes them, which loads weights in fp32 where nothing is said of their dtype.

    Raises:
        ConfigurationError: an entry is missing or of the wrong type.
    """
    own = Entries(entries, where)
    in_4, in_8 = own.flag("load_in_4bit", "quantization"), own.flag("load_in_8bit")
    quantization: Quantized = "nf4" if in_4 else "int8" if in_8 else "none"
    peft = own.flag("use_peft", "adapter")
    fp16, bf16 = own.flag("fp16"), own.flag("bf16", "precision", default=True)
    if "fp16" in entries and fp16:
        own.keys["precision"], own.values["precision"] = "fp16", "true"
    bf16 = bf16 if "bf16" in entries or not fp16 else False
    precision: Precision = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    word = own.text("dtype", own.text("torch_dtype", "float32"), "weights_dtype")
    dtype: Dtype = _WORDS.get(word, "bfloat16")  # "auto" is what the checkpoint has, for most models bf16
    adapter: Adapter = "dora" if own.flag("use_dora") else "rslora" if own.flag("use_rslora") else "lora"
    targets = own.names("lora_target_modules", "target_modules")
    attention = own.text("attn_implementation", "sdpa", "attention")
    loss = own.text("loss_type", "nll")
    liger = own.flag("use_liger_kernel")
    del loss, liger  # neither brings whole logits back: the head is fused in any case
    return Settings(
        tool="trl",
        model=own.text("model_name_or_path"),
        sequence_length=own.whole("max_length", own.whole("max_seq_length", 1024), "sequence_length"),
        micro_batch_size=own.whole("per_device_train_batch_size", 8, "micro_batch_size"),
        gradient_accumulation_steps=own.whole("gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        quantization=quantization,
        double_quantization=own.flag("use_bnb_nested_quant") and in_4,
        weights_dtype=dtype,
        product_dtype=dtype,
        precision=precision,
        adapter=adapter if peft else "full",
        adapter_dtype="bfloat16" if quantization != "none" else "float32",
        rank=own.whole("lora_r", 16, "rank") if peft else None,
        alpha=own.whole("lora_alpha", 32, "alpha") if peft else None,
        dropout=own.number("lora_dropout", 0.05, "dropout"),
        target_modules=() if targets == ("all-linear",) else targets or ("q_proj", "v_proj"),
        trained_whole=own.names("lora_modules_to_save", "trained_whole"),
        recomputes=own.flag("gradient_checkpointing", "recomputes", default=True),
        attention=attention,
        loss="tiled",
        packing=_packing(own, attention),
        longest_first=_groups(own),
        optimizer=own.text("optim", "adamw_torch_fused", "optimizer"),
        learning_rate=own.number("learning_rate", 2e-5, "learning_rate"),
        resumes_blindly=own.has("resume_from_checkpoint") is not None,
        keys={"resumes_blindly": "resume_from_checkpoint", **own.keys},
        values=own.values,
        ignored=own.unread(),
    )


def _packing(own: Entries, attention: str) -> Packing:
    if not own.flag("packing", "packing"):
        return "none"
    return "separate" if is_any(attention, ("flash", "flex")) else "leaking"


def _groups(own: Entries) -> bool:
    return own.flag("group_by_length", "longest_first") or own.text("train_sampling_strategy") == "group_by_length"
