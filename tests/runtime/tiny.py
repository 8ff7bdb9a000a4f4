"""A model small enough to train within a test: three Llama layers, random weights, one token per byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shallowflow.planner.strategies import Activations, Adapter, Configuration, Strategy, WeightFormat, uniform
from shallowflow.runtime import build
from shallowflow.runtime.batches import Window
from shallowflow.runtime.loss import IGNORED_LABEL
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee

NUM_LAYERS = 3
VOCABULARY = 300
END = 256
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": END,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")
PLANNED_FORMATS = ("fp16", "int8", "nf4")
LINES = [f"the cat number {i % 4} sat on the mat and looked at the dog. " * 2 for i in range(24)]
"""Text that repeats itself, so that a few steps learn something."""


def base(compute_dtype: str = "float32", **changes: Any) -> PreTrainedModel:
    """The model with random weights on the CPU, always the same ones."""
    torch.manual_seed(0)
    return build.empty_model(build.transformers_config({**CONFIG, **changes}), compute_dtype, "cpu")


def configuration(
    weight_format: WeightFormat = "fp32", activations: Activations = "save", num_layers: int = NUM_LAYERS
) -> Configuration:
    """One strategy for every layer, LoRA of rank 4."""
    return Configuration(
        layers=uniform(Strategy(weight_format=weight_format, activations=activations), num_layers),
        rank=4,
        alpha=8,
        sequence_length=16,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
    )


def trainee(
    weight_format: WeightFormat = "fp32",
    activations: Activations = "save",
    compute_dtype: str = "float32",
    adapter: Adapter = "lora",
) -> Trainee:
    """The model ready to train, with an adapter whose two halves are both random, so that all gradients flow."""
    chosen = replace(configuration(weight_format, activations), adapter=adapter)
    made = make_trainee(base(compute_dtype), chosen, compute_dtype, CPU)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters:
            if parameter.dim() > 1:  # not a row's length, which stays that of the base
                parameter.normal_(std=0.05)
    return made


def random_batch(num_targets: Sequence[int], length: int = 16, seed: int = 0) -> MicroBatch:
    """Random tokens, one row per entry of *num_targets*, which says how many positions are learned."""
    maker = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, VOCABULARY, (len(num_targets), length), generator=maker) for _ in range(2))
    for row, count in zip(labels, num_targets, strict=True):
        row[count:] = IGNORED_LABEL
    return MicroBatch(tokens, labels, sum(num_targets))


def window(tokens: Sequence[int], length: int = 16) -> Window:
    """*tokens* as the one window of a document, padded to *length*."""
    missing = length - len(tokens) + 1
    return Window(
        input_ids=(*tokens[:-1], *[END] * missing),
        labels=(*tokens[1:], *[IGNORED_LABEL] * missing),
        num_targets=len(tokens) - 1,
    )


def save(folder: Path, config: Mapping[str, Any] = CONFIG, **changes: Any) -> Path:
    """Write the model with its tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    build.empty_model(build.transformers_config({**config, **changes}), "float32", "cpu").save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|end|>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder
