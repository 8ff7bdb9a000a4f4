"""A stand-in for CUDA's streams on a CPU that tells which operators are ordered and which could race.

Everything runs at once. What counts is what each stream has been made to wait for, kept as a vector clock
(Fidge, 1988): how many operators of every stream are sure to be done.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shallowflow.planner.profiler import operators

Clock = Counter[str]


@dataclass(eq=False)
class Stream:
    """A queue of operators; *clock* says what is done before the next one begins."""

    name: str
    clock: Clock = field(default_factory=Counter)

    def record_event(self) -> Clock:
        """All that was issued so far."""
        return Counter(self.clock)

    def wait_event(self, event: Clock) -> None:
        """Go on after *event*."""
        self.clock |= event

    def wait_stream(self, other: Stream) -> None:
        """Go on after all that was issued to *other*."""
        self.wait_event(other.record_event())


class Cuda(TorchDispatchMode):
    """What ``torch.cuda`` offers of streams; while it is on, every operator is issued to the current one.

    Memory is handed out and taken back in the order of the computing stream, as the caching allocator does it.

    Attributes:
        Stream: makes another queue.
        races: what touches memory that another stream may still be using.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.Stream = functools.partial(Stream, "copying")
        self.computing = self._current = Stream("computing")
        self.races: list[str] = []
        self._accesses: dict[int, dict[tuple[str, bool], int]] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def current_stream(self) -> Stream:
        """The one that operators are issued to."""
        return self._current

    @contextmanager
    def stream(self, chosen: Stream) -> Iterator[None]:
        """Issue to *chosen* meanwhile."""
        before, self._current = self._current, chosen
        yield
        self._current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = operators.tensors(out if isinstance(out, (tuple, list)) else (out,))
        self._current.clock[self._current.name] += 1
        for tensor in made:
            if tensor.untyped_storage()._cdata not in self._accesses:
                self._touch(func, tensor, writes=True)
        if not operators.is_view(func):
            written = made + (operators.tensors(args[:1]) if func._schema.is_mutable else [])
            for tensor in operators.tensors(args):
                self._touch(func, tensor, writes=False)
            for tensor in written:
                self._touch(func, tensor, writes=True)
        return out

    def _touch(self, func: Any, tensor: torch.Tensor, *, writes: bool) -> None:
        storage, stream = tensor.untyped_storage(), self._current
        key = storage._cdata
        if key not in self._accesses:
            self._accesses[key] = {}
            self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        for (name, wrote), count in self._accesses[key].items():
            if (writes or wrote) and stream.clock[name] < count:
                self.races.append(f"{func} on {stream.name} before {name} is done")
        self._accesses[key][stream.name, writes] = stream.clock[stream.name]

    def _free(self, key: int) -> None:
        del self._watched[key]
        for (name, _), count in self._accesses.pop(key).items():
            if self.computing.clock[name] < count:
                self.races.append(f"freed before {name} is done")
