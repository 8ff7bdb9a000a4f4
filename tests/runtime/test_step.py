"""One optimizer update: the same gradients however the batch is cut, stored or scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shallowflow.planner.strategies import Activations, WeightFormat
from shallowflow.runtime import quantized
from shallowflow.runtime.activations import has_dropout, part
from shallowflow.runtime.precision import LossScale
from shallowflow.runtime.step import MAX_GRADIENT_NORM, MicroBatch, StepOutcome, Trainee, make_trainee
from tests.runtime import tiny

BATCH = tiny.random_batch([16, 9, 3, 12])


def gradients(trainee: Trainee, micro_batches: Sequence[MicroBatch]) -> tuple[list[torch.Tensor], StepOutcome]:
    """What the optimizer is handed in one step; nothing where the step is skipped."""
    seen: list[torch.Tensor] = []

    def keep(*_arguments: object) -> None:
        seen.extend(p.grad.clone() for p in trainee.parameters if p.grad is not None)

    handle = trainee.optimizer.register_step_pre_hook(keep)
    outcome = trainee.step(micro_batches)
    handle.remove()
    return seen, outcome


def times(trainee: Trainee, factor: float) -> None:
    """Multiply every gradient from now on."""
    for parameter in trainee.parameters:
        parameter.register_hook(lambda gradient: gradient * factor)


def norm(tensors: Sequence[torch.Tensor]) -> float:
    """The Euclidean norm of all entries together."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def unclipped(trainee: Trainee, micro_batches: Sequence[MicroBatch]) -> tuple[list[torch.Tensor], StepOutcome]:
    """Gradients made so small that no clipping touches them."""
    times(trainee, 2.0**-20)
    return gradients(trainee, micro_batches)


# Accumulation


@pytest.mark.parametrize("counts", [[8, 8, 8, 8], [16, 1, 1, 2], [0, 16, 5, 0]], ids=["even", "uneven", "empty rows"])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [2, 2], [3, 1]], ids=str)
def test_accumulation_equals_one_big_batch(counts: list[int], cuts: list[int]) -> None:
    """However a batch is cut, into micro-batches of any number of targets, gradients, loss and norm are the whole's."""
    whole = tiny.random_batch(counts)
    parts: list[MicroBatch] = []
    for tokens, labels in zip(whole.input_ids.split(cuts), whole.labels.split(cuts), strict=True):
        parts.append(MicroBatch(tokens, labels, int((labels >= 0).sum())))

    together, expected = unclipped(tiny.trainee(), [whole])
    accumulated, outcome = unclipped(tiny.trainee(), parts)

    torch.testing.assert_close(accumulated, together, rtol=1e-4, atol=1e-5 * norm(together))
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)
    assert outcome.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_the_loss_is_the_mean_over_targets() -> None:
    """The reported loss is the cross-entropy per learned token, as computed in double precision from the logits."""
    trainee = tiny.trainee()
    with torch.no_grad():
        logits = trainee.model(input_ids=BATCH.input_ids).logits.double().log_softmax(-1)
    places = [(r, t, int(label)) for r, row in enumerate(BATCH.labels) for t, label in enumerate(row) if label >= 0]
    expected = -sum(float(logits[place]) for place in places) / len(places)

    assert trainee.step([BATCH]).loss == pytest.approx(expected, rel=1e-5)


def test_an_update_lowers_the_loss() -> None:
    """Learning one batch again and again makes it likelier."""
    trainee = tiny.trainee()
    for group in trainee.optimizer.param_groups:
        group["lr"] = 1e-2

    losses = [trainee.step([BATCH]).loss for _ in range(8)]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


# Recomputation


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("activations", [policy for policy in get_args(Activations) if policy != "save"])
def test_no_policy_changes_a_gradient(weight_format: WeightFormat, activations: Activations) -> None:
    """Computing activations again, or fetching them from the host, gives bit for bit the gradients of keeping them."""
    saved, _ = unclipped(tiny.trainee(weight_format, "save"), [BATCH])
    otherwise, _ = unclipped(tiny.trainee(weight_format, activations), [BATCH])

    assert norm(saved) > 0
    torch.testing.assert_close(otherwise, saved, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("activations", "again"),
    [
        ("save", ()),
        ("recompute", ("self_attn.q_proj", "mlp.up_proj")),
        ("recompute attention", ("self_attn.q_proj",)),
        ("recompute mlp", ("mlp.up_proj",)),
        ("offload", ()),
    ],
)
def test_recomputation_runs_what_it_forgot_again(activations: Activations, again: tuple[str, ...]) -> None:
    """A module runs once where its activations are kept and twice where they are forgotten."""
    trainee = tiny.trainee(activations=activations)
    calls: list[tuple[int, str]] = []
    names = ("self_attn.q_proj", "mlp.up_proj")
    for index, layer in enumerate(trainee.layers):
        for name in names:
            layer.get_submodule(name).register_forward_hook(lambda *_, which=(index, name): calls.append(which))

    trainee.step([BATCH])

    assert sorted(calls) == sorted([(i, n) for i in range(3) for n in (*names, *again)])


