"""On ``meta`` optimizers and clipping take the path that they take on the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch

from shallowflow.planner.profiler import optimizers, shapes
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder, Trace
from shallowflow.runtime.simulated import register_quantization
from tests.planner import tiny

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
TABLES = 2 * 256 * 4
"""The maps from 8-bit codes to numbers, one with and one without a sign."""


def updated(gpu: str, make: Make, *sizes: int, clip: bool = False) -> Trace:
    """Two updates of parameters of *sizes* by an optimizer."""
    register_quantization()
    recorder = Recorder(tiny.target(gpu))
    with recording(recorder):
        parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
        optimizer = make(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        recorder.mark("end")
    return recorder.trace


def state_bytes(trace: Trace) -> int:
    """Bytes of everything that belongs to the optimizer."""
    return sum(trace.sizes[number] for number, category in trace.categories.items() if category == "optimizer")


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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize(("gpu", "foreach"), [("t4", True), ("cpu", False)])
def test_foreach_is_the_default_on_cuda_alone(
    optimizer: type[torch.optim.Optimizer], gpu: str, foreach: bool, called: list[str]
) -> None:
    """Without a word from the user a GPU updates all parameters at once, a CPU one after the other."""
    updated(gpu, optimizer, 1000, 2000)

    assert any(name.startswith("_foreach") for name in called) is foreach


@pytest.mark.parametrize(("gpu", "at_once"), [("t4", 6), ("cpu", 3)])
def test_foreach_takes_as_much_as_all_parameters(gpu: str, at_once: int) -> None:
    """AdamW's denominators are there for all parameters at once on a GPU; on a CPU one, with the next in two steps."""
    size = 100_000
    trace = updated(gpu, torch.optim.AdamW, *6 * [size])

    level, highest = 0, 0
    for event in trace.events:
        level += trace.sizes[abs(event) - 1] * (1 if event > 0 else -1)
        highest = max(highest, level)

    held = 6 * 4 * size * 4  # parameters, gradients, two states
    assert highest - held == pytest.approx(at_once * size * 4, rel=0.01)


@pytest.mark.parametrize(("gpu", "table"), [("t4", [3 * 4 * 4]), ("cpu", [])])
def test_clipping_is_foreach_everywhere(gpu: str, table: list[int], called: list[str]) -> None:
    """All norms are one call; CUDA's has a row of sums per tensor, as long as the largest tensor needs."""
    sizes = (10, 3 * optimizers.NORM_CHUNK + 1, 2000)

    trace = updated(gpu, torch.optim.SGD, *sizes, clip=True)

    assert called.count("_foreach_norm") == 2
    sums = [trace.sizes[number] for number, category in trace.categories.items() if category == "temporaries"]
    assert sums == 2 * table


@pytest.mark.parametrize("gpu", ["t4", "cpu"])
def test_a_fused_optimizer_takes_no_temporaries(gpu: str, called: list[str]) -> None:
    """One kernel does it all, in place."""
    updated(gpu, lambda p: torch.optim.AdamW(p, fused=True), 1000)

    assert "_fused_adamw_" in called
    assert "sqrt" not in called


@pytest.mark.parametrize("gpu", ["t4", "cpu"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4095, 2 * 4 * 4095),
        (4096, 2 * (4096 + 4 * 16) + TABLES),
        (optimizers.PAGED_ELEMENTS, 2 * (100_000 + 4 * 391) + TABLES),
    ],
)
def test_8_bit_states(gpu: str, size: int, expected: int) -> None:
    """A byte per number and a scale per 256, in fp32 below 4096 numbers; CUDA updates all of it in place."""
    trace = updated(gpu, bitsandbytes.optim.AdamW8bit, size)

    temporaries = [trace.sizes[n] for n, category in trace.categories.items() if category == "temporaries"]
    assert state_bytes(trace) == expected
    assert bool(temporaries) is (gpu == "cpu")


@pytest.mark.parametrize(("size", "paged"), [(optimizers.PAGED_ELEMENTS - 1, False), (optimizers.PAGED_ELEMENTS, True)])
def test_large_paged_states_are_no_memory_of_pytorch(size: int, paged: bool) -> None:
    """On CUDA their pages are managed by the driver; scales and tables are not paged. A CPU pages nothing."""
    states = 2 * size
    scales = 2 * 4 * -(-size // 256)

    on_gpu = state_bytes(updated("t4", bitsandbytes.optim.PagedAdamW8bit, size))
    on_cpu = state_bytes(updated("cpu", bitsandbytes.optim.PagedAdamW8bit, size))

    assert on_gpu == scales + TABLES + (0 if paged else states)
    assert on_cpu == scales + TABLES + states
