"""Where computing a module again may end: ahead of its last product, whose result its backward pass does not need.

PyTorch's checkpoint ends a recomputation once everything is there that had been saved. A function of Python's saves
when its forward pass is over, so that the last product of a layer would be computed again for nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

_HERE = threading.local()
"""What this thread computes: a part, and whether it does so again. On CUDA backward passes have their own thread."""


@dataclass(slots=True)
class Part:
    """A module that is computed again for its backward pass.

    Attributes:
        last: what it called last, of what asks ``ends_with``.
    """

    last: object = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For its forward pass, and for computing it again: checkpoint's ``context_fn``."""
        return self._computing(again=False), self._computing(again=True)

    @contextlib.contextmanager
    def _computing(self, *, again: bool) -> Iterator[None]:
        before = getattr(_HERE, "computed", None)
        _HERE.computed = (self, again)
        try:
            yield
        finally:
            _HERE.computed = before


def ends_with(module: object) -> bool:
    """Whether a part is computed again here that called *module* last; where it is computed first, it is noted."""
    part, again = getattr(_HERE, "computed", None) or (None, False)
    if part is None:
        return False
    if not again:
        part.last = module
    return again and part.last is module
