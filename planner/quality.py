"""How much a weight format changes the weights, what that is held to be worth, and which rank is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .plan import Objective
from .strategies import Strategy, WeightFormat
from .weighed import LayerErrors

WEIGHT_ERROR: dict[WeightFormat, float] = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0, "int8": 0.009, "nf4": 0.091}
"""Root-mean-square error relative to the weights' own, for normally distributed weights.

Follows from the formats' definitions: int8 with one scale per row (LLM.int8, Dettmers et al., 2022), nf4 with one per
64 weights (QLoRA, Dettmers et al., 2023); a test computes both. An order of harm, not a prediction of any loss.
"""
DOUBLE_QUANTIZATION_ERROR = 0.0021
"""What nf4's constants lose, relative to themselves, when they are quantized to 8 bits; a test computes it."""

HARM = 10**9
"""Units of harm in a squared relative error of one."""

WORTH: dict[Objective, float] = {"time": 0.02, "cost": 0.02, "quality": 100.0}
"""By how much of a step's time all layers in nf4 are held to be worse than all in 16 bits; a choice, not a measurement.

Small for ``time``, so that finer weights are taken where they cost next to nothing; so large for ``quality`` that a
format twice as fine is taken at any price.
"""

BITS_PER_TOKEN = 1.0
"""What there is to learn of a token: a loss of about 0.7 nats (LoRA Without Regret, Schulman et al., 2025)."""
BITS_PER_PARAMETER = 2.0
"""What a trained parameter holds (Physics of Language Models 3.3, Allen-Zhu and Li, 2024)."""
RANKS = (8, 16, 32, 64, 128)
"""LoRA ranks to choose from where none is fixed."""


def weight_error(strategy: Strategy, own: LayerErrors | None = None) -> float:
    """The relative error that *strategy* makes in a layer's weights, as a root mean square.

    That of the layer's *own* weights where it was measured, of normally distributed ones where not.
    """
    if own is not None and strategy.weight_format in ("int8", "nf4"):
        nf4 = own.double_quantized if strategy.double_quantization else own.nf4
        return nf4 if strategy.weight_format == "nf4" else own.int8
    extra = DOUBLE_QUANTIZATION_ERROR if strategy.double_quantization else 0.0
    return math.hypot(WEIGHT_ERROR[strategy.weight_format], extra)


def harm(strategy: Strategy, own: LayerErrors | None = None) -> int:
    """The squared relative error of one layer, in units of 1 / HARM.

    These add up over layers to what a model loses (the linearity theorem of Malinovskii et al., HIGGS, 2024).
    """
    return harm_of(weight_error(strategy, own))


def harm_of(error: float) -> int:
    """The harm of a layer whose weights have this relative *error*."""
    return round(error * error * HARM)


def most_harm(max_weight_error: float | None, num_layers: int) -> int | None:
    """What all layers may lose together where their relative error is bounded; None where it is not."""
    return None if max_weight_error is None else int(num_layers * harm_of(max_weight_error))


def is_within(error: float, max_weight_error: float | None) -> bool:
    """Whether a model's relative *error* is no more than it may be, as exactly as harm is counted."""
    return max_weight_error is None or error**2 <= max_weight_error**2 + 1 / HARM


def mean_error(strategies: Sequence[Strategy], own: Sequence[LayerErrors] = ()) -> float:
    """The relative error over all layers, as a root mean square; *own* are those measured, if any were."""
    errors: Sequence[LayerErrors | None] = own or [None] * len(strategies)
    squares = [weight_error(strategy, layer) ** 2 for strategy, layer in zip(strategies, errors, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def next_rank(rank: int) -> int | None:
    """The next larger one to choose; None after the largest."""
    return next((wider for wider in RANKS if wider > rank), None)


def enough_rank(total_tokens: int, parameters_per_rank: int, at_least: int, parameters_at_any_rank: int = 0) -> int:
    """The smallest of RANKS whose adapter can hold what *total_tokens* teach, and no less than *at_least*.

    A larger one learns no more (LoRA Without Regret); where none of them is enough, the largest.
    """
    needed = (total_tokens * BITS_PER_TOKEN / BITS_PER_PARAMETER - parameters_at_any_rank) / parameters_per_rank
    candidates = [rank for rank in RANKS if rank >= at_least] or [at_least]
    return next((rank for rank in candidates if rank >= needed), candidates[-1])