def test_what_a_layer_saves_goes_to_the_host_once() -> None:
    """Every storage is sent once however often it is saved, comes back once, is waited for, and no weight leaves."""
    trainee = tiny.trainee("nf4", "offload")
    weights = {t.untyped_storage().nbytes() for t in trainee.resident()}
    sent: list[torch.Tensor] = []
    counts = dict.fromkeys(("to_host", "to_device", "arrival"), 0)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "shallowflow":
                name = func._overloadpacket.__name__
                counts[name] += 1
                if name == "to_host":
                    sent.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        trainee.step([BATCH])

    assert counts["to_host"] == counts["to_device"] == counts["arrival"] > len(trainee.layers)
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == len(sent)
    assert not weights & {tensor.numel() for tensor in sent}


def test_a_layer_without_the_module_is_refused() -> None:
    """Where the code has no MLP module, recomputing it is an error that says what would work."""
    layer = torch.nn.Module()
    layer.self_attn_norm = torch.nn.LayerNorm(4)
    layer.fc1 = torch.nn.Linear(4, 4)

    with pytest.raises(ValueError, match="cannot recompute mlp: Module has no such module of its own; recompute whole"):
        part(layer, "recompute mlp")
    with pytest.raises(ValueError, match="cannot recompute attention"):
        part(layer, "recompute attention")
    assert part(layer, "recompute") is layer


# The loss scale


@pytest.mark.parametrize("scale", [2.0, 1024.0, 65536.0])
def test_a_loss_scale_cancels_out(scale: float) -> None:
    """The optimizer sees the gradients that it would see without a scale, and so does the reported norm."""
    plain, expected = unclipped(tiny.trainee(), [BATCH])
    trainee = tiny.trainee()
    trainee.loss_scale = LossScale(scale, dynamic=True)
    scaled, outcome = unclipped(trainee, [BATCH])

    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6 * norm(plain))
    assert outcome.loss == pytest.approx(expected.loss)
    assert outcome.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_skips_the_update(bad: float) -> None:
    """One gradient that is not finite leaves weights and optimizer alone, halves the scale and is counted."""
    trainee = tiny.trainee()
    trainee.loss_scale = LossScale(1024.0, dynamic=True)
    spoil = trainee.parameters[5].register_hook(lambda gradient: gradient * bad)
    before = [p.detach().clone() for p in trainee.parameters]

    handed, outcome = gradients(trainee, [BATCH])

    assert outcome.skipped and not handed and not math.isfinite(outcome.gradient_norm)
    assert all(map(torch.equal, trainee.parameters, before))
    assert not trainee.optimizer.state
    assert (trainee.loss_scale.value, trainee.loss_scale.num_skipped) == (512.0, 1)
    assert all(p.grad is None for p in trainee.parameters)

    spoil.remove()
    assert not trainee.step([BATCH]).skipped
    assert not any(map(torch.equal, trainee.parameters, before))
    assert (trainee.loss_scale.value, trainee.loss_scale.num_skipped) == (512.0, 1)


# Clipping


@pytest.mark.parametrize("wanted", [0.25, 0.99, 1.01, 40.0])
def test_gradients_are_clipped_by_their_norm(wanted: float) -> None:
    """Gradients beyond the limit keep their direction and get its length, others stay; the norm told is from before."""
    natural, outcome = unclipped(tiny.trainee(), [BATCH])
    factor = wanted / outcome.gradient_norm
    trainee = tiny.trainee()
    times(trainee, 2.0**-20 * factor)

    clipped, outcome = gradients(trainee, [BATCH])

    assert outcome.gradient_norm == pytest.approx(wanted, rel=1e-4)
    kept = min(1.0, MAX_GRADIENT_NORM / wanted)
    torch.testing.assert_close(clipped, [g * factor * kept for g in natural], rtol=1e-4, atol=1e-6)
    assert norm(clipped) == pytest.approx(min(wanted, MAX_GRADIENT_NORM), rel=1e-4)


# Adapters


