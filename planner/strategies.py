"""What can be done to one layer, and to a whole model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from .bounds import Meta
from .schedule import MOST_PARTS

WeightFormat = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
Activations = Literal[
    "save",
    "recompute attention",
    "recompute attention reusing weights",
    "recompute mlp",
    "recompute mlp reusing weights",
    "recompute",
    "recompute reusing weights",
    "offload",
]
Adapter = Literal["lora", "rslora", "dora"]
Method = Literal["lora", "rslora", "dora", "full"]
"""What learns: an adapter of some kind, or, in full fine-tuning, every weight."""
Optimizer = Literal["adamw", "adamw8bit"]
Sharding = Literal["none", "weights"]
"""What of the model each GPU has only its part of: nothing, or the frozen weights.

``weights`` is ZeRO-3's treatment of what fills the memory, and FSDP2's ``reshard_after_forward=True``: what is gathered
for a pass is let go of at once. FSDP2's ``False`` would hold all of it from the forward to the backward pass, at the
peak as much as ``none`` does and the parts besides, so it is not offered. ZeRO-2, which shares gradients and the
optimizer's state, saves nothing of a frozen base, and an adapter's are whole everywhere.
"""
MODULE_NAME = r"^\w+(\.\w+)*$"
Name = Annotated[str, Meta(pattern=MODULE_NAME, max_length=200)]
TargetGroup = Literal["all-linear", "attention"]
TargetModules = TargetGroup | Annotated[tuple[Name, ...], Meta(min_length=1)]
"""Which linear modules of the decoder layers learn: all, those in attention, or those whose names end like these."""
Positive = Annotated[int, Meta(ge=1)]
Parts = Annotated[int, Meta(ge=1, le=MOST_PARTS)]
"""Of a stage."""
PARTIAL: tuple[Activations, ...] = (
    "recompute attention",
    "recompute attention reusing weights",
    "recompute mlp",
    "recompute mlp reusing weights",
)
"""Policies that need a module of their own in each layer, which some architectures lack."""
_REUSING = " reusing weights"
MOST_LAYERS = 10_000
MOST_TOKENS = 2**24
MOST_RANK = 2**16
MOST_SEQUENCES = 2**16
"""Bounds of what a request or a plan file may say; far beyond any model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """What is done to one layer: how its weights are stored and what becomes of its activations.

    Attributes:
        activations: ``recompute`` means the whole layer's, ``recompute attention`` and ``recompute mlp`` those inside
            that module, and ``reusing weights`` that what was dequantized for it is kept until its backward pass has
            used it; ``offload`` means held in host memory from the forward to the backward pass.
        double_quantization: nf4's constants are quantized, too (the QLoRA paper's section 3).
    """

    weight_format: WeightFormat
    activations: Activations
    double_quantization: bool = False

    @property
    def reuses_weights(self) -> bool:
        """Whether weights that were made to recompute activations are kept for the backward pass."""
        return self.activations.endswith(_REUSING)

    @property
    def recomputes(self) -> str:
        """What is computed again: ``recompute``, ``recompute attention``, ``recompute mlp``, or nothing."""
        return self.activations.removesuffix(_REUSING) if self.activations.startswith("recompute") else ""

    def __str__(self) -> str:
        twice = " double-quantized" if self.double_quantization else ""
        what = self.activations if " " in self.activations else f"{self.activations} activations"
        return f"{self.weight_format}{twice}, {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRun:
    """The same strategy for consecutive layers: from *first* up to and including *last*."""

    first: Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
    last: Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
    strategy: Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way to train: every decision that memory and time depend on.

    Attributes:
        layers: strategies of all decoder layers, in order and without gaps.
        rank, alpha: of LoRA; None where every weight learns.
        adapter: ``rslora`` divides alpha by the root of the rank, not by the rank (Kalajdzievski, 2023); ``dora``
            learns the length of each row of the weights apart from its direction (Liu et al., 2024); ``full`` is none.
        target_modules: that have an adapter; None where every weight learns.
        micro_batch_size: sequences per forward pass.
        gradient_accumulation_steps: micro-batches per optimizer update and replica.
        num_gpus: all of them.
        sharding: what of the model each of them has only its part of.
        loss_chunks: parts into which a micro-batch's tokens are divided for the head and the loss.
        packing: several documents to a sequence, none of which sees another.
        optimizer: ``adamw8bit`` keeps its two moments in 8 bits (Dettmers et al., 2022).
        stages: the first layer of each pipeline stage, ascending from 0; one stage is a model on one GPU. Each stage is
            as many times on GPUs as there are replicas.
        parts_per_stage: with more than one, stages are interleaved: the model is cut into as many parts of as many
            layers as there are stages times these, and each stage has every so many-th of them.
    """

    layers: tuple[StrategyRun, ...]
    rank: Annotated[int, Meta(ge=1, le=MOST_RANK)] | None
    alpha: Positive | None
    sequence_length: Annotated[int, Meta(ge=2, le=MOST_TOKENS)]
    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    num_gpus: Positive = 1
    loss_chunks: Positive = 1
    packing: bool = False
    adapter: Method = "lora"
    optimizer: Optimizer = "adamw"
    target_modules: TargetModules | None = "all-linear"
    sharding: Sharding = "none"
    stages: Annotated[tuple[Annotated[int, Meta(ge=0, le=MOST_LAYERS)], ...], Meta(min_length=1)] = (0,)
    parts_per_stage: Parts = 1

    @property
    def scaling(self) -> float:
        """What the adapter's product is multiplied by."""
        assert self.alpha is not None and self.rank is not None
        return self.alpha / (math.sqrt(self.rank) if self.adapter == "rslora" else self.rank)

    @property
    def is_full(self) -> bool:
        """Whether every weight learns, and there is no adapter."""
        return self.adapter == "full"

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer update over all GPUs."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_replicas

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into, one after the other."""
        return len(self.stages)

    @property
    def num_replicas(self) -> int:
        """Groups of GPUs that each hold a whole model, and share the micro-batches of a step."""
        return self.num_gpus // self.num_stages

    def parts_of(self, stage: int) -> tuple[range, ...]:
        """The numbers of the layers of each part of a *stage*."""
        if self.parts_per_stage == 1:
            return (range(self.stages[stage], [*self.stages[1:], self.num_layers][stage]),)
        number = self.num_stages * self.parts_per_stage
        each = self.num_layers // number
        return tuple(range(part * each, (part + 1) * each) for part in range(stage, number, self.num_stages))

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """The numbers of the layers of a *stage*."""
        return tuple(itertools.chain.from_iterable(self.parts_of(stage)))

    @property
    def cell(self) -> Cell:
        """The decisions that hold for all layers."""
        return Cell(
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            rank=self.rank,
            loss_chunks=self.loss_chunks,
            optimizer=self.optimizer,
            sharding=self.sharding,
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.layers[-1].last + 1 if self.layers else 0

    def strategies(self) -> tuple[Strategy, ...]:
        """One strategy per layer."""
        return tuple(run.strategy for run in self.layers for _ in range(run.first, run.last + 1))


TRACED_MICRO_BATCHES = 2
"""Of a whole model's step: the second is like all later ones."""
TRACED_ROUNDS = 3
"""Of as many micro-batches as interleaved stages: by the third, each part has had as many in flight as it ever has."""


