"""Trainers that really run, on a CPU: ``transformers.Trainer`` and TRL's, with PEFT, on a model that is made up."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shallowflow.runtime import build, others
from shallowflow.runtime.meter import allocator_levels

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""Large enough that tensors, and not Python's own, are what its steps hold."""
NUM_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a trainer is given."""

    micro_batch_size: int = 2
    sequence_length: int = 128
    gradient_accumulation_steps: int = 1
    recomputes: bool = False
    adapter: bool = True
    optimizer: str = "adamw_torch"


def plain(work: Work, folder: str) -> Any:
    """``transformers.Trainer``."""
    from transformers import Trainer, TrainingArguments

    rows: Any = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in _rows(work)]
    with _unwarned():
        arguments = TrainingArguments(**_arguments(work, folder))
        return Trainer(model=_model(work), args=arguments, train_dataset=rows)


def sft(work: Work, folder: str) -> Any:
    """TRL's ``SFTTrainer``."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    table = InMemoryTable.from_pydict({"input_ids": _rows(work), "labels": _rows(work)})
    with _unwarned():
        arguments = SFTConfig(
            **_arguments(work, folder),
            max_length=work.sequence_length,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return SFTTrainer(
            model=_model(work),
            args=arguments,
            train_dataset=Dataset(table, fingerprint="made"),
            processing_class=others._tokenizer(),
        )


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without what other trainers say of names that will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rows(work: Work) -> list[list[int]]:
    count = NUM_STEPS * work.micro_batch_size * work.gradient_accumulation_steps
    return [[i % 7 for i in range(work.sequence_length)] for _ in range(count)]


def _arguments(work: Work, folder: str) -> dict[str, Any]:
    told = others.plain_arguments(folder, work.micro_batch_size, NUM_STEPS, recomputes=work.recomputes)
    steps = work.gradient_accumulation_steps
    return {**told, "gradient_accumulation_steps": steps, "optim": work.optimizer, "use_cpu": True}


def _model(work: Work) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = build.empty_model(build.transformers_config(CONFIG), "float32", "cpu", "sdpa")
    if not work.adapter:
        model.requires_grad_(requires_grad=True)
        return model
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=build.adapter_targets(model)))


Make = Callable[[Work, str], Any]


def peak_bytes(make: Make, work: Work) -> int:
    """The most that PyTorch's allocator held while the trainer trained, its model included."""
    made: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, _unwarned():
        levels = allocator_levels([lambda: made.append(make(work, folder)), lambda: made.pop().train()])
    return max(levels[1])
