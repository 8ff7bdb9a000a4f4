"""bitsandbytes weights in place of linear layers: made from real weights, or just their shapes on ``meta``."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

NF4_BLOCK = 64
"""Weights that share one constant: bitsandbytes' default for nf4, as in the QLoRA paper."""

CONSTANT_BLOCK = 256
"""Constants that share one second-level constant under double quantization."""


def bitsandbytes() -> Any:
    """The library, imported only where something is quantized and without its talk of kernels that it lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    return bnb


def is_linear(module: torch.nn.Module) -> bool:
    """Whether *module* multiplies by a weight matrix: a Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, (torch.nn.Linear, Conv1D))


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether *module* is one of bitsandbytes'."""
    return type(module).__module__.startswith("bitsandbytes.")


def quantize_linears(
    layer: torch.nn.Module, weight_format: Literal["int8", "nf4"], dtype: torch.dtype, double_quantization: bool
) -> None:
    """Replace every linear module inside *layer* by its quantized counterpart, on the device that it is on."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child):
                setattr(parent, name, _quantize(child, weight_format, dtype, double_quantization))


def _quantize(
    linear: torch.nn.Module, weight_format: Literal["int8", "nf4"], dtype: torch.dtype, double_quantization: bool
) -> torch.nn.Module:
    weight = linear.weight.data.t().contiguous() if isinstance(linear, Conv1D) else linear.weight.data
    assert isinstance(weight, torch.Tensor)
    bias = linear.bias
    make = _nf4 if weight_format == "nf4" else _int8
    made = make(weight, dtype, double_quantization)
    if bias is not None:
        assert isinstance(bias, torch.Tensor)
        made.bias = torch.nn.Parameter(bias.data.to(dtype), requires_grad=False)
    return made


def _nf4(weight: torch.Tensor, dtype: torch.dtype, double_quantization: bool) -> torch.nn.Module:
    bnb = bitsandbytes()
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=double_quantization,
        quant_type="nf4",
        device="meta",
    )
    if weight.is_meta:
        packed, state = _nf4_shapes(weight, dtype, double_quantization)
    else:
        packed, state = bnb.functional.quantize_4bit(
            weight.to(dtype), blocksize=NF4_BLOCK, compress_statistics=double_quantization, quant_type="nf4"
        )
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        bnb_quantized=True,
        quant_type="nf4",
        blocksize=NF4_BLOCK,
        compress_statistics=double_quantization,
    )
    layer.weight.module = layer
    layer.weight.quant_state = layer.quant_state = state
    made: torch.nn.Module = layer
    return made


def _nf4_shapes(weight: torch.Tensor, dtype: torch.dtype, double_quantization: bool) -> tuple[torch.Tensor, object]:
    """What ``quantize_4bit`` returns for *weight*, as shapes: packed half bytes and the constants beside them."""
    make_state = bitsandbytes().functional.QuantState
    count = weight.numel()
    blocks = -(-count // NF4_BLOCK)
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device="meta")
    code = torch.empty(16, device="meta")
    if not double_quantization:
        constants = torch.empty(blocks, device="meta")
        return packed, make_state(
            absmax=constants, shape=weight.shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4", code=code
        )
    second = make_state(
        absmax=torch.empty(-(-blocks // CONSTANT_BLOCK), device="meta"),
        blocksize=CONSTANT_BLOCK,
        code=torch.empty(256, device="meta"),
        dtype=torch.float32,
    )
    return packed, make_state(
        absmax=torch.empty(blocks, dtype=torch.uint8, device="meta"),
        shape=weight.shape,
        dtype=dtype,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        code=code,
        offset=torch.empty((), device="meta"),
        state2=second,
    )


def _int8(weight: torch.Tensor, dtype: torch.dtype, _double_quantization: bool) -> torch.nn.Module:
    """Row-wise int8 without outlier columns (threshold 0), whose number would depend on the data."""
    bnb = bitsandbytes()
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
    if weight.is_meta:
        rows = torch.empty((out_features, in_features), dtype=torch.int8, device="meta")
        scales = torch.empty(out_features, device="meta")
    else:
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    layer.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
    made: torch.nn.Module = layer
    return made


def has_weight(module: torch.nn.Module) -> bool:
    """Whether ``weight_of`` can tell the matrix that *module* multiplies by."""
    return is_linear(module) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")


Use = Literal["forward", "recomputed forward", "backward", "twice", "alone"]
"""What a matrix that is shared out is gathered for: a pass, the first of two uses in a row, or neither."""


def ahead() -> Use:
    """Of a product the use that it is: in a forward pass, or computed again within a backward pass."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "recomputed forward"


