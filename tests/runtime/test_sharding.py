"""Each process keeps its part of every frozen matrix, gathers one before it is used, and lets go of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shallowflow.planner.profiler.attribution import categories
from shallowflow.planner.profiler.kernels import Target
from shallowflow.planner.profiler.simulate import trace_step, traced_peak
from shallowflow.planner.strategies import Activations, Adapter, Configuration, Strategy, WeightFormat, uniform
from shallowflow.profiles import load_gpu
from shallowflow.runtime import build, gathers, quantized, sharding
from shallowflow.runtime.meter import measure_peak
from shallowflow.runtime.ranks import Ranks
from shallowflow.runtime.sharding import PART, Matrix
from shallowflow.runtime.simulated import make_meta_step
from shallowflow.runtime.step import Trainee, make_trainee
from tests.runtime import tiny

FORMATS: tuple[WeightFormat, ...] = ("fp32", "nf4", "int8")
POLICIES: tuple[Activations, ...] = ("save", "recompute attention", "recompute mlp", "recompute", "offload")
REUSING: tuple[Activations, ...] = (
    "recompute reusing weights",
    "recompute attention reusing weights",
    "recompute mlp reusing weights",
)
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": tiny.NUM_LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": tiny.VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": tiny.END,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}


def configured(strategies: Sequence[Strategy], size: int, **changes: Any) -> Configuration:
    """A layer for each of *strategies*, the weights shared by so many."""
    runs = [replace(uniform(strategy, 1)[0], first=i, last=i) for i, strategy in enumerate(strategies)]
    return replace(tiny.configuration(), layers=tuple(runs), num_gpus=size, sharding="weights", **changes)


def made(chosen: Configuration, ranks: Ranks, config: dict[str, Any] | None = None) -> Trainee:
    """The tiny model, or one of *config*, ready to train, both halves of its adapter random."""
    torch.manual_seed(0)
    model = build.empty_model(build.transformers_config(config or dict(tiny.CONFIG)), "float32", "cpu")
    trainee = make_trainee(model, chosen, "float32", tiny.CPU, ranks=ranks)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return trainee


def matrices(trainee: Trainee) -> list[Matrix]:
    """Every matrix that is shared, once."""
    found = [getattr(module, "shared_out", None) for module in trainee.model.modules()]
    return list(dict.fromkeys(one for one in found if isinstance(one, Matrix)))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("weight_format", "twice"), [("fp32", False), ("nf4", False), ("nf4", True), ("int8", False)])
def test_parts_make_up_the_whole(weight_format: WeightFormat, size: int, twice: bool) -> None:
    """One after the other, all processes' parts are each tensor's bytes; no process has more than another."""
    strategies = [Strategy(weight_format=weight_format, activations="save", double_quantization=twice)] * 3
    torch.manual_seed(0)
    whole = build.empty_model(build.transformers_config(dict(tiny.CONFIG)), "float32", "cpu")
    build.apply_formats(whole, strategies, "float32")
    parts = [matrices(made(configured(strategies, size), Ranks(rank, size))) for rank in range(size)]
    modules = [whole.get_input_embeddings()]  # tied to the head
    modules += [m for layer in build.decoder_layers(whole) for m in layer.modules() if quantized.has_weight(m)]

    for module, *shared in zip(modules, *parts, strict=True):
        together = torch.cat([one.module.get_buffer(PART) for one in shared])
        assert len({one.module.get_buffer(PART).numel() for one in shared}) == 1
        for piece, (places, tensor) in zip(shared[0].pieces, quantized.held(module), strict=True):
            assert piece.places == places
            assert torch.equal(piece.of(together), tensor)
        assert together.numel() - sum(t.nbytes for _, t in quantized.held(module)) < 512 * (size + 3)


@settings(max_examples=25, deadline=None)
@given(
    weight_format=st.sampled_from(FORMATS),
    activations=st.sampled_from((*POLICIES, *REUSING)),
    adapter=st.sampled_from(["lora", "lora", "dora"]),
    target_modules=st.sampled_from(["all-linear", "attention", ("down_proj",)]),
    loss_chunks=st.sampled_from([1, 4]),
    tied=st.booleans(),
)
def test_what_is_computed_does_not_change(
    weight_format: WeightFormat,
    activations: Activations,
    adapter: Adapter,
    target_modules: Any,
    loss_chunks: int,
    tied: bool,
) -> None:
    """Loss and gradients are those of whole weights up to the order of sums, which some processors' libraries change
    from run to run; nothing gathered is left behind."""
    strategies = [Strategy(weight_format=weight_format, activations=activations)] * tiny.NUM_LAYERS
    config = {**tiny.CONFIG, "tie_word_embeddings": tied}
    changes: dict[str, Any] = {"adapter": adapter, "target_modules": target_modules, "loss_chunks": loss_chunks}
    shared = configured(strategies, 1, **changes)
    found = []
    for chosen in (replace(shared, sharding="none"), shared):
        trainee = made(chosen, Ranks(), config)
        for seed in (0, 1):
            loss = trainee.loss(tiny.random_batch([16, 9], seed=seed))
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainee.parameters if p.grad is not None)])

    assert len(found[0]) == len(found[1]) > 3
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    for matrix in matrices(trainee):
        assert matrix.queue.matrix is None and matrix.queue.whole is None
        assert all(tensor.numel() == 0 for _, tensor in quantized.held(matrix.module))


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainee]:
    """Make the trainee of one process, which finds the parts of all others here."""
    everyones: dict[int, list[torch.Tensor]] = {}

    def begin(part: torch.Tensor, whole: torch.Tensor, _ranks: Ranks) -> tuple[()]:
        whole.copy_(torch.cat(everyones[part.data_ptr()]))
        return ()

    def begin_one(part: torch.Tensor, received: torch.Tensor, source: int, _ranks: Ranks) -> tuple[()]:
        received.copy_(everyones[part.data_ptr()][source])
        return ()

    def make(chosen: Configuration, rank: int, config: dict[str, Any]) -> Trainee:
        found = [made(chosen, Ranks(each, chosen.num_gpus), config) for each in range(chosen.num_gpus)]
        for shared in zip(*map(matrices, found), strict=True):
            parts = [matrix.module.get_buffer(PART) for matrix in shared]
            everyones.update({part.data_ptr(): parts for part in parts})
        return found[rank]

    monkeypatch.setattr(gathers, "begin", begin)
    monkeypatch.setattr(gathers, "begin_one", begin_one)
    return make


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weight_format=st.sampled_from(FORMATS),
    size=st.sampled_from([2, 3]),
    loss_chunks=st.sampled_from([1, 4]),
    tied=st.booleans(),
    vocabulary=st.sampled_from([300, 301, 7]),
)
def test_what_others_have_is_what_is_computed_with(
    weight_format: WeightFormat,
    size: int,
    loss_chunks: int,
    tied: bool,
    vocabulary: int,
    joined: Callable[..., Trainee],
) -> None:
    """To the last bit; but a loss in chunks, of parts of the head, is summed in another order."""
    strategies = [Strategy(weight_format=weight_format, activations="recompute")] * tiny.NUM_LAYERS
    config = {**tiny.CONFIG, "tie_word_embeddings": tied, "vocab_size": vocabulary, "eos_token_id": None}
    shared = configured(strategies, size, loss_chunks=loss_chunks)
    batch = tiny.random_batch([16, 9])
    batch = replace(batch, input_ids=batch.input_ids % vocabulary, labels=batch.labels.clamp_max(vocabulary - 1))
    found = []
    for trainee in (made(replace(shared, sharding="none"), Ranks(), config), joined(shared, size - 1, config)):
        with torch.no_grad():
            evaluated = trainee.loss(batch)
        loss = trainee.loss(batch)
        loss.backward()
        found.append([evaluated, loss.detach(), *(p.grad for p in trainee.parameters if p.grad is not None)])

    for ours, theirs in zip(*found, strict=True):
        if loss_chunks == 1:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()))


def test_transposed_weights_are_shared_as_well() -> None:
    """GPT-2's, whose shape PEFT takes from the weight."""
    strategies = [Strategy(weight_format="fp32", activations="recompute")] * tiny.NUM_LAYERS
    losses = []
    for chosen in (replace(configured(strategies, 1), sharding="none"), configured(strategies, 1)):
        trainee = made(chosen, Ranks(), GPT2)
        losses.append(trainee.step([tiny.random_batch([16, 9])]).loss)

    assert losses[0] == losses[1]


