"""Scripts for trainers whose settings need code on a T4: TRL and Unsloth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shallowflow.runtime.documents import Format

from . import rows
from .settings import Settings

_REPEATED = '''
def repeated_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
    """PyTorch's attention with as many KV heads as query heads: the only fused kernel of a T4 takes no fewer."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = attention_mask is None and query.shape[2] > 1 and is_causal is not False
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register("repeated_sdpa", repeated_sdpa)
AttentionMaskInterface.register("repeated_sdpa", sdpa_mask)
'''

_IN_FP32 = """
# TRL makes the adapters of quantized models bf16, whose gradients an fp16 loss scale does not take.
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
"""

_SCALE = """
# PyTorch's loss scale begins at 65536, which the first updates overflow.
if trainer.accelerator.scaler is not None:
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=500)
"""


def trl(settings: Settings, data: Path, data_format: Format, seed: int) -> str:
    """A script that trains *settings* on the rows of *data* with TRL's ``SFTTrainer``; on a CPU it runs in fp32."""
    dtype = settings.weights_dtype
    bits = {
        "none": "",
        "int8": "quantization_config=BitsAndBytesConfig(load_in_8bit=True),",
        "nf4": (
            'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={settings.double_quantization}, bnb_4bit_compute_dtype=dtype),"
        ),
    }[settings.quantization]
    repeats = settings.attention == "repeated_sdpa"
    lines = [
        "import torch",
        "from datasets import load_dataset",
        *([] if settings.adapter == "full" else ["from peft import LoraConfig"]),
        f"from transformers import {'AttentionInterface, AttentionMaskInterface, ' if repeats else ''}"
        f"AutoModelForCausalLM{', BitsAndBytesConfig' if bits else ''}",
        *(["from transformers.masking_utils import sdpa_mask"] if repeats else []),
        "from trl import SFTConfig, SFTTrainer",
        "",
        "on_gpu = torch.cuda.is_available()",
        f"dtype = torch.{dtype} if on_gpu else torch.float32",
        *(_REPEATED.split("\n") if repeats else []),
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {settings.model!r},",
        "    dtype=dtype,",
        f"    attn_implementation={settings.attention!r},",
        *([f"    {bits}"] if bits else []),
        ")",
        *_arguments("arguments = SFTConfig", _shared(settings, seed) | {"max_length": settings.sequence_length}),
        *([] if settings.adapter == "full" else _arguments("adapter = LoraConfig", _lora(settings))),
        *rows.for_trl(data, data_format),
        "trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows"
        + ("" if settings.adapter == "full" else ", peft_config=adapter")
        + ")",
        *(_IN_FP32.split("\n") if settings.quantization != "none" and settings.precision == "fp16" else [""]),
        *(_SCALE.strip("\n").split("\n") if settings.precision == "fp16" else []),
        "trainer.train()",
        'trainer.save_model("run")',
    ]
    return "\n".join(lines) + "\n"


def unsloth(settings: Settings, data: Path, data_format: Format, seed: int, modules: Sequence[str]) -> str:
    """A script that trains *settings* on the rows of *data* with Unsloth; it needs a GPU."""
    lora = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(settings.target_modules or modules),
        "use_rslora": settings.adapter == "rslora",
        "use_gradient_checkpointing": "unsloth" if settings.recomputes else False,
        "random_state": seed,
        **({"use_dora": True} if settings.adapter == "dora" else {}),
    }
    load: dict[str, Any] = {
        "model_name": settings.model,
        "max_seq_length": settings.sequence_length,
        "load_in_4bit": settings.quantization == "nf4",
        "load_in_8bit": settings.quantization == "int8",
        "full_finetuning": settings.adapter == "full",
    }
    arguments = {
        **_shared(settings, seed),
        "max_length": settings.sequence_length,
        "packing": settings.packing == "separate",
    }
    arguments.pop("gradient_checkpointing")
    arguments.pop("gradient_checkpointing_kwargs", None)
    lines = [
        "import unsloth  # before all that it changes",
        "import torch",
        "from datasets import load_dataset",
        "from trl import SFTConfig, SFTTrainer",
        "from unsloth import FastLanguageModel",
        "",
        "on_gpu = torch.cuda.is_available()",
        *_arguments(
            "model, tokenizer = FastLanguageModel.from_pretrained", load, [f"dtype=torch.{settings.weights_dtype}"]
        ),
        *(
            []
            if settings.adapter == "full"
            else _arguments("model = FastLanguageModel.get_peft_model", lora, ["model"])
        ),
        *_arguments("arguments = SFTConfig", arguments),
        *rows.for_trl(data, data_format),
        "trainer = SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=rows)",
        "trainer.train()",
        'model.save_pretrained("run")',
    ]
    return "\n".join(lines) + "\n"


class _Code(str):
    """Written as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _shared(settings: Settings, seed: int) -> dict[str, Any]:
    """Of transformers' ``TrainingArguments``."""
    made: dict[str, Any] = {
        "output_dir": "run",
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_train_epochs": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "fp16": _Code("on_gpu") if settings.precision == "fp16" else False,
        "bf16": _Code("on_gpu") if settings.precision == "bf16" else False,
        "gradient_checkpointing": settings.recomputes,
        "optim": settings.optimizer,
        "packing": settings.packing == "separate",
        "train_sampling_strategy": "group_by_length" if settings.longest_first else "random",
        "seed": seed,
        "report_to": "none",
    }
    if settings.recomputes:
        made["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return made


def _lora(settings: Settings) -> dict[str, Any]:
    return {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(settings.target_modules or ()) or "all-linear",
        "use_rslora": settings.adapter == "rslora",
        "use_dora": settings.adapter == "dora",
        "task_type": "CAUSAL_LM",
    }


def _arguments(call: str, given: dict[str, Any], first: Sequence[str] = ()) -> list[str]:
    return [f"{call}(", *(f"    {one}," for one in first), *(f"    {k}={v!r}," for k, v in given.items()), ")"]