@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_adapters_are_fp32_and_all_that_learns(compute_dtype: str, weight_format: WeightFormat) -> None:
    """Each linear module has two trainable fp32 matrices, the optimizer has just these, and the base stays as it is."""
    trainee = tiny.trainee(weight_format, compute_dtype=compute_dtype)
    named = dict(trainee.model.named_parameters())
    learned = {name: p for name, p in named.items() if p.requires_grad}
    rank, hidden, inner, shared = 4, 64, 128, 32
    sizes = [(hidden, hidden), (hidden, shared), (hidden, shared), (hidden, hidden)]
    sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]

    assert all(".lora_A." in name or ".lora_B." in name for name in learned)
    assert sum(p.numel() for p in learned.values()) == tiny.NUM_LAYERS * sum(rank * sum(size) for size in sizes)
    assert {p.dtype for p in learned.values()} == {torch.float32}
    in_optimizer = {id(p) for group in trainee.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in learned.values()} == {id(p) for p in trainee.parameters}
    stored = {p.dtype for name, p in named.items() if name not in learned and p.dtype.is_floating_point}
    assert stored == {getattr(torch, compute_dtype)}


@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("weight_format", ["fp16", "int8", "nf4"])
def test_a_step_in_any_dtype_points_the_same_way(compute_dtype: str, weight_format: WeightFormat) -> None:
    """Whatever the base is stored and computed in, a step runs, and its gradient is fp32's up to rounding."""
    exact, _ = unclipped(tiny.trainee(), [BATCH])
    rounded, outcome = unclipped(tiny.trainee(weight_format, compute_dtype=compute_dtype), [BATCH])

    assert not outcome.skipped
    along = sum(float((a * b).sum()) for a, b in zip(exact, rounded, strict=True))
    assert along / norm(exact) / norm(rounded) > 0.9


def test_the_base_never_changes() -> None:
    """After steps that move every adapter, the base weights are bit for bit what they were."""
    trainee = tiny.trainee("nf4")
    frozen = [p for p in trainee.model.parameters() if not p.requires_grad]
    before = [p.detach().clone() for p in frozen]

    for _ in range(3):
        trainee.step([BATCH])

    assert all(map(torch.equal, frozen, before))


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
def test_everything_held_is_listed(weight_format: WeightFormat) -> None:
    """Residents are each parameter, buffer and constant once, and with the optimizer's two moments all that stays."""
    trainee = tiny.trainee(weight_format)
    trainee.step([BATCH])

    categories: dict[str, dict[int, int]] = {}
    for item in trainee.resident_tensors():
        categories.setdefault(item.category, {})[item.tensor.data_ptr()] = item.tensor.nbytes
    sizes = {category: sum(by_address.values()) for category, by_address in categories.items()}
    frozen = [p for p in trainee.model.parameters() if not p.requires_grad]
    adapter = sum(p.nbytes for p in trainee.parameters)
    assert sizes["base weights"] == sum(t.nbytes for t in [*frozen, *trainee.model.buffers()])
    assert sizes["adapter"] == adapter
    assert ("quantization constants" in sizes) == (weight_format != "fp32")
    layers = {item.layer for item in trainee.resident_tensors() if item.category == "adapter"}
    assert layers == set(range(tiny.NUM_LAYERS))
    held = {t.data_ptr(): t.nbytes for t in trainee.resident()}
    moments = 2 * adapter + 4 * len(trainee.parameters)  # and a step count per parameter
    assert sum(held.values()) == sum(sizes.values()) + moments


def test_quantized_layers_are_those_of_the_strategy() -> None:
    """Under one format for all layers, each layer's linear modules are quantized and the head is not."""
    trainee = tiny.trainee("nf4")

    per_layer = [sum(map(quantized.is_quantized, layer.modules())) for layer in trainee.layers]
    assert per_layer == [7] * tiny.NUM_LAYERS
    assert sum(map(quantized.is_quantized, trainee.model.modules())) == 7 * tiny.NUM_LAYERS


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.2}, {}], ids=["a rate in the configuration", "none"])
def test_a_layer_computed_again_drops_what_it_dropped(changes: dict[str, float]) -> None:
    """Recomputation gives the gradients of saved activations, also where attention drops at random."""
    found = []
    for activations in ("save", "recompute"):
        torch.manual_seed(3)
        strategy = tiny.configuration("fp32", activations)
        trainee = make_trainee(tiny.base("float32", **changes), strategy, "float32", torch.device("cpu"))
        for parameter in trainee.parameters:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        torch.manual_seed(7)
        found.append(unclipped(trainee, [BATCH])[0])

    assert has_dropout(tiny.base("float32", **changes)) == bool(changes)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6 * norm(found[0]))
