"""A trainer that is about to run: what it was made with, and whether that will do on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from shallowflow.profiles import GpuSpec, ModelSpec, load_gpu
from shallowflow.runtime import build

from .check import Verdict
from .check import check as check_settings
from .settings import Adapter, ConfigurationError, Dtype, Packing, Precision, Quantized, Settings, Tool

NUM_ROWS = 1000
"""Of the data, whose longest is taken for the longest there is, where the trainer itself has no limit."""
_DTYPES: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in build.DTYPES.items()}  # type: ignore[misc]


def check(trainer: Any, gpu: GpuSpec | str = "t4", *, sequence_length: int | None = None) -> Verdict:
    """Say whether *trainer*, a ``transformers.Trainer`` or one of TRL's, will do on *gpu*, before it runs.

    The trainer's own step is simulated: its model, adapter, precision, batch, loss and optimizer. Nothing of it is
    changed or run.

    Args:
        sequence_length: tokens of the longest sequence; None for the trainer's own limit, or its longest row.

    Raises:
        FactsError: no GPU is called so.
        ConfigurationError: the length of its sequences cannot be told.
    """
    device = load_gpu(gpu) if isinstance(gpu, str) else gpu
    settings = settings_of(trainer, sequence_length)
    base = build.without_adapter(trainer.model)
    facts = base.config.to_dict()
    facts.pop("quantization_config", None)
    count = sum(p.numel() for p in build.empty_model(build.transformers_config(facts), "float16", "meta").parameters())
    return check_settings(settings, ModelSpec(name=settings.model, config=facts, num_parameters=count), device)


def settings_of(trainer: Any, sequence_length: int | None = None) -> Settings:
    """What *trainer* was made with."""
    arguments, model = trainer.args, trainer.model
    base = build.without_adapter(model)
    tool: Tool = "trl" if type(trainer).__module__.startswith("trl.") else "transformers"
    quantization, product, twice = _quantized(base)
    precision: Precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "fp32"
    lora = next(iter(getattr(model, "peft_config", {}).values()), None)
    learning = [p for p in model.parameters() if p.requires_grad]
    attention = str(getattr(base.config, "_attn_implementation", "sdpa"))
    weights = _dtype(base.get_input_embeddings().weight.dtype)
    return Settings(
        tool=tool,
        model=str(getattr(base.config, "name_or_path", "") or type(base).__name__),
        sequence_length=sequence_length or _longest(trainer),
        micro_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        quantization=quantization,
        double_quantization=twice,
        weights_dtype=weights,
        product_dtype=product or weights,
        precision=precision,
        adapter=_adapter(lora),
        adapter_dtype=_dtype(learning[0].dtype) if learning else "float32",
        rank=None if lora is None else lora.r,
        alpha=None if lora is None else lora.lora_alpha,
        dropout=0.0 if lora is None else lora.lora_dropout,
        target_modules=() if lora is None else tuple(sorted(_named(lora.target_modules))),
        trained_whole=tuple(getattr(lora, "modules_to_save", None) or ()),
        recomputes=bool(arguments.gradient_checkpointing),
        attention=attention,
        loss="tiled" if tool == "trl" else "fused" if getattr(arguments, "use_liger_kernel", False) else "whole",
        packing=_packing(arguments),
        longest_first=getattr(arguments, "train_sampling_strategy", "random") == "group_by_length"
        or bool(getattr(arguments, "group_by_length", False)),
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        learning_rate=arguments.learning_rate,
        keys={
            "precision": "bf16",
            "attention": "attn_implementation",
            "weights_dtype": "dtype",
            "micro_batch_size": "per_device_train_batch_size",
            "longest_first": "train_sampling_strategy",
        },
        values={"precision": str(bool(arguments.bf16)).lower(), "attention": attention, "weights_dtype": weights},
    )


def _dtype(dtype: torch.dtype) -> Dtype:
    return _DTYPES.get(dtype, "float32")


def _named(modules: Any) -> tuple[str, ...]:
    return (modules,) if isinstance(modules, str) else tuple(modules or ())


def _adapter(lora: Any) -> Adapter:
    if lora is None:
        return "full"
    return "dora" if getattr(lora, "use_dora", False) else "rslora" if getattr(lora, "use_rslora", False) else "lora"


def _quantized(base: torch.nn.Module) -> tuple[Quantized, Dtype | None, bool]:
    """The format of the base, what it is multiplied in, and whether its constants are quantized."""
    for module in base.modules():
        name = type(module).__name__
        if name == "Linear4bit":
            own: Any = module
            return "nf4", _dtype(own.compute_dtype or torch.float32), bool(own.weight.compress_statistics)
        if name == "Linear8bitLt":
            return "int8", None, False
    return "none", None, False


def _packing(arguments: Any) -> Packing:
    if not getattr(arguments, "packing", False):
        return "none"
    return "leaking" if getattr(arguments, "packing_strategy", "bfd") == "wrapped" else "separate"


def _longest(trainer: Any) -> int:
    limit = getattr(trainer.args, "max_length", None)
    if isinstance(limit, int) and limit > 0:
        return limit
    data = getattr(trainer, "train_dataset", None)
    rows = [] if data is None else itertools.islice(iter(data), NUM_ROWS)
    lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
    if not lengths:
        raise ConfigurationError(
            "the length of the trainer's sequences is not known: its rows have no input_ids; give sequence_length"
        )
    return max(lengths)
