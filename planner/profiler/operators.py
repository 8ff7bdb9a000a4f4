"""What one operator costs: floating-point operations, bytes moved, and which kind of work it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class OpCost:
    """One launch.

    Attributes:
        kind: one of ``costs.OP_KINDS``: what bounds it besides its bytes.
        flops: of matrix products and attention; elements for ``dequantize``; messages for ``gather``; element-wise
            arithmetic hides behind its bytes.
        num_bytes: inputs read once plus outputs written once.
    """

    kind: str
    flops: int
    num_bytes: int


_KINDS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_PACKET_IS_FLOP = dict.fromkeys(flop_registry, True)
_MATRIX: dict[Any, bool] = {}
_VIEW: dict[Any, bool] = {}


def is_view(func: Any) -> bool:
    """Whether *func* only re-describes memory: nothing is launched."""
    known = _VIEW.get(func)
    if known is None:
        schema = func._schema
        aliases = [r.alias_info for r in schema.returns]
        known = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
        _VIEW[func] = known or func in _NO_LAUNCH
    return _VIEW[func]


_NO_LAUNCH = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
}


def is_matrix_product(func: Any) -> bool:
    """Whether *func* calls cuBLAS."""
    known = _MATRIX.get(func)
    if known is None:
        name = func._overloadpacket.__name__
        known = _MATRIX[func] = name in ("mm", "addmm", "bmm", "baddbmm", "gemm_4bit", "int8_scaled_mm")
    return known


def makes_weights(func: Any) -> bool:
    """Whether *func* makes quantized weights, or their constants, into numbers."""
    return bool(func.namespace == "bitsandbytes") and func._overloadpacket.__name__ in _DEQUANTIZES


_DEQUANTIZES = ("dequantize_4bit", "dequantize_blockwise")


def is_transfer(func: Any) -> bool:
    """Whether *func* copies between host and device or from other devices, or waits for such a copy."""
    return bool(func.namespace == "shallowflow")


def leaves_device(func: Any) -> bool:
    """Whether what *func* returns lies in host memory."""
    return is_transfer(func) and func._overloadpacket.__name__ == "to_host"


def filled(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What *func* fills with what other devices have, if it does."""
    place = {"gather": 1, "spread": 0}.get(func._overloadpacket.__name__) if is_transfer(func) else None
    return None if place is None else args[place]


def tensors(values: Any) -> list[torch.Tensor]:
    """Every tensor in nested lists and tuples."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors(value))
    return found


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet is aten.addmm:  # whose formula takes the dtype of a result that is told, too, for its shape
        args = args[:3]
    if packet in _PACKET_IS_FLOP:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet in _CPU_ATTENTION:
        count: Callable[..., int] = sdpa_backward_flop_count if "backward" in packet.__name__ else sdpa_flop_count
        return count(*(tensor.shape for tensor in args[: _CPU_ATTENTION[packet]]))
    if packet.__name__ == "gemm_4bit":
        return int(2 * args[0].numel() * args[2][0])
    if packet.__name__ == "int8_scaled_mm":
        return int(2 * args[0].numel() * args[1].shape[0])
    return 0


_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: 3,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 4,
}
"""A CPU's fused attention, which PyTorch's registry leaves out: of how many first arguments the shapes tell."""


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of *tensor* in memory: what is expanded lies there once."""
    size, stride = tensor.shape, tensor.stride()
    return math.prod(n for n, step in zip(size, stride, strict=True) if step) * tensor.itemsize


def _changed(name: str, args: tuple[Any, ...]) -> int | None:
    """Bytes of what changes a part of its arguments in place: rows of a table, or an update all but the gradients."""
    if name == "index_add_":
        return 3 * _touched(args[3])
    if name.startswith("_fused_adam"):
        return 2 * sum(map(_touched, tensors(args[:5]))) - sum(map(_touched, args[1]))
    return None


