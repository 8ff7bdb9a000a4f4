"""What the target device would really run and allocate where ``meta`` shows something else.

Tables, each keyed by operator or function:

- ANSWERS: questions about data, which ``meta`` does not have.
- CALLS: functions above the dispatcher for which a CUDA device takes another path than ``meta``.
- REPLACEMENTS: operators whose ``meta`` version fails or gives another shape.
- BEFORE_RESULT, AFTER_RESULT: bytes that an operator allocates inside, before or after it allocates its result, and
  frees when it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from shallowflow.profiles.specs import GpuSpec

from . import autocast, data_dependent, optimizers, sdpa
from .allocator import MIN_BLOCK_BYTES

aten = torch.ops.aten
Workspace = Callable[["Target", tuple[Any, ...], dict[str, Any]], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The device whose behaviour is recorded.

    Attributes:
        device_type: ``cuda`` or ``cpu``.
        compute_capability: None for a CPU.
        cublas_workspace_bytes: per thread that multiplies matrices.
        alignment_bytes: what the allocator rounds every request to.
        affine: take a bound that is affine in micro-batch where a buffer is not, as a profile needs it.
        any_rank: the same in an adapter's rank.
    """

    device_type: str
    compute_capability: tuple[int, int] | None = None
    cublas_workspace_bytes: int = 0
    alignment_bytes: int = 1
    affine: bool = False
    any_rank: bool = False

    @classmethod
    def of(cls, gpu: GpuSpec) -> Target:
        """The target that *gpu* is."""
        return cls(
            device_type=gpu.device_type,
            compute_capability=gpu.compute_capability,
            cublas_workspace_bytes=gpu.cublas_workspace_bytes,
            alignment_bytes=MIN_BLOCK_BYTES if gpu.device_type == "cuda" else 1,
        )


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An operator's argument, by position or by name; None where it was left out."""
    return args[position] if len(args) > position else kwargs.get(name)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _scalar(tensor: torch.Tensor) -> float | int | bool:
    """What ``.item()`` says of a ``meta`` tensor: yes to "is all of it true?", nothing to "did any overflow?"."""
    if not tensor.is_meta:
        value: float | int | bool = aten._local_scalar_dense.default(tensor)
        return value
    return 0.0 if tensor.is_floating_point() else 1


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: lambda first, second: True if first.is_meta else aten.equal.default(first, second),
}