def whole(module: torch.nn.Module, use: Use) -> contextlib.AbstractContextManager[None]:
    """While it lasts *module* has its whole weight, of which a process may have only a part; see ``sharding``."""
    shared: Any = getattr(module, "shared_out", None)
    if shared is None:
        return contextlib.nullcontext()
    gathered: contextlib.AbstractContextManager[None] = shared.gathered(use)
    return gathered


def weight_of(module: torch.nn.Module, dtype: torch.dtype, use: Use = "backward") -> torch.Tensor:
    """The matrix (out, in) that a linear *module* multiplies by, in *dtype*; made anew where it is quantized."""
    with whole(module, use):
        return _weight_of(module, dtype)


def _weight_of(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        made: torch.Tensor = bitsandbytes().functional.dequantize_4bit(weight.view(-1, 1), state)
        return made.to(dtype)
    if type(module).__name__ == "Linear8bitLt":
        state8: Any = module.state
        held: Any = weight if state8.CB is None else state8  # where the first forward pass puts them
        rows: torch.Tensor = held.CB.to(dtype, copy=True)
        return rows.mul_(held.SCB.unsqueeze(1).mul(1.0 / 127.0))
    plain: torch.Tensor = weight.t() if isinstance(module, Conv1D) else weight.detach()  # not what is let go of
    return plain.to(dtype)


def is_made(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether *module* multiplies activations in *dtype* by a weight that it makes anew each time, as nf4 does.

    For few tokens bitsandbytes might multiply without making it, to the same result up to rounding.
    """
    state = getattr(module.weight, "quant_state", None)
    return state is not None and state.dtype == dtype


def reuses_weight(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether *module* keeps the weight that it makes for activations in *dtype* until it goes back through them."""
    return getattr(module, "is_reusing", False) and is_made(module, dtype)


def reuse_weights(module: torch.nn.Module) -> None:
    """Let the nf4 modules inside *module* save the weights that they make, for their backward passes.

    That is for modules which are computed again, where all that is saved lives from then on and not before.
    """
    for inside in module.modules():
        if type(inside).__name__ == "Linear4bit":
            inside.is_reusing = True  # type: ignore[assignment]
            inside.forward = functools.partial(_by_kept_weight, inside, inside.forward)


def _by_kept_weight(module: Any, others: Any, x: torch.Tensor) -> torch.Tensor:
    """A module's product without an adapter, by a weight that autograd keeps where it needs one."""
    if torch.is_grad_enabled() and x.requires_grad and reuses_weight(module, x.dtype):
        return torch.nn.functional.linear(x, weight_of(module, x.dtype, ahead()), module.bias)
    result: torch.Tensor = others(x)
    return result


def stored(
    weight: torch.Tensor, weight_format: Literal["int8", "nf4"], *, double_quantization: bool = False
) -> torch.Tensor:
    """What *weight* (out, in) is once it was stored in a format and is read again, in its own dtype."""
    made: Any = (_nf4 if weight_format == "nf4" else _int8)(weight, weight.dtype, double_quantization)
    if weight_format == "int8":
        made.init_8bit_state()  # as the first forward pass does
    return weight_of(made, weight.dtype)


def held(module: torch.nn.Module) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """The tensors of a *module*'s weight that grow with it, and by which attributes each is held, the matrix first.

    Left out are the tables that bitsandbytes' codes stand for.
    """
    weight: Any = module.weight
    state: Any = getattr(weight, "quant_state", None)
    if state is not None:
        found: list[tuple[tuple[str, ...], torch.Tensor]] = [(("weight.data",), weight.data)]
        found.append((("weight.quant_state.absmax",), state.absmax))
        if state.state2 is not None:
            found.append((("weight.quant_state.state2.absmax",), state.state2.absmax))
        return found
    if type(module).__name__ == "Linear8bitLt":
        linear: Any = module
        if linear.state.CB is None:
            linear.init_8bit_state()  # as the first forward pass does
        return [(("weight.data", "state.CB"), linear.state.CB), (("state.SCB",), linear.state.SCB)]
    return [(("weight.data",), weight.data)]


def constants(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a quantized module holds beside parameters and buffers."""
    found: list[torch.Tensor] = []
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    while state is not None:
        found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
        state = state.state2
    for holder in (weight, getattr(module, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, torch.Tensor):
            found.append(scales)
    return found
