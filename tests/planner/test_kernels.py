"""On ``meta`` the recorder sees what the target's kernels would run and allocate."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from shallowflow.planner.profiler import operators, shapes
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder, Trace
from shallowflow.planner.strategies import WeightFormat
from shallowflow.runtime import quantized
from shallowflow.runtime.simulated import register_quantization
from tests.planner import tiny
from tests.planner.kernel_traces import CUDA, HEADS, TOKENS, empty, recorded, temporaries
from tests.planner.tiny import configuration


@pytest.mark.parametrize(("gpu", "copies"), [("t4", 1), ("l4", 1), ("cpu", 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_softmax_backward_takes_a_temporary_on_cuda(gpu: str, copies: int, dtype: torch.dtype) -> None:
    """CUDA multiplies gradient and output into as many bytes again before it reduces; a CPU does not."""
    scores = empty(2, HEADS, TOKENS, TOKENS, dtype=dtype)

    def work() -> None:
        probabilities = scores.softmax(-1)
        probabilities.backward(torch.empty_like(probabilities))

    assert temporaries(recorded(gpu, work)) == copies * [scores.numel() * scores.element_size()]


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("home", [functional, torch])
@pytest.mark.parametrize(
    ("gpu", "dtype", "casts"),
    [
        ("t4", torch.float16, False),
        ("l4", torch.bfloat16, True),
        ("t4", torch.float32, False),
        ("cpu", torch.float16, True),
    ],
)
def test_half_softmax_to_single_is_one_kernel_on_cuda(
    home: ModuleType, name: str, gpu: str, dtype: torch.dtype, casts: bool
) -> None:
    """CUDA's kernel casts fp16 by itself, so that no fp32 copy of the scores is made; other dtypes are cast first."""
    scores = empty(2, HEADS, TOKENS, TOKENS, dtype=dtype)

    trace = recorded(gpu, lambda: getattr(home, name)(scores, dim=-1, dtype=torch.float32))

    assert trace.sizes == (2 if casts else 1) * [4 * scores.numel()]


