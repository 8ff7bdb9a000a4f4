"""What code asks of data that ``meta`` does not have: which entries are true, how many tokens an expert gets.

Tables as in ``kernels``. A router's choices are spread evenly over its experts, and the shares add up to all choices.
Of anything else, as much is taken to be true, or different, as there can be. Tensors with data answer for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .kernels import Target

aten = torch.ops.aten

MAX_ASKED_ELEMENTS = 65_536
"""Of a tensor whose values are asked for; more is no question but a copy."""

_choices: dict[int, int] = {}
"""How many choices the last ``topk`` over so many candidates made, for all its rows."""

_shares: dict[tuple[int, int], int] = {}
"""How many of so many choices' classes were asked for, so that the next gets the next one's share."""


def forget() -> None:
    """Start anew: what one recording saw says nothing of the next."""
    _choices.clear()
    _shares.clear()


def _of_meta(operator: Any, answer: Callable[..., Any]) -> Callable[..., Any]:
    """*answer* where the first tensor has no data, and *operator* itself where it has."""

    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (answer if tensor.is_meta else operator)(tensor, *args, **kwargs)

    return call


def _note_choices(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    scores, chosen = args[0], args[1]
    if scores.dim() and scores.numel():
        _choices[scores.size(-1)] = scores.numel() // scores.size(-1) * chosen
        _shares.clear()
    return []


def _evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (index < total % parts) for index in range(parts)]


def _to_copy(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A small tensor that goes to the CPU is asked for its values, as by ``tolist``: those that ``item`` would say."""
    device = kwargs.get("device")
    leaves = device is not None and torch.device(device).type == "cpu"
    if not leaves or tensor.numel() > MAX_ASKED_ELEMENTS:
        out: torch.Tensor = aten._to_copy.default(tensor, **kwargs)
        return out
    dtype = kwargs.get("dtype") or tensor.dtype
    if tensor.dim() == 1 and not tensor.is_floating_point() and len(tensor) in _choices:
        return torch.tensor(_evenly(_choices[len(tensor)], len(tensor)), dtype=dtype, device="cpu")
    return torch.full(tensor.shape, 0 if tensor.is_floating_point() else 1, dtype=dtype, device="cpu")


def _is_number(tensor: torch.Tensor, number: float) -> torch.Tensor:
    """An entry of a list of indices is not that number, or a loop over experts would end at the first.

    Nothing is said of a number that stands alone, such as a count of what is true.
    """
    entry = tensor.dim() == 0 and tensor.untyped_storage().nbytes() > tensor.itemsize
    if entry and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        return torch.full((), False, dtype=torch.bool, device="cpu")
    out: torch.Tensor = aten.eq.Scalar(tensor, number)
    return out


