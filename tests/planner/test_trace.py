"""A trace tells a whole step: in order, every byte by name, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest

from shallowflow.planner.profiler.simulate import traced_peak
from shallowflow.planner.profiler.trace import Trace
from shallowflow.planner.strategies import Activations, Configuration, WeightFormat
from shallowflow.profiles import load_gpu
from tests.planner import tiny
from tests.planner.tiny import LLAMA, configuration

STEPS = pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("llama", configuration("fp16", "save")),
        ("llama", configuration("nf4", "recompute", gradient_accumulation_steps=2)),
        ("gpt2", configuration("int8", "recompute", num_layers=4)),
        ("gpt_neox", configuration("nf4", "save", num_layers=2, gradient_accumulation_steps=2)),
    ],
    ids=["llama fp16 save", "llama nf4 recompute twice", "gpt2 int8 recompute", "gpt_neox nf4 save twice"],
)
LINEARS = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64))
"""(in, out) of the seven linear modules of one tiny llama layer."""


def events_before(trace: Trace, label: str) -> int:
    """The number of events before the last mark called *label* that belongs to a training step."""
    end = next((position for position, name in trace.marks if name == "evaluation"), len(trace.events))
    return max(position for position, name in trace.marks if name == label and (name == "end" or position <= end))


def live_after(trace: Trace, position: int) -> set[int]:
    """Allocations that live after *position* events."""
    live: set[int] = set()
    for event in trace.events[:position]:
        live = live | {event - 1} if event > 0 else live - {-event - 1}
    return live


def bytes_by_category(trace: Trace, numbers: set[int]) -> Counter[str]:
    """What these allocations come to."""
    totals: Counter[str] = Counter()
    for number in numbers:
        totals[trace.categories.get(number, "other")] += trace.sizes[number]
    return totals


@STEPS
def test_marks_tell_a_step_in_order(family: str, chosen: Configuration) -> None:
    """Forward through the layers, backward through them in reverse, once per micro-batch, then the update."""
    layers = range(chosen.num_layers)

    marks = [label for _, label in tiny.traced(family, "t4", chosen).marks]

    micro_batch = ["embed", *(f"forward {i}" for i in layers), "head", "backward"]
    micro_batch += [*(f"backward {i}" for i in reversed(layers)), "end backward"]
    update = ["optimizer", "end optimizer"]
    evaluation = ["evaluation", "embed", *(f"forward {i}" for i in layers), "head"]
    accumulated = chosen.gradient_accumulation_steps * micro_batch
    assert marks == ["step 0", *micro_batch, *update, "step 1", *accumulated, *update, *evaluation, "end"]


@STEPS
def test_marks_and_operators_come_in_the_order_of_events(family: str, chosen: Configuration) -> None:
    """Positions never go back and never point beyond the events."""
    trace = tiny.traced(family, "t4", chosen)

    for positions in ([p for p, _ in trace.marks], [p for p, _ in trace.ops]):
        assert positions == sorted(positions)
        assert positions[-1] <= len(trace.events)


@STEPS
def test_nothing_is_freed_before_it_was_made_nor_twice(family: str, chosen: Configuration) -> None:
    """Allocations are numbered in the order of their births, and each dies at most once and later."""
    trace = tiny.traced(family, "t4", chosen)

    births = [event for event in trace.events if event > 0]
    assert births == list(range(1, len(trace.sizes) + 1))
    born = {event: position for position, event in enumerate(trace.events) if event > 0}
    deaths = [(-event, position) for position, event in enumerate(trace.events) if event < 0]
    assert len({key for key, _ in deaths}) == len(deaths)
    assert all(born[key] < position for key, position in deaths)


@STEPS
def test_every_allocation_has_bytes_and_a_phase(family: str, chosen: Configuration) -> None:
    """Nothing of no size is noted, and the lists that describe allocations are as long as there are allocations."""
    trace = tiny.traced(family, "t4", chosen)

    assert min(trace.sizes) > 0
    assert len(trace.sizes) == len(trace.phases) == len(trace.modules)
    assert set(trace.phases) == {"load", "forward", "backward", "optimizer"}


@pytest.mark.parametrize("activations", ["save", "recompute"])
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_a_step_leaves_behind_what_it_found(weight_format: WeightFormat, activations: Activations) -> None:
    """After the optimizer's state exists, the same allocations live before a step and after it."""
    trace = tiny.traced("llama", "t4", configuration(weight_format, activations))

    assert live_after(trace, events_before(trace, "step 1")) == live_after(trace, events_before(trace, "evaluation"))


