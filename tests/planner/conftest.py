"""What the planner's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shallowflow.planner.profiler import shapes


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where other programs run, and change no allocation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="called")
def _called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that were recorded, in order."""
    names: list[str] = []
    plain = shapes.call

    def spy(func: Any, *rest: Any) -> Any:
        names.append(func._overloadpacket.__name__)
        return plain(func, *rest)

    monkeypatch.setattr(shapes, "call", spy)
    return names
