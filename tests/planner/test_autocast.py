"""Autocast on ``meta`` casts what it casts on the target, and keeps what it keeps there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from shallowflow.planner.profiler import autocast
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder, Trace
from tests.planner import tiny

SIZE = 32
HALF, SINGLE = 2 * SIZE * SIZE, 4 * SIZE * SIZE


def recorded(gpu: str, work: Callable[[], object]) -> Trace:
    """What *work* does on *gpu*; its result is kept alive until the end."""
    recorder = Recorder(tiny.target(gpu))
    with recording(recorder):
        kept = work()
        recorder.mark("end")
    del kept
    return recorder.trace


def sizes(trace: Trace) -> list[int]:
    """Bytes of each allocation, but a library's workspace."""
    return [size for number, size in enumerate(trace.sizes) if trace.categories.get(number) != "workspace"]


def square(trains: bool = False, device: str = "meta") -> torch.Tensor:
    """A square matrix in single precision."""
    return torch.empty(SIZE, SIZE, device=device, requires_grad=trains)


@pytest.mark.parametrize(("trains", "casts"), [(True, 1), (False, 2)])
@pytest.mark.parametrize(("gpu", "device", "dtype"), [("t4", "cuda", torch.float16), ("cpu", "cpu", torch.bfloat16)])
def test_a_weight_is_cast_once_if_it_is_trained(
    gpu: str, device: str, dtype: torch.dtype, trains: bool, casts: int
) -> None:
    """The second product finds a trained weight's cast, while a frozen weight is cast again; inputs are cast always."""
    inputs, weight = square(), square(trains)

    def work() -> list[torch.Tensor]:
        with torch.autocast(device, dtype):
            return [functional.linear(inputs, weight), inputs @ weight]

    assert sizes(recorded(gpu, work)) == (2 + casts + 2) * [HALF]


def test_kept_casts_end_with_autocast() -> None:
    """Leaving autocast frees the weights' casts, unless the backward pass needs them."""
    inputs, weight = square(), square(trains=True)

    def work() -> None:
        with torch.autocast("cuda", torch.float16):
            inputs @ weight

    trace = recorded("t4", work)

    assert sizes(trace) == 3 * [HALF]
    assert len([event for event in trace.events if event < 0]) == 3


def test_another_devices_autocast_casts_nothing() -> None:
    """A CPU's autocast leaves what is on a GPU alone."""
    inputs, weight = square(), square()

    def work() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inputs @ weight

    assert sizes(recorded("t4", work)) == [SINGLE]


def test_autocast_of_meta_is_that_of_the_target() -> None:
    """A step that hands its device on to autocast gets the target's, and gradients in the weight's own precision."""
    inputs, weight = square(), square(trains=True)

    def work() -> torch.Tensor:
        with torch.autocast("meta"):
            out = functional.linear(inputs, weight)
        out.sum().backward()
        return out

    trace = recorded("t4", work)

    assert sizes(trace)[:3] == 3 * [HALF]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_autocast_is_off_afterwards() -> None:
    """Nothing is cast once the recording is over, also where it ended in a failure."""

    def work() -> None:
        with torch.autocast("cuda", torch.float16):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recorded("t4", work)

    assert not autocast.is_on()
    assert (square() @ square()).dtype == torch.float32


@pytest.mark.parametrize(("gpu", "device", "expected"), [("t4", "cuda", SINGLE), ("cpu", "cpu", HALF)])
def test_softmax_of_half_precision_is_single_and_one_kernel_on_cuda(gpu: str, device: str, expected: int) -> None:
    """CUDA's autocast gives fp32 probabilities without an fp32 copy of the scores; a CPU's leaves softmax alone."""
    scores = torch.empty(SIZE, SIZE, dtype=torch.float16, device="meta")

    def work() -> torch.Tensor:
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            return scores.softmax(-1)

    assert sizes(recorded(gpu, work)) == [expected]


@pytest.mark.parametrize(
    "work",
    [
        torch.matmul,
        torch.mm,
        functional.linear,
        functional.mse_loss,
        lambda x, y: functional.scaled_dot_product_attention(*3 * [(x + y)[None, None]]),
        lambda x, y: functional.cross_entropy(x @ y, y),
        lambda x, y: functional.layer_norm(x @ y, (SIZE,)),
        lambda x, y: (x @ y).softmax(-1),
        lambda x, y: torch.cat([x @ y, x]),
        lambda x, y: (x @ y).pow(2).mean() + x.exp().sum(),
        lambda x, y: functional.gelu(x @ y) * y,
    ],
)
def test_dtypes_are_those_of_a_real_cpu(work: Callable[..., torch.Tensor]) -> None:
    """On a CPU target every result has the dtype that PyTorch's own autocast gives real tensors."""

    def made(device: str) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return work(square(device=device), square(device=device))

    dtypes: list[torch.dtype] = []
    recorded("cpu", lambda: dtypes.append(made("meta").dtype))

    assert dtypes == [made("cpu").dtype]


@pytest.mark.parametrize(("device", "least"), [("cpu", 40), ("cuda", 60)])
def test_policies_are_those_of_this_pytorch(device: str, least: int) -> None:
    """The tables name operators that this PyTorch casts, and hardly any that it does not."""
    assert len(autocast._policies(device)) >= least
