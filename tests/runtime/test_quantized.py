"""Quantized layers are the same on ``meta`` as from real weights, and close to what they replace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from shallowflow.planner.quality import DOUBLE_QUANTIZATION_ERROR, WEIGHT_ERROR
from shallowflow.runtime import build, quantized
from shallowflow.runtime.quantized import CONSTANT_BLOCK, NF4_BLOCK
from tests.runtime import tiny

FORMATS = pytest.mark.parametrize(
    ("weight_format", "double"), [("nf4", False), ("nf4", True), ("int8", False)], ids=["nf4", "nf4 twice", "int8"]
)
KINDS = pytest.mark.parametrize("kind", ["linear", "biased", "conv1d"])


def layer_of(kind: str, num_in: int, num_out: int, device: str = "cpu") -> torch.nn.Sequential:
    """A layer that holds one linear module with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        if kind == "conv1d":
            module: torch.nn.Module = Conv1D(num_out, num_in)
            module.bias = torch.nn.Parameter(torch.randn(num_out))
        else:
            module = torch.nn.Linear(num_in, num_out, bias=kind == "biased")
    return torch.nn.Sequential(module).requires_grad_(False)


def quantize(layer: torch.nn.Module, weight_format: Any, double: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The one module of *layer*, quantized."""
    quantized.quantize_linears(layer, weight_format, dtype, double)
    return layer.get_submodule("0")


def storage(module: torch.nn.Module) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    """Every tensor that *module* holds, as dtype, shape and bytes."""
    held = [*module.parameters(), *module.buffers(), *quantized.constants(module)]
    return [(t.dtype, tuple(t.shape), t.nbytes) for t in held]


def dequantized(module: Any) -> torch.Tensor:
    """The weight matrix that *module* multiplies by."""
    if isinstance(module, quantized.bitsandbytes().nn.Linear4bit):
        whole = quantized.bitsandbytes().functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert isinstance(whole, torch.Tensor)
        return whole
    rows: torch.Tensor = module.weight.data.float() * module.weight.SCB[:, None] / 127
    return rows


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The size of the difference against the size of what was expected."""
    return float((found - expected).norm() / expected.norm())


@FORMATS
@KINDS
@settings(max_examples=25, deadline=None)
@given(num_in=st.integers(1, 300), num_out=st.integers(1, 90))
def test_meta_holds_what_real_weights_do(
    kind: str, weight_format: str, double: bool, num_in: int, num_out: int
) -> None:
    """On ``meta`` each tensor has the dtype, shape and bytes that quantizing real weights gives, constants included."""
    imagined = quantize(layer_of(kind, num_in, num_out, "meta"), weight_format, double)
    real = quantize(layer_of(kind, num_in, num_out), weight_format, double)

    assert storage(imagined) == storage(real)
    assert type(imagined) is type(real)
    assert all(t.is_meta for t in [*imagined.parameters(), *quantized.constants(imagined)])


@FORMATS
@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16", "float32"])
def test_a_model_on_meta_holds_what_a_real_one_does(weight_format: Any, double: bool, compute_dtype: str) -> None:
    """A whole model built on ``meta`` has the names, dtypes, shapes and constants of one on the CPU."""
    found = []
    for device in ("meta", "cpu"):
        model = build.load_model(
            tiny.CONFIG, weight_format, double_quantization=double, compute_dtype=compute_dtype, device=device
        )
        tensors = [*model.named_parameters(), *model.named_buffers()]
        tensors += [(name, t) for name, module in model.named_modules() for t in quantized.constants(module)]
        found.append([(name, t.dtype, t.shape) for name, t in tensors])

    assert found[0] == found[1]


@given(blocks=st.integers(1, 600), double=st.booleans())
@settings(max_examples=20, deadline=None)
def test_nf4_takes_half_a_byte_a_weight_and_its_constants(blocks: int, double: bool) -> None:
    """The bytes are those of the QLoRA paper's formula: half a byte a weight, and a constant for each 64 weights."""
    module = quantize(layer_of("linear", NF4_BLOCK, blocks, "meta"), "nf4", double)

    code = 16 * 4
    once = 4 * blocks + code
    second = -(-blocks // CONSTANT_BLOCK)
    twice = blocks + code + 4 + 4 * second + 256 * 4
    assert sum(t.nbytes for t in module.parameters()) == blocks * NF4_BLOCK // 2
    assert sum(t.nbytes for t in quantized.constants(module)) == (twice if double else once)


@given(num_in=st.integers(1, 300), num_out=st.integers(1, 90))
@settings(max_examples=20, deadline=None)
def test_int8_takes_a_byte_a_weight_and_a_scale_a_row(num_in: int, num_out: int) -> None:
    """The bytes are those of LLM.int8 without outliers: one for each weight, and a float for each row."""
    module = quantize(layer_of("linear", num_in, num_out, "meta"), "int8", False)

    assert sum(t.nbytes for t in module.parameters()) == num_in * num_out
    assert sum(t.nbytes for t in quantized.constants(module)) == 4 * num_out


@pytest.mark.parametrize(
    ("weight_format", "double", "slack"), [("nf4", False, 0.03), ("nf4", True, 0.03), ("int8", False, 0.1)]
)
def test_weights_err_by_what_the_planner_says(weight_format: Any, double: bool, slack: float) -> None:
    """Normal weights come back with the relative error that the planner states, int8's up to its rows' width."""
    layer = layer_of("linear", 4096, 64)
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    layer.get_submodule("0").weight = torch.nn.Parameter(weight, requires_grad=False)

    error = dequantized(quantize(layer, weight_format, double)) - weight

    assert float(error.norm() / weight.norm()) == pytest.approx(WEIGHT_ERROR[weight_format], rel=slack)


def test_double_quantization_errs_by_what_the_planner_says() -> None:
    """Normal weights' constants come back with the relative error that the planner states, and so do the weights."""
    layer = layer_of("linear", 4096, 256)
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    layer.get_submodule("0").weight = torch.nn.Parameter(weight, requires_grad=False)

    once, twice = (dequantized(quantize(copy.deepcopy(layer), "nf4", double)) for double in (False, True))

    assert float((twice - once).norm() / weight.norm()) == pytest.approx(DOUBLE_QUANTIZATION_ERROR, rel=0.03)


@FORMATS
@KINDS
def test_a_quantized_layer_computes_nearly_the_same(kind: str, weight_format: Any, double: bool) -> None:
    """Its output and the gradient of its input are those of the layer it replaces, up to the format's error."""
    layer = layer_of(kind, 128, 96)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = layer(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)

    quantize(layer, weight_format, double)
    found = layer(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)

    limit = 2 * WEIGHT_ERROR[weight_format]
    assert 0 < relative(found.detach(), expected.detach()) < limit
    assert relative(gradient, expected_gradient) < 2 * limit


def test_the_compute_dtype_goes_all_the_way() -> None:
    """From a bf16 checkpoint, planned for fp16, no bf16 is left: not in the bias, nor in the quantization state."""
    layer = layer_of("biased", 64, 64).to(torch.bfloat16)

    module = quantize(layer, "nf4", False, torch.float16)

    assert module.bias.dtype == module.weight.quant_state.dtype == module.compute_dtype == torch.float16
    assert layer(torch.ones(1, 64, dtype=torch.float16)).dtype == torch.float16


def test_constants_of_a_plain_module_are_none() -> None:
    """A module that is not quantized holds nothing beside its parameters."""
    assert quantized.constants(torch.nn.Linear(2, 2)) == []
