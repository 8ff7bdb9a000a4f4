"""What is computed again: no product that nothing needs, and no weight is dequantized more often than it must be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shallowflow.planner.strategies import Activations, Adapter, Strategy
from shallowflow.runtime import adapter, again
from shallowflow.runtime.step import Trainee, make_trainee
from tests.planner import tiny as traced
from tests.runtime import reference, tiny
from tests.strategies import POLICIES

REUSING = [policy for policy in POLICIES if Strategy(weight_format="nf4", activations=policy).reuses_weights]
BATCH = tiny.random_batch([16, 9])


class Dequantizations(TorchDispatchMode):
    """How often each packed weight is made into numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("gemm_4bit", "dequantize_4bit"):
            self.counts[args[name == "gemm_4bit"].untyped_storage().data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def dequantized(trainee: Trainee) -> dict[str, int]:
    """How often each linear module of an inner layer makes its weight in one micro-batch."""
    counts = Dequantizations()
    with counts:
        trainee.loss(BATCH).backward()
    found: dict[str, int] = {}
    for name, module in trainee.layers[1].named_modules():
        if type(module).__name__ == "Linear4bit" and isinstance(module.weight, torch.Tensor):
            found[name.removesuffix(".base_layer")] = counts.counts[module.weight.untyped_storage().data_ptr()]
    assert len(found) == 7
    return found


@pytest.mark.parametrize("kind", get_args(Adapter))
@pytest.mark.parametrize("activations", POLICIES)
def test_a_weight_is_dequantized_as_often_as_it_must_be(activations: Activations, kind: Adapter) -> None:
    """Once to go forward and once to go back, and once more to be computed again by other weights than are kept.

    What a part ends with is not computed again, unless its result is needed, as by DoRA.
    """
    found = dequantized(tiny.trainee("nf4", activations, adapter=kind))

    inside = {"recompute": "", "recompute attention": "self_attn.", "recompute mlp": "mlp."}.get(activations, "nowhere")
    last = "self_attn.o_proj" if activations == "recompute attention" else "mlp.down_proj"
    again = {name for name in found if name.startswith(inside) and (name != last or kind == "dora")}
    assert found == {name: 3 if name in again else 2 for name in found}


@pytest.mark.parametrize("activations", REUSING)
def test_weights_are_reused_without_an_adapter(activations: Activations) -> None:
    """Modules that learn nothing are gone back through by the weights that they were computed again with."""
    gradients: list[list[torch.Tensor]] = []
    for policy in ("save", activations):
        chosen = replace(tiny.configuration("nf4", policy), target_modules=("q_proj",))
        trainee = make_trainee(tiny.base(), chosen, "float32", tiny.CPU)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainee.parameters:
                parameter.normal_(std=0.05)
        assert max(dequantized(trainee).values()) == 2
        gradients.append([p.grad for p in trainee.parameters if p.grad is not None])

    assert all(float(gradient.norm()) > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "activations", "module", "times"),
    [
        ("llama", "recompute", "mlp.down_proj", 1),
        ("llama", "recompute", "mlp.up_proj", 2),
        ("llama", "recompute attention", "self_attn.o_proj", 1),
        ("llama", "recompute mlp", "mlp.down_proj", 1),
        ("gpt2", "recompute", "mlp.c_proj", 1),
        ("gpt_neox", "recompute", "mlp.dense_4h_to_h", 1),
        ("gemma2", "recompute", "mlp.down_proj", 2),  # a norm follows, which needs the product
        ("gemma2", "recompute mlp", "mlp.down_proj", 1),
    ],
)
@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
def test_the_last_product_is_not_computed_again(
    family: str, activations: Activations, module: str, times: int, weight_format: Any
) -> None:
    """Its result is no activation that the backward pass needs, where nothing follows it."""
    chosen = replace(tiny.configuration(weight_format, activations, reference.NUM_LAYERS), loss_chunks=1)
    trainee = reference.trainee(family, chosen, "float32")
    calls: list[str] = []
    trainee.layers[1].get_submodule(f"{module}.base_layer").register_forward_hook(lambda *_: calls.append(module))

    for _ in range(2):
        trainee.loss(BATCH).backward()

    assert len(calls) == 2 * times


def test_only_a_part_that_is_computed_again_ends() -> None:
    """It ends with what it called last; elsewhere, and while it is computed first, nothing does."""
    part, first, last = again.Part(), object(), object()
    computing, recomputing = part.contexts()

    assert not again.ends_with(last)
    with computing:
        assert not any(again.ends_with(module) for module in (first, last))
    with recomputing:
        assert [again.ends_with(module) for module in (first, last)] == [False, True]
    assert not again.ends_with(last)


@pytest.mark.parametrize("has_bias", [False, True])
def test_in_two_parts_it_is_the_same_function(has_bias: bool) -> None:
    """Results and derivatives of a product whose recomputation went on are those of the product in one."""
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 3, bias=has_bias, dtype=torch.float64).requires_grad_(False)
    x, down, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 4), (2, 4), (3, 2))
    )

    def run(*tensors: torch.Tensor) -> Any:
        stand_in, inner, kept = adapter._applied(adapter._Ahead, *tensors, base, 0.5)
        return adapter._applied(adapter._After, stand_in, tensors[0], inner, tensors[2], base, kept)

    torch.testing.assert_close(run(x, down, up), adapter._applied(adapter._Adapted, x, down, up, base, 0.5))
    assert torch.autograd.gradcheck(run, (x, down, up))


def test_reused_weights_live_as_long_as_they_are_needed() -> None:
    """None outlives its layer's forward pass; in the backward pass the one that is used first goes first."""
    chosen = traced.configuration("nf4", "recompute reusing weights", sequence_length=96)
    trace = traced.traced("llama", "t4", chosen)
    hidden, wide, shared = 64, 176, 32
    sizes = {2 * hidden * other for other in (hidden, wide, shared)}
    step = next(position for position, label in trace.marks if label == "step 1")
    start = next(position for position, label in trace.marks if label == "backward" and position > step)
    place = {event: position for position, event in enumerate(trace.events)}

    weights = [n for n, size in enumerate(trace.sizes) if size in sizes and trace.stages[n] == "temporaries"]
    forward = [n for n in weights if step < place[n + 1] < start]
    backward = [n for n in weights if place[n + 1] > start and trace.phases[n] == "backward"]

    assert len(forward) == len(backward) == 3 * 7 - 3
    assert all(place[-(n + 1)] < start for n in forward)
    for layer in range(3):
        mine = backward[layer * 7 : (layer + 1) * 7]
        ends = [place[-(n + 1)] for n in mine]
        assert ends == sorted(ends, reverse=True)
