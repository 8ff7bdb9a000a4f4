"""What autograd does in place, but not while a dispatch mode watches or a tensor has no data."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

IN_PLACE: dict[Any, Any] = {
    aten.index_add.default: aten.index_add_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""What the gradients of indexing, ``gather`` and ``topk`` do to fresh zeros (``isTensorSubclassLike`` in PyTorch's
FunctionsManual.cpp)."""


def really(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator that runs where *func* is seen."""
    if func is aten.add.Tensor and not kwargs and _accumulates(*args):
        return aten.add_.Tensor
    if func in IN_PLACE and args[0].is_meta and _in_backward():
        return IN_PLACE[func]
    return func


def _in_backward() -> bool:
    """Whether autograd itself calls: what is computed again runs with gradients on."""
    return bool(torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled())


_Owned = tuple[int, int]
"""How many references there are to a tensor and to its storage."""


def _owned(tensor: torch.Tensor) -> _Owned:
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


@functools.cache
def owned_by_autograd_alone() -> _Owned:
    """What ``_owned`` says, in a dispatch mode, of a gradient that waits for another to be added to it."""
    seen: list[_Owned] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor and not torch.is_grad_enabled():
                seen.append(_owned(args[0]))
            return func(*args, **(kwargs or {}))

    with Look():  # type: ignore[no-untyped-call]
        x = torch.empty(2, device="meta", requires_grad=True)
        (x.exp() * x.sin()).sum().backward()
    return seen[0]


def _accumulates(gradient: Any, other: Any, *_rest: Any) -> bool:
    """Whether this sum is autograd's of two gradients of one tensor, which is done in place where nobody sees it.

    So says ``can_accumulate_inplace`` in PyTorch's input_buffer.cpp, but never while a dispatch mode is on.
    """
    if not _in_backward() or not isinstance(other, torch.Tensor):
        return False
    alike = gradient.shape == other.shape and gradient.dtype == other.dtype
    dense = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.itemsize
    return alike and dense and _owned(gradient) == owned_by_autograd_alone()
