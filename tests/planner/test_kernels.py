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
from shallowflow.planner.profiler.trace import Recorder, Trace, recording
from shallowflow.planner.strategies import WeightFormat
from shallowflow.runtime import quantized
from shallowflow.runtime.simulated import register_quantization
from tests.planner import tiny
from tests.planner.tiny import configuration

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
@pytest.mark.parametrize("recompute", [False, True])
def test_attention_keeps_nothing_quadratic_in_the_tokens(gpu: str, recompute: bool) -> None:
    """With expanded heads and no mask, twice the tokens make no allocation more than twice as large."""

    def largest(tokens: int) -> int:
        def attend(x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

        def work() -> None:
            query = empty(1, HEADS, tokens, HEAD_SIZE)
            out = torch.utils.checkpoint.checkpoint(attend, query, use_reentrant=False) if recompute else attend(query)
            out.sum().backward()

        return max(recorded(gpu, work).sizes)

    assert largest(512) <= 2 * largest(256)


@pytest.mark.parametrize(
    ("gpu", "masked", "kernel"),
    [
        ("t4", False, "_scaled_dot_product_efficient_attention"),
        ("t4", True, "_scaled_dot_product_efficient_attention"),
        ("l4", False, "_scaled_dot_product_flash_attention"),
        ("l4", True, "_scaled_dot_product_efficient_attention"),
        ("cpu", False, "_scaled_dot_product_flash_attention_for_cpu"),
        ("cpu", True, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_attention_takes_the_kernel_of_the_chip(gpu: str, masked: bool, kernel: str, called: list[str]) -> None:
    """Below sm_80 the memory-efficient kernel; from there flash, unless there is a mask; a CPU has its own flash."""
    query = empty(2, HEADS, TOKENS, HEAD_SIZE)
    mask = empty(2, 1, TOKENS, TOKENS, trains=False) if masked else None

    recorded(gpu, lambda: functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))

    assert [name for name in called if "attention" in name] == [kernel]


@pytest.mark.parametrize(("gpu", "fused"), [("t4", False), ("l4", True)])
def test_grouped_heads_need_flash(gpu: str, fused: bool, called: list[str]) -> None:
    """A T4's only fused kernel refuses grouped KV heads, and the math path keeps a score per pair of tokens."""
    query, key = empty(1, HEADS, TOKENS, HEAD_SIZE), empty(1, HEADS // 2, TOKENS, HEAD_SIZE)

    trace = recorded(
        gpu, lambda: functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    )

    scores = HEADS * TOKENS * TOKENS * 2
    assert ("_scaled_dot_product_flash_attention" in called) is fused
    assert (max(trace.sizes) < scores) is fused
    assert (called.count("bmm") == 2) is not fused


@pytest.mark.parametrize(("head_size", "fused"), [(20, False), (24, True)])
def test_heads_that_do_not_align_take_the_math_path(head_size: int, fused: bool, called: list[str]) -> None:
    """The memory-efficient kernel wants rows of whole 16 bytes."""
    query = empty(1, HEADS, TOKENS, head_size)

    recorded("t4", lambda: functional.scaled_dot_product_attention(query, query, query, is_causal=True))

    assert ("_scaled_dot_product_efficient_attention" in called) is fused


@CUDA
@pytest.mark.parametrize(("double", "constants"), [(False, 0), (True, 2)])
def test_a_4_bit_product_unpacks_its_weight(gpu: str, double: bool, constants: int) -> None:
    """While it runs, the whole weight is there in the compute dtype, and doubly quantized constants are in fp32."""
    register_quantization()
    parent = torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False, device="meta"))
    quantized.quantize_linears(parent, "nf4", torch.float16, double)

    trace = recorded(gpu, lambda: parent(empty(2048, 128, trains=False)))

    assert sorted(temporaries(trace)) == sorted([2 * 128 * 256, *constants * [4 * 128 * 256 // 64]])


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


@pytest.mark.parametrize("length", [128, 129])
def test_a_boolean_mask_costs_what_the_kernel_makes_of_it(length: int) -> None:
    """The mask's numbers are shared by all heads, their rows padded to a multiple of 8."""
    query = empty(2, HEADS, length, HEAD_SIZE)
    mask = empty(2, 1, length, length, dtype=torch.bool, trains=False)

    trace = recorded("t4", lambda: functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))

    padded = -(-length // 8) * 8
    assert max(trace.sizes) == 2 * length * padded * 2


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_size", "kv_heads", "expected"),
    [
        # one tile of 64 x 64 sums and a lock per 64 queries and head
        ("t4", torch.float16, 64, 32, [2 * 32 * 1024 * 4, 64 * 16 * (4 * 4096 + 16)]),
        # two such tiles, and keys' and values' sums of 200 // 64 splits
        ("t4", torch.float16, 128, 32, [2 * 32 * 1024 * 4, 64 * (32 * (4 * 4096 + 16) + 2 * 3 * 64 * 128 * 4)]),
        ("l4", torch.float16, 64, 32, [2 * 32 * 1024 * 4, 2 * 32 * 1024 * 64 * 4]),
        ("l4", torch.float16, 64, 8, [2 * 32 * 1024 * 4, 2 * 32 * 1024 * 64 * 4, *2 * [2 * 32 * 1024 * 64 * 2]]),
    ],
)
def test_attention_adds_gradients_up_in_single_precision(
    gpu: str, dtype: torch.dtype, head_size: int, kv_heads: int, expected: list[int]
) -> None:
    """The backward pass's own buffers, computed by hand from the kernels' sources."""
    query = empty(2, 32, 1024, head_size, dtype=dtype)
    key = empty(2, kv_heads, 1024, head_size, dtype=dtype)
    upstream = empty(2, 32, 1024, head_size, dtype=dtype, trains=False)

    def work() -> None:
        out = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=kv_heads != 32)
        out.backward(upstream)

    assert temporaries(recorded(gpu, work)) == expected


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


@pytest.mark.parametrize(("tokens", "rows"), [(16, 16), (64, 32), (200, 64), (800, 256)])
def test_a_cpus_attention_works_in_tiles(tokens: int, rows: int) -> None:
    """Per thread, a tile of scores with two numbers and an output for each row; the backward pass has two tiles."""
    query = empty(1, HEADS, tokens, HEAD_SIZE, dtype=torch.float32)
    columns, threads = min(512, tokens), torch.get_num_threads()

    def work() -> None:
        functional.scaled_dot_product_attention(query, query, query).sum().backward()

    forward, scores, sums, *_ = temporaries(recorded("cpu", work))
    assert forward == threads * rows * (columns + 2 + HEAD_SIZE) * 4
    assert (scores, sums) == (threads * 2 * rows * columns * 4, threads * rows * 4)
