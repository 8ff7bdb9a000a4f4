"""Our kernel for nf4 gives what bitsandbytes' gives, to the bit, and stands in for it only where it wins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shallowflow.runtime import dequantizing, nf4_kernel, quantized
from tests.runtime import tiny

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".venv" / "triton"
"""Where `make test` puts it: apart, because PyTorch would load it wherever it is installed."""


@pytest.mark.skipif(not TRITON.exists(), reason="Triton is fetched by `make test`")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_in_tritons_interpreter_it_is_bitsandbytes_to_the_bit(dtype: str) -> None:
    """Weights of whatever shape, blocks that are not full and constants in 8 bits included."""
    places = [str(ROOT / "src"), str(ROOT), str(TRITON)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "tests.runtime.interpreted", dtype]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 8


def plain(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """What the kernel does, one operation after the other."""
    pairs = packed.flatten().to(torch.int64)
    values = table[torch.stack([pairs >> 4, pairs & 15], dim=1)].view(-1, block) * absmax.unsqueeze(1)
    out.copy_(values.view(out.shape))


def wrong(packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block: int, out: torch.Tensor) -> None:
    """The same but for one element."""
    plain(packed, absmax, table, block, out)
    out[0, 0] += 1


def theirs(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, dtype: torch.dtype, out: torch.Tensor
) -> None:
    """As in bitsandbytes' CUDA backend, on a CPU."""
    out.copy_(torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, blocksize, quant_type, out.shape, dtype))


class Clock:
    """Says of each function in turn what it is told to, once it has run."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)

    def __call__(self, run: Any) -> float:
        run()
        return self.seconds.pop(0)


@pytest.fixture
def home() -> Iterator[Any]:
    """A stand-in for bitsandbytes' module."""
    yield SimpleNamespace(_dequantize_4bit_impl=theirs)
    dequantizing.restore()


def module(*, double_quantization: bool = False) -> Any:
    """A quantized linear module."""
    parent = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False))
    quantized.quantize_linears(parent, "nf4", torch.float16, double_quantization)
    return parent[0]


@pytest.mark.parametrize("double_quantization", [False, True])
def test_the_faster_one_dequantizes(home: Any, double_quantization: bool) -> None:
    """What is right and faster takes over, gives the same numbers, and goes when it is told to."""
    made = module(double_quantization=double_quantization)

    found = dequantizing.compare(made, home, plain, Clock(3.0, 2.0))

    assert (found.kernel, found.num_elements) == ("own", 128 * 96)
    assert (found.bitsandbytes_seconds, found.own_seconds) == (3.0, 2.0)
    assert home._dequantize_4bit_impl is not theirs
    state, out = made.weight.quant_state, torch.empty(96, 128, dtype=torch.float16)
    constants = dequantizing._constants(state)
    home._dequantize_4bit_impl(made.weight.data, constants, 64, "nf4", torch.float16, out=out)
    assert torch.equal(out, quantized.weight_of(made, torch.float16))
    dequantizing.restore()
    assert home._dequantize_4bit_impl is theirs


@pytest.mark.parametrize(("ours", "clock", "seconds"), [(plain, (2.0, 3.0), 3.0), (wrong, (2.0, 1.0), None)])
def test_what_is_slower_or_wrong_does_not(
    home: Any, ours: Any, clock: tuple[float, ...], seconds: float | None
) -> None:
    """bitsandbytes stays, and what was tried is told."""
    found = dequantizing.compare(module(), home, ours, Clock(*clock))

    assert (found.kernel, found.bitsandbytes_seconds, found.own_seconds) == ("bitsandbytes", 2.0, seconds)
    assert home._dequantize_4bit_impl is theirs


def test_what_the_kernel_is_not_for_is_left_alone(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other types of 4 bits, and more elements than it counts, go to bitsandbytes."""
    made = module()
    dequantizing.compare(made, home, plain, Clock(3.0, 2.0))
    asked: list[str] = []
    state, out = made.weight.quant_state, torch.empty(96, 128, dtype=torch.float16)

    def note(*arguments: Any, out: torch.Tensor) -> None:
        asked.append(arguments[3])

    run = home._dequantize_4bit_impl
    run.func(note, *run.args[1:], made.weight.data, state.absmax, 64, "fp4", torch.float16, out=out)
    monkeypatch.setattr(nf4_kernel, "MOST_ELEMENTS", 128)
    run.func(note, *run.args[1:], made.weight.data, state.absmax, 64, "nf4", torch.float16, out=out)

    assert asked == ["fp4", "nf4"]


def test_without_a_gpu_or_nf4_there_is_no_choice() -> None:
    """Nothing is tried, and nothing is told."""
    assert dequantizing.choose(tiny.trainee("nf4").model, tiny.CPU) is None
    assert dequantizing.choose(tiny.trainee("int8").model, torch.device("cuda", 0)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_trial_that_fails_costs_nothing() -> None:
    """Where Triton, a compiler or the device is missing, bitsandbytes dequantizes and no error is seen."""
    assert dequantizing.choose(tiny.trainee("nf4").model, torch.device("cuda", 0)) is None
    assert dequantizing._replaced == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_winner_is_right() -> None:
    """Whoever dequantizes, the numbers are those of a CPU, and the allocator holds what it held."""
    trainee = tiny.trainee("nf4", compute_dtype="float16")
    expected = [quantized.weight_of(m, torch.float16) for m in trainee.model.modules() if quantized.is_quantized(m)]
    device = torch.device("cuda", 0)
    trainee.model.to(device)
    before = torch.cuda.memory_reserved(device)

    found = dequantizing.choose(trainee.model, device)

    try:
        assert found is not None and found.own_seconds is not None
        assert torch.cuda.memory_reserved(device) <= before
        made = [quantized.weight_of(m, torch.float16) for m in trainee.model.modules() if quantized.is_quantized(m)]
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(made, expected, strict=True))
    finally:
        dequantizing.restore()