def _num_true(tensor: torch.Tensor) -> int:
    """All there is, but for what became of a router's choices: which experts have any, and what one of them has."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        classes = _num_classes(len(tensor)) if tensor.dim() == 1 else 0
        return min(classes, _choices[classes]) if classes in _choices else tensor.numel()
    steps = [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    spacing = min(steps, default=1)
    return _next_share(tensor.numel(), _num_classes(spacing)) if spacing > 1 else tensor.numel()


def _num_classes(length: int) -> int:
    """transformers adds a class that no token has, for experts that another process keeps."""
    return length - 1 if length - 1 in _choices else length


def _next_share(total: int, classes: int) -> int:
    """What one class of a table of ``one_hot`` choices, recognised by its strides, has of them."""
    asked = _shares.get((total, classes), 0)
    _shares[total, classes] = asked + 1
    return _evenly(total, classes)[asked % classes]


def _nonzero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty((_num_true(tensor), tensor.dim()), dtype=torch.int64)


def _one_hot(
    _target: Target, original: Callable[..., torch.Tensor], tensor: torch.Tensor, num_classes: int = -1
) -> torch.Tensor:
    """Zeros and a ``scatter_`` (ATen's Onehot.cpp); meta compares with every class instead."""
    if not tensor.is_meta or num_classes < 1:
        return original(tensor, num_classes)
    return tensor.new_zeros((*tensor.shape, num_classes)).scatter_(-1, tensor.unsqueeze(-1), 1)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _index(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """A mask picks all that there is, or what it says where it has data."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or not _is_mask(index):
            positions.append(index)
        elif index.is_meta:
            positions += index.dim() * [index.new_empty(index.numel(), dtype=torch.int64)]
        else:
            positions += index.to(torch.bool).nonzero().unbind(1)
    out: torch.Tensor = aten.index.Tensor(tensor, positions)
    return out


def _mask_positions(_target: Target, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
    """Where a mask is true, as one number per dimension (``expandTensors`` in IndexingUtils.h)."""
    return [index.numel() * index.dim() * 8 for index in args[1] if _is_mask(index) and index.numel()]


def _index_put(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """A mask's positions; where values are added up on CUDA, the indices, their sorted copy and their order.

    As in ``index_put_with_sort_kernel`` (Indexing.cu). One value under a mask is a ``masked_fill``.
    """
    indices, values = args[1], args[2]
    accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    if not accumulates:
        return [] if values.numel() == 1 else _mask_positions(target, args, kwargs)
    expanded = _mask_positions(target, args, kwargs)
    numbers = [index.shape for index in indices if index is not None and not _is_mask(index)]
    sorted_bytes = math.prod(torch.broadcast_shapes(*numbers)) * 8 if numbers else max(expanded, default=0)
    return [*expanded, *(3 * [sorted_bytes] if target.device_type == "cuda" and sorted_bytes else [])]


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(math.prod(torch.broadcast_shapes(tensor.shape, mask.shape)))


def _unique(tensor: torch.Tensor, _sorted: bool = True, inverse: bool = False, counts: bool = False) -> Any:
    sizes = (tensor.shape if inverse else (0,), (tensor.numel(),) if counts else (0,))
    return tensor.new_empty(tensor.numel()), *(tensor.new_empty(size, dtype=torch.int64) for size in sizes)


def _bincount(tensor: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    dtype = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    return tensor.new_empty(max(1, minlength), dtype=dtype)


def _grouped_mm(
    target: Target,
    original: Callable[..., torch.Tensor],
    first: torch.Tensor,
    second: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """CUDA has it from sm_80 on; below, transformers multiplies expert by expert, in an operator of its own."""
    capability = target.compute_capability
    if target.device_type == "cuda" and capability is not None and capability < (8, 0):
        looped: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(first, second, kwargs["offs"])
        return looped
    return original(first, second, **kwargs)


def _grouped_product(
    first: torch.Tensor,
    second: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,  # PyTorch takes none yet
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """In any dtype, as on devices (GroupedMMUtils.h); the meta version takes bfloat16 only."""
    alike = first.dim() == second.dim()
    groups = [len(offs) if offs is not None else len(first)] if alike else []
    return first.new_empty((*groups, first.size(-2), second.size(-1)), dtype=out_dtype or first.dtype)


CALLS: dict[tuple[Any, str], Callable[..., Any]] = {
    (torch.nn.functional, "one_hot"): _one_hot,
    (torch.nn.functional, "grouped_mm"): _grouped_mm,
}

REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    operator: _of_meta(operator, answer)
    for operator, answer in (
        (aten._to_copy.default, _to_copy),
        (aten.eq.Scalar, _is_number),
        (aten.nonzero.default, _nonzero),
        (aten.index.Tensor, _index),
        (aten.masked_select.default, _masked_select),
        (aten._unique2.default, _unique),
        (aten.bincount.default, _bincount),
        (aten._grouped_mm.default, _grouped_product),
    )
}

BEFORE_RESULT: dict[Any, Callable[..., list[int]]] = {
    aten.index.Tensor: _mask_positions,
    aten.index_put_.default: _index_put,
    aten._index_put_impl_.default: _index_put,
}

AFTER_RESULT: dict[Any, Callable[..., list[int]]] = {aten.topk.default: _note_choices}
