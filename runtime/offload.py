"""Saved activations in host memory from a layer's forward pass to its backward pass.

Copies go on while the layer computes. A storage starts for the host when it is saved, and the layer's forward pass ends
when all of them have left; its backward pass begins by fetching them all, the one that was saved last first, and waits
for each where it is used. Nothing of a layer is on its way while another computes: what a layer takes does not depend
on its neighbours, which is what plans of mixed layers are composed from. So a layer needs, while it runs, as much
memory as one that saves, and only what takes less time than the layer itself costs no time.

A storage is copied as it is when it is saved. What is changed in place after that would be copied at any of its
states, but no step does so: autograd itself refuses to go back through a tensor that has changed since it was saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .transfers import Parcel, Transfers, transfers_of


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor as a view of what was offloaded."""

    whole: Parcel
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class Offload:
    """The hooks that send what autograd saves to the host and bring it back.

    Those of *kept* modules stay: weights are saved, too.

    Attributes:
        transfers: the way to the host, known when there is something to send.
    """

    kept: set[int] = field(default_factory=set)
    transfers: Transfers | None = None

    def keep(self, tensors: list[torch.Tensor]) -> None:
        """Leave *tensors*, which live as long as the model, on the device; empty ones are not there to stay."""
        self.kept.update(tensor.untyped_storage()._cdata for tensor in tensors if tensor.numel())

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """*forward* of a layer, with everything that it saves and that has as many elements as its input offloaded.

        Smaller things are left, such as what lies between an adapter's two matrices: each transfer costs a launch, and
        together they hold little.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            passage = _Passage(self, inputs[0].numel() if inputs else 0)
            try:
                with saved_tensors_hooks(passage.pack, passage.unpack):
                    return forward(*args, **kwargs)
            finally:
                passage.leave()

        return run

    def way(self, device: torch.device) -> Transfers:
        """How to send something from *device*, the same each time."""
        if self.transfers is None:
            self.transfers = transfers_of(device)
        return self.transfers


@dataclass(slots=True)
class _Passage:
    """One forward pass of a layer, and the backward pass that belongs to it.

    A storage goes once, however many tensors of it are saved.

    Attributes:
        least_elements: of what is sent.
        leaving: storages on their way to the host, by identity and version, in the order in which they were last saved;
            each lives until it has left.
        sent: the same once they have left, as long as a saved tensor needs them.
    """

    offload: Offload
    least_elements: int
    leaving: dict[tuple[int, int], tuple[torch.Tensor, Parcel]] = field(default_factory=dict)
    sent: list[tuple[weakref.ref[Parcel], torch.device]] = field(default_factory=list)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        """What autograd keeps in place of *tensor*."""
        storage = tensor.untyped_storage()
        is_small = storage.nbytes() < self.least_elements * tensor.itemsize
        if is_small or storage._cdata in self.offload.kept or _is_cast_weight(tensor):
            return tensor
        name = (storage._cdata, tensor._version)
        known = self.leaving.pop(name, None)
        if known is None:
            everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            known = everything, self.offload.way(tensor.device).send(everything)
        self.leaving[name] = known
        return _View(known[1], tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def leave(self) -> None:
        """End the forward pass: all has left, and its memory may be used again."""
        if self.leaving and self.offload.transfers is not None:
            self.offload.transfers.leave()
        self.sent = [(weakref.ref(parcel), tensor.device) for tensor, parcel in reversed(self.leaving.values())]
        self.leaving.clear()

    def unpack(self, saved: torch.Tensor | _View) -> torch.Tensor:
        """The tensor that was saved; the first call, as the layer's backward pass begins, fetches all that was sent."""
        for reference, device in self.sent:
            parcel = reference()
            if parcel is not None:
                parcel.transfers.fetch(parcel, device)
        self.sent = []
        if isinstance(saved, torch.Tensor):
            return saved
        whole = saved.whole
        if whole.arrival is not None:
            whole.transfers.arrive(whole)
        assert whole.device is not None
        empty = torch.empty(0, dtype=saved.dtype, device=whole.device.device)
        return empty.set_(whole.device.untyped_storage(), saved.offset, saved.size, saved.stride)


_CASTS = {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "UnsafeViewBackward0"}


def _is_cast_weight(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is a weight that learns as autocast gives it to a product: none of the layer's activations."""
    node: Any = tensor.grad_fn
    while node is not None and node.name() in _CASTS:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
