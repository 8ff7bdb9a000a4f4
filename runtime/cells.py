"""What is validated on a device: training steps of shipped models with random weights, as functions of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shallowflow.planner.strategies import Activations, Optimizer, Strategy, WeightFormat
from shallowflow.profiles.load import load_model

from . import activations, attention, build, optimizers, quantized
from .loss import chunked
from .precision import LossScale
from .step import LEARNING_RATE, MicroBatch, StepOutcome, Trainee

T4_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Attention = Literal["sdpa", "eager"]
Recompute = Literal["none", "some", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One configuration to predict and then to measure.

    Attributes:
        recompute: no layer, every second layer, or all.
        attention: ``sdpa`` with expanded KV heads, or ``eager``.
        chunk_tokens: of the loss; None computes all logits at once.
        num_layers: None for the model's own.
    """

    model: str
    weight_format: WeightFormat = "fp16"
    recompute: Recompute = "none"
    attention: Attention = "sdpa"
    chunk_tokens: int | None = None
    optimizer: Optimizer = "adamw"
    micro_batch_size: int = 1
    sequence_length: int = 512
    rank: int = 16
    num_layers: int | None = None

    @property
    def num_tokens(self) -> int:
        """Per step."""
        return self.micro_batch_size * self.sequence_length

    def strategies(self, num_layers: int) -> list[Strategy]:
        """One per layer."""
        stride = {"none": num_layers + 1, "some": 2, "all": 1}[self.recompute]
        policies: list[Activations] = ["save" if (i + 1) % stride else "recompute" for i in range(num_layers)]
        return [Strategy(weight_format=self.weight_format, activations=policy) for policy in policies]


SMALL = (
    Cell(model="SmolLM2-135M", weight_format="fp32", num_layers=2, sequence_length=64),
    Cell(
        model="SmolLM2-135M",
        weight_format="nf4",
        recompute="some",
        num_layers=2,
        micro_batch_size=2,
        sequence_length=32,
        chunk_tokens=16,
    ),
    Cell(model="SmolLM2-135M", weight_format="int8", recompute="all", num_layers=2, sequence_length=64),
    Cell(model="SmolLM2-135M", weight_format="fp32", attention="eager", num_layers=2, sequence_length=64),
    Cell(model="SmolLM2-135M", weight_format="nf4", optimizer="adamw8bit", num_layers=2, sequence_length=64, rank=64),
)
"""For a CPU: two layers of a small model, each option once."""


def full_grid() -> tuple[Cell, ...]:
    """For a GPU under a T4's rules, the most telling first, so that a slow device measures those."""
    shapes = ((1, 512), (4, 512), (2, 1024))
    formats: tuple[WeightFormat, ...] = ("fp16", "int8", "nf4")
    ends: tuple[Recompute, ...] = ("none", "all")
    small = [
        Cell(model="SmolLM2-135M", weight_format=w, micro_batch_size=b, sequence_length=s, recompute=r)
        for (b, s), w, r in product(shapes, formats, ends)
    ]
    chosen: tuple[tuple[str, tuple[int, int], WeightFormat, Recompute], ...] = (
        ("Qwen2.5-0.5B", (2, 512), "fp16", "some"),
        ("Qwen2.5-0.5B", (4, 512), "nf4", "all"),
        ("Llama-3.2-1B", (2, 512), "fp16", "none"),
        ("Llama-3.2-1B", (2, 1024), "nf4", "some"),
        ("Llama-3.2-1B", (2, 512), "int8", "all"),
        ("SmolLM2-1.7B", (2, 1024), "fp16", "all"),
        ("SmolLM2-1.7B", (1, 1024), "int8", "none"),
    )
    middle = [
        Cell(model=model, weight_format=w, micro_batch_size=b, sequence_length=s, recompute=r)
        for model, (b, s), w, r in chosen
    ]
    options = [
        Cell(model="SmolLM2-135M", attention="eager", micro_batch_size=2, sequence_length=512),
        Cell(model="Llama-3.2-1B", attention="eager", recompute="all", micro_batch_size=1, sequence_length=1024),
        Cell(model="SmolLM2-135M", chunk_tokens=256, micro_batch_size=4, sequence_length=512),
        Cell(model="Llama-3.2-1B", weight_format="nf4", recompute="all", chunk_tokens=512, sequence_length=1024),
        Cell(model="SmolLM2-135M", optimizer="adamw8bit", rank=64, micro_batch_size=4),
        Cell(model="Llama-3.2-1B", weight_format="nf4", optimizer="adamw8bit", rank=64, recompute="all"),
    ]
    large = [
        Cell(model="Llama-3.1-8B", weight_format="nf4", recompute="all", sequence_length=s, chunk_tokens=c)
        for s, c in ((512, None), (1024, None), (2048, 512))
    ]
    largest = [Cell(model="Qwen3-14B", weight_format="nf4", recompute="all", sequence_length=256, chunk_tokens=256)]
    return (*small[::2], *options, *large, *middle, *largest, *small[1::2])


