"""Run in Triton's interpreter by ``test_dequantizing``: whether the kernel's numbers are bitsandbytes'."""

from __future__ import annotations

import sys
from typing import Any

import torch

from shallowflow.runtime import dequantizing, nf4_kernel, quantized

SHAPES = ((96, 128), (3, 64), (40, 448), (1, 2048))


def main(dtype: torch.dtype) -> None:
    """Print one word for each shape, with constants in fp32 and in 8 bits."""
    for shape in SHAPES:
        for double_quantization in (False, True):
            torch.manual_seed(0)
            parent = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
            torch.nn.init.zeros_(parent.get_submodule("0").get_parameter("weight").data[0, :5])
            quantized.quantize_linears(parent, "nf4", dtype, double_quantization)
            module: Any = parent[0]
            state = module.weight.quant_state
            out = torch.full(shape, torch.nan, dtype=dtype)
            nf4_kernel.dequantize(module.weight.data, dequantizing._constants(state), state.code, state.blocksize, out)
            print(torch.equal(out, quantized.weight_of(module, dtype)))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