def _softmax(
    target: Target,
    original: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002  # callers may pass it by this name
    dim: int | None = None,
    *rest: Any,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """CUDA's ``softmax(half, dtype=float32)`` casts inside its kernel (ATen's SoftMax.cpp); meta casts first."""
    fused = target.device_type == "cuda" and dtype == torch.float32 and input.dtype == torch.float16
    if fused and dim is not None:
        kernel = aten._log_softmax if "log" in getattr(original, "__name__", "") else aten._softmax
        out: torch.Tensor = kernel(input, dim, True)
        return out
    return original(input, dim, *rest, dtype=dtype, **kwargs)


def _dropout(
    target: Target,
    original: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002  # callers may pass it by this name
    p: float = 0.5,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """CUDA's fused kernel keeps a byte per element, where a CPU keeps the scaled mask (ATen's Dropout.cpp)."""
    trains = args[0] if args else kwargs.get("training", kwargs.get("train", True))
    inplace = args[1] if len(args) > 1 else kwargs.get("inplace", False)
    if target.device_type == "cuda" and input.is_meta and trains and not inplace and 0 < p < 1 and input.numel():
        out: torch.Tensor = torch.native_dropout(input, p, True)[0]
        return out
    return original(input, p, *args, **kwargs)


def _random_state(_target: Target, original: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The CPU generator's state, kept per recomputed layer; a copy, because the original is made out of sight."""
    return original().clone()


def _recomputed_on(target: Target, original: Callable[..., str], *args: Any) -> str:
    """What PyTorch's checkpoint takes for the device: also where all is on a CPU it looks after CUDA's autocast.

    Where no tensor tells it, as with named arguments alone, it is the accelerator of the machine.
    """
    kind = original(*args)
    return "cuda" if kind == "meta" or target.device_type == "cuda" else kind


CALLS: dict[tuple[Any, str], Callable[..., Any]] = {
    (torch.utils.checkpoint, "_infer_device_type"): _recomputed_on,
    (torch, "get_rng_state"): _random_state,
    (torch, "dropout"): _dropout,
    (torch.nn.functional, "dropout"): _dropout,
    (torch.nn.functional, "softmax"): _softmax,
    (torch.nn.functional, "log_softmax"): _softmax,
    (torch, "softmax"): _softmax,
    (torch, "log_softmax"): _softmax,
    **autocast.CALLS,
    **sdpa.CALLS,
    **data_dependent.CALLS,
    **optimizers.CALLS,
}


def _softmax_backward(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """CUDA multiplies gradient and output into a temporary before it reduces (ATen's SoftMax.cu)."""
    grad, output = args[0], args[1]
    return [_bytes(torch.empty_like(output, dtype=grad.dtype))] if target.device_type == "cuda" else []


def _matrix_copies(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """Factors that are neither rows nor columns one after the other are copied, such as a sum's expanded gradient."""
    factors = [value for value in args if isinstance(value, torch.Tensor)][-2:]
    return [_bytes(f) for f in factors if not _is_matrix(f)]


def _is_matrix(tensor: torch.Tensor) -> bool:
    """What BLAS takes as it is, transposed or not (ATen's ``prepare_matrix_for_cublas``)."""
    rows, columns = tensor.shape[-2:]
    down, across = tensor.stride()[-2:]
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows)) or tensor.numel() == 0


def _reduced_loss(_target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The loss per element, twice: the structured operator makes room for it before and again inside (Loss.cpp)."""
    reduction = _argument(args, kwargs, 2, "reduction")
    return [] if reduction == 0 else 2 * [_bytes(torch.broadcast_tensors(args[0], args[1])[0])]


def _contiguous_gradient(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """A gradient that is not contiguous is copied (``expect_contiguous`` in ATen's layer norms)."""
    return [] if args[0].is_contiguous() else [_bytes(args[0])]


SORTED_INDICES = 3072
"""More tokens than these are sorted for an embedding's gradient."""


def _sorted_tokens(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """Six lists of the tokens' numbers, and a row in fp32 for each (Embedding.cu, EmbeddingBackwardKernel.cu)."""
    gradient, tokens = args[0], args[1]
    if target.device_type != "cuda" or (tokens.numel() <= SORTED_INDICES and not target.affine):
        return []
    return [*(6 * [_bytes(tokens)]), 4 * gradient.numel()]


CUBLASLT_WORKSPACE_BYTES = 1024 * 1024
"""PyTorch's default for cuBLASLt (CUDABlas.cpp), per handle and stream."""


def library_workspaces(target: Target, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Workspace bytes by library that a matrix product needs: cuBLAS, or cuBLASLt where a bias vector is added."""
    if target.device_type != "cuda":
        return {}
    bias = args[0] if func is aten.addmm.default else _argument(args, kwargs, 6, "bias")
    if bias is not None and bias.dim() == 1:
        return {"cublasLt": CUBLASLT_WORKSPACE_BYTES}
    return {"cublas": target.cublas_workspace_bytes}


def all_workspaces(target: Target) -> dict[str, int]:
    """Every workspace that a step may come to need, per thread."""
    if target.device_type != "cuda":
        return {}
    return {"cublas": target.cublas_workspace_bytes, "cublasLt": CUBLASLT_WORKSPACE_BYTES}


AFTER_RESULT: dict[Any, Workspace] = {
    aten._softmax_backward_data.default: _softmax_backward,
    aten._foreach_norm.Scalar: optimizers.many_norms,
    aten.mm.default: _matrix_copies,
    aten.mm.out: _matrix_copies,
    aten.addmm.default: _matrix_copies,
    aten.addmm.out: _matrix_copies,
    aten.addmm.dtype_out: _matrix_copies,
    aten.bmm.default: _matrix_copies,
    aten.baddbmm.default: _matrix_copies,
    aten.native_layer_norm_backward.default: _contiguous_gradient,
    aten.embedding_dense_backward.default: _sorted_tokens,
    **data_dependent.AFTER_RESULT,
    **sdpa.AFTER_RESULT,
}

BEFORE_RESULT: dict[Any, Workspace] = {
    aten.mse_loss.default: _reduced_loss,
    aten.smooth_l1_loss.default: _reduced_loss,
    **data_dependent.BEFORE_RESULT,
}

REPLACEMENTS: dict[Any, Callable[..., Any]] = {**data_dependent.REPLACEMENTS}


def _gemm_4bit(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """For many tokens, bitsandbytes dequantises the whole weight and calls cuBLAS (its CUDA backend, M > 1536).

    Below that a table by chip and shape decides between a fused kernel and the same; the larger is assumed.
    """
    activations, shape = args[0], args[2]
    weight = math.prod(shape) * activations.element_size()
    absmax_8bit = _argument(args, kwargs, 7, "absmax_8bit")
    constants = [absmax_8bit.numel() * 4] * 2 if absmax_8bit is not None else []
    return [*constants, weight] if target.device_type in ("cuda", "cpu") else []


def _int8_product(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """On CUDA, the product in int32, from which the result is scaled (bitsandbytes' ``int8_linear_matmul``)."""
    activations, weight = args[0], args[1]
    rows = math.prod(activations.shape[:-1])
    return [rows * weight.shape[0] * 4] if target.device_type == "cuda" else []


def _int8_matmul(target: Target, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """On a CPU, bitsandbytes trains on the weight made into numbers again; its choice is by the tensors' device."""
    state = kwargs.get("state")
    if target.device_type != "cpu" or state is None or not state.is_training:
        return original(*args, **kwargs)
    from bitsandbytes.autograd._functions import MatMul8bitFp

    return MatMul8bitFp.apply(*args, None, kwargs.get("bias"), state)


def register_bitsandbytes() -> None:
    """Add the rules for bitsandbytes' operators; call it once they exist, that is, after importing bitsandbytes."""
    ops = torch.ops.bitsandbytes
    BEFORE_RESULT[ops.int8_scaled_mm.default] = _int8_product
    BEFORE_RESULT[ops.gemm_4bit.default] = _gemm_4bit
    BEFORE_RESULT[ops.optimizer_update_8bit_blockwise.default] = optimizers.update_8bit
    BEFORE_RESULT[ops.optimizer_update_32bit.default] = optimizers.update_32bit
    import bitsandbytes as bnb

    CALLS[bnb, "matmul"] = _int8_matmul
    CALLS.update(optimizers.bitsandbytes_calls())