def traced_micro_batches(configuration: Configuration, stage: int = 0) -> int:
    """Micro-batches of a step that show all that a step of *stage* takes, but for ``untraced_messages``.

    Those in flight at once, and one more: by then gradients are there. Of interleaved stages they come in rounds.
    """
    if configuration.parts_per_stage > 1:
        return min(configuration.gradient_accumulation_steps, TRACED_ROUNDS * configuration.num_stages)
    in_flight = configuration.num_stages - stage
    return min(configuration.gradient_accumulation_steps, max(TRACED_MICRO_BATCHES, in_flight + 1))


def untraced_messages(configuration: Configuration, stage: int, num_traced: int) -> int:
    """Messages that a *stage* holds at its peak and in no step of *num_traced* micro-batches.

    What was sent last before the first backward pass is let go of once its own gradient has come, by when all that were
    in flight with the first micro-batch are through.
    """
    if configuration.parts_per_stage > 1:  # which let go of what was sent once they send again
        return 0
    last = 2 * (configuration.num_stages - stage) - 1
    return int(num_traced < last <= configuration.gradient_accumulation_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The decisions that hold for all layers; *rank* is None where every weight learns."""

    micro_batch_size: Positive
    gradient_accumulation_steps: Positive
    rank: Positive | None
    loss_chunks: Positive
    optimizer: Optimizer = "adamw"
    sharding: Sharding = "none"


def uniform(strategy: Strategy, num_layers: int) -> tuple[StrategyRun, ...]:
    """The same *strategy* for every layer."""
    return (StrategyRun(first=0, last=num_layers - 1, strategy=strategy),)