BOUNDARIES = (
    Cell(model="SmolLM2-135M", weight_format="fp16", sequence_length=1024),
    Cell(model="SmolLM2-1.7B", weight_format="fp16", recompute="all", sequence_length=1024),
    Cell(model="Llama-3.2-1B", weight_format="nf4", recompute="all", sequence_length=1024),
    Cell(model="Llama-3.1-8B", weight_format="nf4", recompute="all", sequence_length=512),
)
"""Where the largest micro-batch that fits is predicted, then tried."""


def step_of(cell: Cell, compute_dtype: str) -> Callable[[str], Callable[[], StepOutcome]]:
    """A ``make_step(device)`` of *cell*, for ``simulate``, and for a device.

    In fp16 it computes as a T4 does: of the kernels of attention it takes the memory-efficient one, where that can.
    """

    def make_step(device: str) -> Callable[[], StepOutcome]:
        trainee = _trainee(cell, compute_dtype, device)
        tokens = torch.zeros((cell.micro_batch_size, cell.sequence_length), dtype=torch.int64, device=device)
        batch = MicroBatch(tokens, torch.zeros_like(tokens), cell.num_tokens)

        def step() -> StepOutcome:
            with sdpa_kernel(T4_KERNELS) if compute_dtype == "float16" else contextlib.nullcontext():
                return trainee.step([batch])

        return step

    return make_step


@dataclass(slots=True)
class _ChunkedTrainee(Trainee):
    chunk_tokens: int = 512

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        return chunked(self.model, batch.input_ids, batch.labels, self.chunk_tokens)


def _trainee(cell: Cell, compute_dtype: str, device: str) -> Trainee:
    model = random_model(cell, compute_dtype, device)
    layers = build.decoder_layers(model)
    activations.apply_policies(model, layers, cell.strategies(len(layers)))
    adapted = build.add_adapters(model, cell.rank, 2 * cell.rank)
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = optimizers.make(cell.optimizer, parameters, LEARNING_RATE)
    scale = LossScale.for_dtype(compute_dtype)
    if cell.chunk_tokens:
        return _ChunkedTrainee(adapted, layers, optimizer, scale, parameters, cell.chunk_tokens)
    return Trainee(adapted, layers, optimizer, scale, parameters)


def random_model(cell: Cell, compute_dtype: str, device: str) -> Any:
    """The base model of *cell* with random weights, built layer by layer, so that it is never there unquantized."""
    facts = dict(load_model(cell.model).config)
    config = build.transformers_config(facts, cell.num_layers)
    num_layers = config.num_hidden_layers
    chosen = "eager" if cell.attention == "eager" else attention.best_for(config)
    model: Any = build.empty_model(build.transformers_config(facts, 1), compute_dtype, device, chosen)
    holder = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 1)
    kind = type(holder[0])
    _deepen(model.config, config)
    dtype = build.DTYPES[compute_dtype]
    for index in range(num_layers):
        layer = holder[0] if index == 0 else _new_layer(kind, model.config, index, dtype, device)
        if cell.weight_format in ("int8", "nf4"):
            quantized.quantize_linears(layer, cell.weight_format, dtype, double_quantization=False)
        if index:
            holder.append(layer)
    model.requires_grad_(False)
    return model


def _deepen(config: Any, wanted: Any) -> None:
    """Give the model's own configuration object, which its parts share, the depth of *wanted*."""
    for key in ("layer_types", "num_hidden_layers"):
        if hasattr(wanted, key):
            setattr(config, key, getattr(wanted, key))


def _new_layer(kind: Any, config: Any, index: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: torch.nn.Module = kind(config, index)
    finally:
        torch.set_default_dtype(default)
    return made.requires_grad_(False)