@STEPS
def test_gradients_are_born_in_the_backward_pass_and_gone_after_the_update(family: str, chosen: Configuration) -> None:
    """Each of the two steps makes one fp32 gradient per adapter weight, and keeps none."""
    trace = tiny.traced(family, "t4", chosen)
    adapter = bytes_by_category(trace, live_after(trace, events_before(trace, "end")))["adapter"]

    gradients = {number for number, category in trace.categories.items() if category == "gradients"}

    assert {trace.phases[number] for number in gradients} == {"backward"}
    assert sum(trace.sizes[number] for number in gradients) == 2 * adapter
    assert not gradients & live_after(trace, events_before(trace, "end"))
    assert len(gradients & live_after(trace, events_before(trace, "optimizer"))) == len(gradients) // 2


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_residents_are_counted_to_the_byte(weight_format: WeightFormat, rank: int) -> None:
    """Weights, constants, adapter and AdamW's two moments come to what their formats say, worked out by hand."""
    layers, hidden, vocabulary = 3, LLAMA["hidden_size"], LLAMA["vocab_size"]
    trace = tiny.traced("llama", "t4", configuration(weight_format, "save", rank=rank))

    held = bytes_by_category(trace, live_after(trace, events_before(trace, "step 1")))

    weights, rows = sum(a * b for a, b in LINEARS), sum(out for _, out in LINEARS)
    per_weight = {"fp16": 2.0, "int8": 1.0, "nf4": 0.5}[weight_format]
    constants = {"fp16": 0, "int8": 4 * rows, "nf4": 4 * weights // 64 + len(LINEARS) * 16 * 4}[weight_format]
    norms = (2 * layers + 1) * hidden * 2
    rotary = 2 * hidden // LLAMA["num_attention_heads"] // 2 * 4
    assert held["base weights"] == layers * weights * per_weight + 2 * hidden * vocabulary * 2 + norms + rotary
    assert held["quantization constants"] == layers * constants
    assert held["adapter"] == 4 * layers * rank * sum(a + b for a, b in LINEARS)
    assert held["optimizer"] == 2 * held["adapter"]


@pytest.mark.parametrize(
    ("family", "weight_format", "activations", "plain", "with_bias"),
    [
        ("llama", "fp16", "save", 2, 0),
        ("llama", "nf4", "recompute", 2, 0),
        ("gpt2", "fp16", "save", 2, 1),
        ("gpt2", "fp16", "recompute", 2, 2),
        ("gpt2", "nf4", "save", 2, 1),
        ("gpt_neox", "nf4", "recompute", 2, 2),
    ],
)
def test_each_thread_keeps_the_workspaces_of_the_libraries_it_needs(
    family: str, weight_format: WeightFormat, activations: Activations, plain: int, with_bias: int
) -> None:
    """A thread that multiplies keeps cuBLAS's workspace, and cuBLASLt's where it adds a bias, each once."""
    trace = tiny.traced(family, "t4", configuration(weight_format, activations))

    workspaces = {number for number, category in trace.categories.items() if category == "workspace"}

    assert sorted(trace.sizes[number] for number in workspaces) == with_bias * [2**20] + plain * [8_519_680]
    assert workspaces <= live_after(trace, events_before(trace, "end"))


def test_a_cpu_has_no_workspace() -> None:
    """cuBLAS is CUDA's."""
    trace = tiny.traced("gpt2", "cpu", configuration("fp32", "save"))

    assert "workspace" not in trace.categories.values()


def test_recomputation_lets_layers_forget() -> None:
    """Recomputed layers hold one hidden state each where saved ones hold all that their backward pass needs."""
    at_head: dict[str, int] = {}
    for activations in ("save", "recompute"):
        chosen = configuration("fp16", activations, num_layers=4)
        trace = tiny.traced("llama", "t4", chosen)
        first, head = events_before(trace, "forward 0"), events_before(trace, "head")

        at_head[activations] = sum(trace.sizes[n] for n in live_after(trace, head) - live_after(trace, first))

    tokens = 2 * 64
    assert at_head["recompute"] == 4 * tokens * LLAMA["hidden_size"] * 2
    assert at_head["save"] > 10 * at_head["recompute"]


@STEPS
@pytest.mark.parametrize("gpu", ["t4", "l4"])
def test_the_breakdown_sums_to_the_process(family: str, chosen: Configuration, gpu: str) -> None:
    """Categories at the peak, fragmentation and context come to reserved plus context, each more than nothing."""
    context = load_gpu(gpu).context_bytes

    peak = traced_peak(tiny.meta_step(family, gpu, chosen), tiny.target(gpu), context)

    assert sum(part.num_bytes for part in peak.parts) == peak.peak_reserved_bytes + context
    assert all(part.num_bytes > 0 for part in peak.parts)
    assert len({part.category for part in peak.parts}) == len(peak.parts)
    assert peak.resident_bytes <= peak.peak_allocated_bytes <= peak.peak_reserved_bytes


def test_a_cpu_reserves_what_it_allocates() -> None:
    """No cache and no rounding: the highest sum of live sizes is the peak."""
    chosen = configuration("fp32", "recompute")
    trace = tiny.traced("llama", "cpu", chosen)

    peak = traced_peak(tiny.meta_step("llama", "cpu", chosen), tiny.target("cpu"))

    changes = [trace.sizes[event - 1] if event > 0 else -trace.sizes[-event - 1] for event in trace.events]
    assert peak.peak_allocated_bytes == peak.peak_reserved_bytes == max(accumulate(changes))
    assert not {"fragmentation", "context", "workspace"} & {part.category for part in peak.parts}
