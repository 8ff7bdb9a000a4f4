"""Saved activations in host memory from a layer's forward pass to its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_library = torch.library.Library("shallowflow", "DEF")  # operators of their own, so that a trace sees the transfers
_library.define("to_host(Tensor x) -> Tensor")
_library.define("to_device(Tensor x, Device device) -> Tensor")


def _pinned(x: torch.Tensor) -> torch.Tensor:
    """Page-locked, so that the copy waits for nothing; the stream's order keeps *x* until it is done."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


_library.impl("to_host", _pinned, "CUDA")
_library.impl("to_host", torch.clone, "CPU")
_library.impl("to_host", torch.empty_like, "Meta")
_library.impl("to_device", lambda x, device: x.to(device, non_blocking=True, copy=True), "CPU")
_library.impl("to_device", lambda x, _device: torch.empty_like(x), "Meta")


@dataclass(slots=True, weakref_slot=True)
class _Offloaded:
    """A storage's bytes in host memory, and on the device again from their first use to their last."""

    original: weakref.ref[torch.UntypedStorage]
    device: torch.device
    host: torch.Tensor
    back: torch.Tensor | None = None

    def storage(self) -> torch.UntypedStorage:
        """The bytes on the device."""
        if self.back is None:
            self.back = torch.ops.shallowflow.to_device(self.host, self.device)
        return self.back.untyped_storage()


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor as a view of what was offloaded."""

    whole: _Offloaded
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class Offload:
    """The hooks that send what autograd saves to the host and bring it back.

    A storage goes once, however many tensors of it are saved. Those of *kept* modules stay: weights are saved, too.
    """

    kept: set[int] = field(default_factory=set)
    known: weakref.WeakValueDictionary[tuple[int, int], _Offloaded] = field(default_factory=weakref.WeakValueDictionary)

    def keep(self, tensors: list[torch.Tensor]) -> None:
        """Leave *tensors*, which live as long as the model, on the device."""
        self.kept.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """*forward* of a layer, with everything that it saves and that has as many elements as its input offloaded.

        Smaller things are left, such as what lies between an adapter's two matrices: each transfer costs a launch, and
        together they hold little.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            least = inputs[0].numel() if inputs else 0
            with saved_tensors_hooks(lambda tensor: self._pack(tensor, least), self._unpack):
                return forward(*args, **kwargs)

        return run

    def _pack(self, tensor: torch.Tensor, least_elements: int) -> torch.Tensor | _View:
        storage = tensor.untyped_storage()
        if storage._cdata in self.kept or storage.nbytes() < least_elements * tensor.itemsize:
            return tensor
        name = (storage._cdata, tensor._version)
        whole = self.known.get(name)
        if whole is None or whole.original() is not storage:
            everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            host = torch.ops.shallowflow.to_host(everything)
            whole = self.known[name] = _Offloaded(weakref.ref(storage), tensor.device, host)
        return _View(whole, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        empty = torch.empty(0, dtype=saved.dtype, device=saved.whole.device)
        return empty.set_(saved.whole.storage(), saved.offset, saved.size, saved.stride)
