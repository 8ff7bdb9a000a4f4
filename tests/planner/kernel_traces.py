"""Recordings of a few operators as on a device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder, Trace
from tests.planner import tiny

HEADS, TOKENS, HEAD_SIZE = 4, 32, 16

CUDA = pytest.mark.parametrize("gpu", ["t4", "l4"])


def recorded(gpu: str, work: Callable[[], object]) -> Trace:
    """What *work* does on *gpu*; its result is kept alive until the end."""
    recorder = Recorder(tiny.target(gpu))
    with recording(recorder):
        kept = work()
        recorder.mark("end")
    del kept
    return recorder.trace


def temporaries(trace: Trace) -> list[int]:
    """Bytes of what operators allocate inside and free before they return."""
    return [trace.sizes[number] for number, category in trace.categories.items() if category == "temporaries"]


def empty(*shape: int, dtype: torch.dtype = torch.float16, trains: bool = True) -> torch.Tensor:
    """A tensor of a shape and nothing else."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trains)
