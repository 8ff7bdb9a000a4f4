"""The planner's order of weight formats is what the formats do to weights."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from shallowflow.planner.quality import WEIGHT_ERROR
from shallowflow.planner.strategies import WeightFormat
from shallowflow.runtime.quantized import NF4_BLOCK, bitsandbytes

ROWS, WIDTH = 256, 4096


def relative_error(weight: torch.Tensor, stored: torch.Tensor) -> float:
    """Root mean square of what storing changed, over that of the weights."""
    return float((stored.float() - weight).square().mean().sqrt() / weight.square().mean().sqrt())


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_the_errors_are_those_of_the_formats(scale: float) -> None:
    """Normal weights, stored and read back by bitsandbytes, err by what the table says within a tenth."""
    functional = bitsandbytes().functional
    weight = scale * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))

    rows, maxima, _ = functional.int8_vectorwise_quant(weight.half())
    packed, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)

    int8 = relative_error(weight, rows.float() * maxima[:, None] / 127)
    nf4 = relative_error(weight, functional.dequantize_4bit(packed, state))
    assert int8 == pytest.approx(WEIGHT_ERROR["int8"], rel=0.1)
    assert nf4 == pytest.approx(WEIGHT_ERROR["nf4"], rel=0.1)


def test_every_format_has_an_error_and_only_quantized_ones_have_any() -> None:
    """Storing weights in the dtype they are computed in changes nothing."""
    assert set(WEIGHT_ERROR) == set(get_args(WeightFormat))
    assert {name for name, error in WEIGHT_ERROR.items() if error} == {"int8", "nf4"}
    assert WEIGHT_ERROR["int8"] < WEIGHT_ERROR["nf4"]