def _traffic(func: Any, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes read and written."""
    written = sum(map(_touched, outputs))
    if name in ("embedding", "index_select", "gather"):
        return 2 * written
    if name in _WRITES_ONLY:
        return written
    if name == "nll_loss_forward":
        return _touched(inputs[1])
    if name in ("slice_backward", "embedding_dense_backward"):  # zeros, to which rows are added
        return written + 2 * _touched(inputs[0])
    if not outputs and func._schema.is_mutable:  # such as `_foreach_add_`, which returns nothing
        written = sum(map(_touched, inputs[: _first_list(func, inputs)]))
    return sum(map(_touched, inputs)) + written


_WRITES_ONLY = ("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "zero_", "fill_", "nll_loss_backward")


def _first_list(func: Any, inputs: list[torch.Tensor]) -> int:
    """How many tensors the first argument of a `_foreach` operator holds, given all of them."""
    lists = sum(str(argument.type).startswith("List[Tensor]") for argument in func._schema.arguments)
    return len(inputs) // max(1, lists)


def costs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[OpCost, ...]:
    """The launches that calling *func* so comes to, read from the shapes alone.

    One, but for bitsandbytes' ``gemm_4bit``, which for many tokens writes the whole weight in the compute dtype first.
    """
    name = func._overloadpacket.__name__
    if name.startswith("_record_function"):
        return ()
    inputs = tensors(args)
    outputs = tensors(out if isinstance(out, (list, tuple)) else (out,))
    flops = _flops(func, args, kwargs, out)
    changed = _changed(name, args)
    num_bytes = _traffic(func, name, inputs, outputs) if changed is None else changed
    if is_transfer(func):
        return (_transfer(name, args, inputs, num_bytes),)
    if name in _DEQUANTIZES:
        return (OpCost("dequantize", math.prod(outputs[0].shape), num_bytes),)
    kind = _kind(name, inputs) if flops and outputs else "memory"
    if kind.startswith("attention"):
        return (_attention(func, args, kwargs, OpCost(kind, flops, num_bytes)),)
    if name != "gemm_4bit":
        return (OpCost(kind, flops, num_bytes),)
    weight = math.prod(args[2]) * args[0].itemsize
    packed = sum(map(_touched, inputs[1:]))
    product = _touched(args[0]) + _touched(outputs[0])
    made = OpCost("dequantize", math.prod(args[2]), packed + weight)
    return *_constants(kwargs.get("absmax_8bit")), made, OpCost(kind, flops, product + weight)


def _constants(quantized: torch.Tensor | None) -> tuple[OpCost, ...]:
    """Constants in 8 bits are made into fp32 first, and their mean is added (bitsandbytes' CUDA backend)."""
    if quantized is None:
        return ()
    count = quantized.numel()
    return OpCost("dequantize", count, 5 * count), OpCost("memory", 0, 8 * count)


def _transfer(name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], num_bytes: int) -> OpCost:
    """Of a gather, as a ring makes it: the parts that come from others, as many as there are of them.

    One process's part alone goes all the way round, piece by piece.
    """
    if name == "gather":
        part, whole = (tensor.nbytes for tensor in inputs)
        return OpCost("gather", whole // part - 1, whole - part)
    if name == "spread":
        return OpCost("gather", args[1] - 1, inputs[0].nbytes)
    if name in ("arrival", "gathered"):
        return OpCost(name, 0, 0)
    return OpCost("host", 0, num_bytes // 2)


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], counted: OpCost) -> OpCost:
    """Fused attention as it is priced: at rates that were fitted to causal steps, whose kernels skip half of the work.

    Where nothing is skipped it takes twice as long. Every head reads the mask again, though it lies there once.
    """
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    factor = 1 if given.get("is_causal") else 2
    mask = next((given[name] for name in ("attn_bias", "attn_mask") if given.get(name) is not None), None)
    if mask is None:
        return OpCost(counted.kind, counted.flops * factor, counted.num_bytes)
    counted_once = _touched(mask) if any(mask is value for value in args) else 0
    read = math.prod(given["query"].shape[:-1]) * given["key"].size(-2) * mask.itemsize * factor // 2
    return OpCost(counted.kind, counted.flops * factor, counted.num_bytes + read - counted_once)


def _kind(name: str, inputs: list[torch.Tensor]) -> str:
    if name == "int8_scaled_mm":
        return "int8"
    dtype = _KINDS.get(inputs[1 if name == "addmm" else 0].dtype, "float32")  # what is added to may be finer
    if name in ("bmm", "baddbmm"):
        return f"batched {dtype}"
    return f"attention {dtype}" if "attention" in name else dtype
