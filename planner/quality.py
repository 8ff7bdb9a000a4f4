"""How much a weight format changes the weights."""

from __future__ import annotations

from .strategies import WeightFormat

WEIGHT_ERROR: dict[WeightFormat, float] = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0, "int8": 0.009, "nf4": 0.091}
"""Root-mean-square error relative to the weights' own, for normally distributed weights.

Follows from the formats' definitions: int8 with one scale per row (LLM.int8, Dettmers et al., 2022), nf4 with one per
64 weights (QLoRA, Dettmers et al., 2023); a test computes both. An order of harm, not a prediction of any loss.
"""