every_strategy = st.builds(
    Strategy, weight_format=st.sampled_from(FORMATS), activations=st.sampled_from(POLICIES)
) | st.builds(
    Strategy,
    weight_format=st.just("nf4"),
    activations=st.sampled_from((*POLICIES, *REUSING)),
    double_quantization=st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(
    strategies=st.lists(every_strategy, min_size=3, max_size=3),
    size=st.sampled_from([2, 4]),
    loss_chunks=st.sampled_from([1, 4]),
    accumulation=st.integers(1, 2),
)
def test_the_allocator_sees_what_the_trace_says(
    strategies: list[Strategy], size: int, loss_chunks: int, accumulation: int
) -> None:
    """What a process is predicted to hold and to need at most is what a CPU's allocator counts, in any mix."""
    chosen = configured(strategies, size, loss_chunks=loss_chunks, gradient_accumulation_steps=accumulation)
    step = make_meta_step(dict(tiny.CONFIG), chosen, "float32", accumulation)
    predicted = traced_peak(step, Target.of(load_gpu("cpu")))
    trainee = made(chosen, Ranks(size=size))  # alone, and taken to have what the others have
    batches = [tiny.random_batch([16, 16], seed=seed) for seed in range(accumulation)]
    trainee.prime()  # what it computes is no number, and updates nothing

    tokens = [tensor for batch in batches for tensor in batch.tensors()]
    _, measured = measure_peak(lambda: trainee.step(batches), [*trainee.resident(), *tokens], tiny.CPU)

    beside = sum(tensor.nbytes for tensor in tokens) + 512
    assert measured.resident_bytes == pytest.approx(predicted.resident_bytes, abs=beside)
    assert measured.peak_allocated_bytes == pytest.approx(predicted.peak_allocated_bytes, abs=beside)


@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_two_matrices_are_there_at_most(weight_format: WeightFormat, activations: Activations) -> None:
    """The one that is used and the one that comes next; every one is gathered for each pass, the last of them but once.

    A layer's first is gathered when it is needed, all others while the one before is used.
    """
    strategies = [Strategy(weight_format=weight_format, activations=activations)] * tiny.NUM_LAYERS
    step = make_meta_step({**tiny.CONFIG, "tie_word_embeddings": False}, configured(strategies, 4), "float32", 1)

    trace = trace_step(step, Target.of(load_gpu("cpu")))

    begin = max(position for position, label in trace.marks if label == "step 1")
    end = next(position for position, label in trace.marks if label == "evaluation")
    gathered = [number for number, name in enumerate(categories(trace)) if name == "gathered weights"]
    live: set[int] = set()
    most = count = 0
    for event in trace.events[begin:end]:
        if abs(event) - 1 in gathered:
            (live.add if event > 0 else live.discard)(abs(event) - 1)
            count += event > 0
            most = max(most, len(live))
    kinds = [op.kind for position, op in trace.ops if begin <= position <= end]
    again = {"recompute": 7, "recompute attention": 4, "recompute mlp": 3}.get(activations, 0)
    kept = 1 if again else 0
    assert most == 2
    beside, spared = 4 + 2, 3  # the embedding's parts, the head twice; what the first layer multiplies its input by
    assert count == tiny.NUM_LAYERS * (7 + again + 7 - kept) + beside - spared
    assert kinds.count("gather") == kinds.count("gathered") == count
    assert not live


def test_nothing_of_a_part_is_in_what_is_saved() -> None:
    """State dictionaries are those of a model that is whole, less what it shares."""
    trainee = made(configured([Strategy(weight_format="nf4", activations="save")] * 3, 2), Ranks(size=2))

    assert not any(name.endswith(f".{PART}") for name in trainee.model.state_dict())
    base: Any = trainee.model
    assert base.get_base_model().get_input_embeddings().weight.numel() == 0


def test_another_number_of_layers_is_refused() -> None:
    """As it is where weights are whole."""
    with pytest.raises(ValueError, match="the plan has 2 layers, the model 3"):
        sharding.share_out(tiny.base(), [Strategy(weight_format="fp32", activations="save")] * 2, "float32", Ranks())
