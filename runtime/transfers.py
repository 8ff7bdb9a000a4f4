"""Copies of storages to host memory and back: at once on a CPU and on ``meta``, beside the computing on CUDA."""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

_library = torch.library.Library("shallowflow", "DEF")  # operators of their own, so that a trace sees the transfers
_library.define("to_host(Tensor x) -> Tensor")
_library.define("to_device(Tensor x) -> Tensor")
_library.define("arrival(Tensor x) -> ()")
_library.impl("to_host", torch.clone, "CPU")
_library.impl("to_host", torch.empty_like, "Meta")
_library.impl("to_device", torch.clone, "CPU")
_library.impl("to_device", torch.empty_like, "Meta")
_library.impl("arrival", lambda _x: None, "CPU")
_library.impl("arrival", lambda _x: None, "Meta")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Parcel:
    """A storage's bytes, in host memory until they begin to come back to the device.

    Attributes:
        host: the bytes, while they are there.
        device: the same once they are on their way back.
        arrival: what the computing has to wait for before it uses them; None once it has.
    """

    transfers: Transfers
    host: torch.Tensor | None
    device: torch.Tensor | None = None
    arrival: Any = None

    def __del__(self) -> None:
        self.transfers.forget(self)


class Transfers(ABC):
    """A way between a device and its host; what is sent must live until it has left."""

    @abstractmethod
    def send(self, tensor: torch.Tensor) -> Parcel:
        """Begin to copy the bytes of *tensor* to the host."""

    @abstractmethod
    def leave(self) -> None:
        """Let the computing wait until all that was sent has left the device."""

    @abstractmethod
    def fetch(self, parcel: Parcel, device: torch.device) -> None:
        """Begin to copy *parcel* to *device*."""

    @abstractmethod
    def arrive(self, parcel: Parcel) -> None:
        """Let the computing wait until *parcel* is on the device."""

    @abstractmethod
    def forget(self, parcel: Parcel) -> None:
        """Make *parcel*'s memory safe to use for something else."""


class Immediate(Transfers):
    """Every copy is done when its call returns; on ``meta`` there are just the operators that a trace sees."""

    def send(self, tensor: torch.Tensor) -> Parcel:
        """A copy."""
        return Parcel(self, torch.ops.shallowflow.to_host(tensor))

    def leave(self) -> None:
        """Nothing is on its way."""

    def fetch(self, parcel: Parcel, device: torch.device) -> None:
        """Copy back; the host's copy has served."""
        parcel.device = parcel.arrival = torch.ops.shallowflow.to_device(parcel.host)
        parcel.host = None

    def arrive(self, parcel: Parcel) -> None:
        """Note where *parcel* is needed."""
        torch.ops.shallowflow.arrival(parcel.arrival)
        parcel.arrival = None

    def forget(self, parcel: Parcel) -> None:
        """Python frees it."""


def page_locked(num_bytes: int) -> torch.Tensor:
    """Host memory of *num_bytes* that a GPU copies from and to by itself.

    PyTorch's own allocator of such memory rounds each request up to a power of two (CachingHostAllocator.h).
    """
    made = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    pin_memory(made.data_ptr(), num_bytes)
    weakref.finalize(made, unpin_memory, made.data_ptr()).atexit = False
    return made


@dataclass(slots=True, eq=False)
class Streamed(Transfers):
    """CUDA's copies on one stream beside the one that computes, so that both go on at once.

    The allocator hands out again what the computing stream frees, in that stream's order (CUDACachingAllocator.cpp), so
    the computing waits for each copy, by an event, before what it reads or writes is freed. ``record_stream`` would
    hold memory back until a copy is seen to be done, and what is allocated would depend on timing.

    One stream runs its copies in the order in which they were issued: a host buffer is free for the next copy to the
    host as soon as the one from it has been issued.

    Attributes:
        cuda: torch.cuda, or what stands in for it.
        allocate: makes page-locked host memory, which takes long; buffers are therefore kept.
        beside: the stream of the copies, made at the first one.
        buffers: those at rest, by their size.
    """

    cuda: Any = torch.cuda
    allocate: Callable[[int], torch.Tensor] = page_locked
    beside: Any = None
    buffers: defaultdict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Issue to the stream of copies, which goes on once all that was issued to the computing one is done."""
        self.beside = self.beside or self.cuda.Stream()
        self.beside.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(self.beside):
            yield

    def send(self, tensor: torch.Tensor) -> Parcel:
        """Into a buffer of its size that is at rest, or a new one."""
        at_rest = self.buffers[tensor.nbytes]
        host = at_rest.pop() if at_rest else self.allocate(tensor.nbytes)
        with self._copying():
            host.copy_(tensor, non_blocking=True)
        return Parcel(self, host)

    def leave(self) -> None:
        """The computing stream waits for the whole stream of copies."""
        if self.beside is not None:
            self.cuda.current_stream().wait_stream(self.beside)

    def fetch(self, parcel: Parcel, device: torch.device) -> None:
        """Into memory of the computing stream, whose earlier owner it has done with."""
        assert parcel.host is not None
        parcel.device = torch.empty(parcel.host.nbytes, dtype=torch.uint8, device=device)
        with self._copying():
            parcel.device.copy_(parcel.host, non_blocking=True)
            parcel.arrival = self.beside.record_event()
        self._rest(parcel)

    def arrive(self, parcel: Parcel) -> None:
        """The computing stream waits for the event after the copy."""
        self.cuda.current_stream().wait_event(parcel.arrival)
        parcel.arrival = None

    def forget(self, parcel: Parcel) -> None:
        """What never was fetched leaves its buffer, what never was used is waited for before its memory is freed."""
        if parcel.host is not None:
            self._rest(parcel)
        if parcel.arrival is not None:
            self.arrive(parcel)

    def _rest(self, parcel: Parcel) -> None:
        assert parcel.host is not None
        self.buffers[parcel.host.nbytes].append(parcel.host)
        parcel.host = None


def transfers_of(device: torch.device) -> Transfers:
    """The way between *device* and its host."""
    return Streamed() if device.type == "cuda" else Immediate()
