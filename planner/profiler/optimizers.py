"""What optimizers and gradient clipping would run and allocate on the target, where they ask which device they are on.

CALLS is a table as in ``kernels``. ``meta`` is none of the devices that optimizers know, and would take the slow path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from .kernels import Target

NORM_CHUNK = 65_536
"""Elements that one block of a CUDA ``foreach`` kernel takes."""

PAGED_ELEMENTS = 100_000
"""From here bitsandbytes' paged optimizers put a state in managed memory (``get_state_buffer``)."""


def _foreach_devices(target: Target, original: Callable[[], list[str]]) -> list[str]:
    """Where optimizers default to ``foreach``: on CUDA, and never on a CPU."""
    return [*original(), "meta"] if target.device_type == "cuda" else original()


def _fused_devices(_target: Target, original: Callable[[], list[str]]) -> list[str]:
    return [*original(), "meta"]


def _has_foreach(_target: Target, original: Callable[[torch.device], bool], device: torch.device) -> bool:
    """Clipping is ``foreach`` by default on CUDA and on a CPU."""
    return device.type == "meta" or original(device)


CALLS: dict[tuple[Any, str], Callable[..., Any]] = {
    (torch_optimizer, "_get_foreach_kernels_supported_devices"): _foreach_devices,
    (torch_optimizer, "_get_fused_kernels_supported_devices"): _fused_devices,
    (_foreach_utils, "_device_has_foreach_support"): _has_foreach,
    (torch.nn.utils.clip_grad, "_device_has_foreach_support"): _has_foreach,
}


def many_norms(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """CUDA sums each tensor's chunks into a table as wide as the largest needs it (ATen's ForeachReduceOp.cu).

    A byte for each element of the largest bounds what chunks add to one number a tensor, for up to 16,384 tensors.
    """
    if target.device_type != "cuda":
        return []
    num_tensors, largest = len(args[0]), max(tensor.numel() for tensor in args[0])
    return [4 * num_tensors + largest] if target.any_rank else [4 * num_tensors * -(-largest // NORM_CHUNK)]


def _state_buffer(
    target: Target,
    original: Callable[..., torch.Tensor],
    optimizer: Any,
    parameter: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """bitsandbytes' optimizer state; a large one of a paged optimizer is no memory of PyTorch's on CUDA."""
    if not parameter.is_meta:
        return original(optimizer, parameter, dtype)
    if target.device_type != "cuda" or not optimizer.is_paged or parameter.numel() < PAGED_ELEMENTS:
        return torch.zeros_like(parameter, dtype=dtype)
    with _disable_current_modes():
        pages = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    pages.is_paged = True  # type: ignore[attr-defined]
    return pages


def _prefetch(_target: Target, original: Callable[..., None], pages: torch.Tensor, to_cpu: bool = False) -> None:
    """Nothing for ``meta``: what is prefetched was counted nowhere."""
    if not pages.is_meta:
        original(pages, to_cpu)


def _copied(_target: Target, original: Callable[..., Any], parameter: Any, memo: Any) -> Any:
    """A deep copy of a 4-bit weight, as DoRA makes one; bitsandbytes begins it on the CPU, which ``meta`` is not."""
    if not parameter.is_meta:
        return original(parameter, memo)
    made = type(parameter)(copy.deepcopy(parameter.data))
    vars(made).update(vars(parameter))
    made.quant_state = copy.deepcopy(parameter.quant_state)
    return made


def bitsandbytes_calls() -> dict[tuple[Any, str], Callable[..., Any]]:
    """The entries of CALLS for bitsandbytes, once it is imported."""
    import bitsandbytes as bnb

    return {
        (bnb.optim.optimizer.Optimizer8bit, "get_state_buffer"): _state_buffer,
        (bnb.functional, "prefetch_tensor"): _prefetch,
        (bnb.nn.Params4bit, "__deepcopy__"): _copied,
    }


def _updated(target: Target, parameter: torch.Tensor, num_copies: int) -> list[int]:
    """*num_copies* in fp32 as large as the parameter, and one more where the parameter is not fp32 itself."""
    if target.device_type != "cpu":
        return []
    copies = num_copies + (parameter.dtype != torch.float32)
    return copies * [4 * parameter.numel()]


def update_8bit(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """On a CPU, both states, the gradient and two halves of the denominator in fp32; CUDA's kernel takes nothing.

    As bitsandbytes' ``_optimizer_update_8bit_blockwise_cpu`` does for Adam; the others take less.
    """
    return _updated(target, args[2], 5)


def update_32bit(target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """On a CPU, the scaled gradient, the denominator and the update, as ``_optimizer_update_32bit_cpu`` does."""
    return _updated(target, args[2], 3)