@CUDA
@pytest.mark.parametrize(("double", "constants"), [(False, 0), (True, 2)])
def test_a_4_bit_product_unpacks_its_weight(gpu: str, double: bool, constants: int) -> None:
    """While it runs, the whole weight is there in the compute dtype, and doubly quantized constants are in fp32."""
    register_quantization()
    parent = torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False, device="meta"))
    quantized.quantize_linears(parent, "nf4", torch.float16, double)

    trace = recorded(gpu, lambda: parent(empty(2048, 128, trains=False)))

    assert sorted(temporaries(trace)) == sorted([2 * 128 * 256, *constants * [4 * 128 * 256 // 64]])


@pytest.mark.parametrize(("gpu", "tokens", "sorts"), [("t4", 3072, False), ("t4", 3073, True), ("cpu", 4000, False)])
def test_many_tokens_are_sorted_for_an_embeddings_gradient(gpu: str, tokens: int, sorts: bool) -> None:
    """CUDA then sums them in rows of fp32 of their own, beside six lists of their numbers."""
    table = empty(50, 8, dtype=torch.float32).requires_grad_()
    chosen = torch.empty(tokens, dtype=torch.int64, device="meta")

    def work() -> None:
        functional.embedding(chosen, table).backward(empty(tokens, 8, dtype=torch.float32))

    found = temporaries(recorded(gpu, work))
    assert found == ([*(6 * [8 * tokens]), 4 * 8 * tokens] if sorts else [])


def test_a_view_is_no_allocation() -> None:
    """What shares memory with its input is the same storage, though the schema of ``_unsafe_view`` hides it."""
    func = torch.ops.aten._unsafe_view.default
    shapes._fresh.pop(func, None)
    matrix = empty(8, 4, trains=False)

    def work() -> list[torch.Tensor]:
        copy = matrix.clone()
        return [copy, *(func(copy, [4, 8]) for _ in range(3)), copy.view(32), copy.t(), copy[1:], copy.detach()]

    trace = recorded("t4", work)

    assert trace.sizes == [8 * 4 * 2]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_remembered_shapes_change_nothing(
    family: str, weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step traced with every shape worked out anew, with an empty memory and with a full one, is the same trace."""

    def forgetful(func: Any, implementation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = implementation(*args, **kwargs)
        return out, () if operators.is_view(func) else operators.costs(func, args, kwargs, out)

    chosen = configuration(weight_format, "recompute", gradient_accumulation_steps=2)
    traces: list[Trace] = []
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "call", forgetful)
        traces.append(tiny.traced.__wrapped__(family, "t4", chosen))
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_known", {})
        traces += [tiny.traced.__wrapped__(family, "t4", chosen) for _ in range(2)]
        assert shapes._known

    for trace in traces[1:]:
        assert trace == traces[0]


def test_questions_about_data_get_the_answers_of_a_healthy_step() -> None:
    """Without data a finite norm is zero, a check is passed, and equal shapes are equal."""
    answers: list[object] = []

    def work() -> None:
        answers.append(empty(trains=False).item())
        answers.append(torch.empty((), dtype=torch.bool, device="meta").item())
        answers.append(torch.equal(empty(3, trains=False), empty(3, trains=False)))

    recorded("t4", work)

    assert answers == [0.0, 1, True]


def test_real_tensors_answer_for_themselves() -> None:
    """A recorder in the way changes no number that is really there."""
    answers: list[object] = []

    def work() -> None:
        answers.append(torch.tensor(2.5).item())
        answers.append(torch.equal(torch.ones(2), torch.zeros(2)))

    recorded("t4", work)

    assert answers == [2.5, False]


def test_the_garbage_collector_does_not_decide_when_memory_is_free() -> None:
    """What only a cycle holds lives on while a step is recorded, and the collector is put back afterwards."""

    def work() -> list[list[int]]:
        cycle: list[object] = [empty(4, trains=False)]
        cycle.append(cycle)
        del cycle
        return [[number] for number in range(10_000)]

    trace = recorded("t4", work)

    assert [position for position, label in trace.marks if label == "end"] == [1]
    assert gc.isenabled()


def test_recording_leaves_no_trace_behind() -> None:
    """After the context, also after a failure in it, nothing is recorded and the engine is as it was."""
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    recorder = Recorder(tiny.target("t4"))
    vector, layer = empty(4, trains=False), torch.nn.Linear(2, 2, device="meta")

    def fail() -> None:
        with recording(recorder):
            vector.clone()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    vector.clone()
    layer(empty(1, 2, dtype=torch.float32)).sum().backward()
    assert recorder.trace.events == [1, -1]
    assert torch.autograd._engine_run_backward is engine  # type: ignore[attr-defined]


@pytest.mark.parametrize(("gpu", "kept"), [("t4", 1), ("l4", 1), ("cpu", 4)])
@pytest.mark.parametrize("home", [functional, torch])
def test_dropout_keeps_a_mask(gpu: str, kept: int, home: ModuleType) -> None:
    """CUDA's fused kernel keeps a byte per element for the backward pass, a CPU the scaled mask in fp32."""
    values = empty(64, 64, dtype=torch.float32)

    trace = recorded(gpu, lambda: home.dropout(values, 0.1, True))

    live = {event for event in trace.events if event > 0 and -event not in trace.events[: trace.marks[0][0]]}
    assert sorted(trace.sizes[event - 1] for event in live) == sorted([4 * 64 * 64, kept * 64 * 64])


@pytest.mark.parametrize("gpu", ["t4", "cpu"])
@pytest.mark.parametrize(
    ("work", "in_place"),
    [
        (lambda x: x.sin().sum() + x.exp().sum(), 1),
        (lambda x: x.sin().sum() + x.exp().sum() + x.cos().sum(), 2),
        (lambda x: x.exp().sum() + x.view(-1).sin().sum(), 0),
        (lambda x: x.cos().sum() + x.exp().sum() + x.view(-1).sin().sum(), 1),
    ],
)
def test_gradients_add_up_in_place_where_nobody_sees_it(
    gpu: str, work: Callable[[torch.Tensor], torch.Tensor], in_place: int, called: list[str]
) -> None:
    """Autograd adds to a gradient of its own, and makes a third where the first is a view of another."""
    leaf = empty(64, 64, dtype=torch.float32)

    recorded(gpu, lambda: work(leaf * 1.0).backward())

    assert called.count("add_") == in_place


def test_gradients_added_by_a_users_own_function_are_new() -> None:
    """A sum that Python code makes in a backward pass is no accumulation of autograd's."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            half = gradient * 0.5
            whole = half + gradient
            assert whole is not half
            return whole + half

    leaf = empty(8, dtype=torch.float32)

    recorded("t4", lambda: Twice.apply(leaf).sum().backward())  # type: ignore[no-untyped-call]

    assert leaf.grad is not None


def test_remembered_shapes_know_the_default_dtype() -> None:
    """Factories that name no dtype follow the default, whatever they returned before."""
    sizes: list[int] = []
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float16, torch.float32):
            torch.set_default_dtype(dtype)
            sizes += recorded("t4", lambda: torch.empty(77, device="meta")).sizes
    finally:
        torch.set_default_dtype(before)

    assert sizes == [4 * 77, 2 * 77, 4 * 77]


@pytest.mark.parametrize(("gpu", "expected"), [("cpu", [4 * 32]), ("t4", [4 * 32])])
def test_what_goes_from_the_cpu_to_the_cpu_stays_where_it_is(gpu: str, expected: list[int]) -> None:
    """A tensor made on the CPU is a CPU target's memory once, and a GPU's from the moment that it is sent there."""
    trace = recorded(gpu, lambda: torch.zeros(32, device="cpu").to("meta"))

    assert trace.sizes == expected
    assert trace.events[: trace.marks[0][0]] == [1]


def test_recomputation_keeps_the_random_state() -> None:
    """A CPU's generator has a state of some kilobytes, kept from the forward pass and saved in the backward pass."""
    state = torch.get_rng_state().numel()

    def work() -> None:
        values = empty(8, dtype=torch.float32)
        torch.utils.checkpoint.checkpoint(torch.sin, values, use_reentrant=False).sum().backward()

    assert recorded("cpu", work).sizes.count(state) == 2
    assert recorded("t4", work).sizes.count(state) == 0
