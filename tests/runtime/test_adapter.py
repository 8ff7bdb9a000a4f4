"""Adapted layers compute what PEFT's computes, in fewer passes and with less kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from shallowflow.planner.strategies import Activations, Adapter, WeightFormat
from shallowflow.runtime import adapter, build, dora, quantized
from shallowflow.runtime.meter import allocator_levels
from shallowflow.runtime.step import Trainee, make_trainee
from tests.runtime import tiny

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": tiny.VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture
def through_peft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainee]:
    """The same trainee with PEFT's own forward pass."""

    def make(*arguments: Any, **named: Any) -> Trainee:
        with monkeypatch.context() as patch:
            patch.setattr(adapter, "fuse", lambda _model: 0)
            return tiny.trainee(*arguments, **named)

    return make


def gradients(trainee: Trainee) -> tuple[float, list[torch.Tensor]]:
    """A micro-batch's loss, and its gradients."""
    loss = trainee.loss(tiny.random_batch([16, 12]))
    loss.backward()
    found = [p.grad for p in trainee.parameters if p.grad is not None]
    assert len(found) == len(trainee.parameters)
    return float(loss.detach()), found


def furthest(ours: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest relative difference of two lists of gradients."""
    pairs = zip(ours, others, strict=True)
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


@pytest.mark.parametrize("activations", ["save", "recompute", "recompute mlp", "offload"])
@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
def test_gradients_are_pefts(
    weight_format: WeightFormat, activations: Activations, through_peft: Callable[..., Trainee]
) -> None:
    """Loss and every gradient agree to fp32's rounding, under every weight format and policy."""
    loss, ours = gradients(tiny.trainee(weight_format, activations))

    expected, theirs = gradients(through_peft(weight_format, activations))

    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) < 5e-6


@pytest.mark.parametrize(("compute_dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_in_sixteen_bits_the_adapter_is_rounded(
    compute_dtype: str, rounding: float, through_peft: Callable[..., Trainee]
) -> None:
    """Against PEFT's fp32 products, gradients differ by a few roundings of the compute dtype, and stay fp32."""
    plain: WeightFormat = "fp16" if compute_dtype == "float16" else "bf16"

    _, ours = gradients(tiny.trainee(plain, compute_dtype=compute_dtype))

    _, theirs = gradients(through_peft(plain, compute_dtype=compute_dtype))
    assert {gradient.dtype for gradient in ours} == {torch.float32}
    assert furthest(ours, theirs) < 8 * rounding


@given(scaling=st.floats(0.1, 8), batch=st.integers(1, 3), length=st.integers(1, 5), seed=st.integers(0, 99))
def test_one_layer_by_finite_differences(scaling: float, batch: int, length: int, seed: int) -> None:
    """The function's derivatives are those that autograd's own check finds in double precision."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(4, 3, dtype=torch.float64).requires_grad_(False)
    x, down, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((batch, length, 4), (2, 4), (3, 2))
    )

    def run(*tensors: torch.Tensor) -> Any:
        return adapter._Adapted.apply(*tensors, base, scaling)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(run, (x, down, up))


@given(scaling=st.floats(0.1, 8), length=st.integers(1, 5), has_bias=st.booleans(), seed=st.integers(0, 99))
def test_one_rescaled_layer_by_finite_differences(scaling: float, length: int, has_bias: bool, seed: int) -> None:
    """DoRA's derivatives, at constant lengths of the rows, are those that autograd's own check finds."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(4, 3, bias=has_bias, dtype=torch.float64).requires_grad_(False)
    x, down, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((length, 4), (2, 4), (3, 2))
    )
    magnitude, lengths = (torch.rand(3, dtype=torch.float64).add_(0.5) for _ in range(2))

    def run(*tensors: torch.Tensor) -> Any:
        return adapter._Rescaled.apply(*tensors, lengths, base, scaling)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradcheck(run, (x, down, up, magnitude.requires_grad_()))


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
def test_rows_are_as_long_as_they_are(weight_format: WeightFormat) -> None:
    """Lengths from the terms of their squares are those of the rows of the adapted matrix, and begin as the base's."""
    made = tiny.trainee(weight_format, adapter="dora")
    found = [m for m in made.model.modules() if hasattr(m, "lora_magnitude_vector")]
    assert len(found) == 7 * tiny.NUM_LAYERS
    for module in found:
        held: Any = module
        base = quantized.weight_of(held.base_layer, torch.float32)
        summed = base + held.scaling["default"] * held.lora_B["default"].weight @ held.lora_A["default"].weight
        torch.testing.assert_close(dora.row_lengths(held, "default", base), summed.norm(dim=1))
        torch.testing.assert_close(held.lora_magnitude_vector["default"].squares.sqrt(), base.norm(dim=1))


def test_a_row_of_zeros_is_no_trouble() -> None:
    """As pruned weights have them: nothing is divided by nothing."""
    base = tiny.base()
    for layer in build.decoder_layers(base):
        weight = layer.get_submodule("self_attn.v_proj").weight
        assert isinstance(weight, torch.Tensor)
        weight.data[3] = 0
    expected = base(input_ids=tiny.random_batch([16]).input_ids).logits
    made = make_trainee(base, replace(tiny.configuration(), adapter="dora"), "float32", tiny.CPU)

    found = made.model(input_ids=tiny.random_batch([16]).input_ids).logits
    outcomes = [made.step([tiny.random_batch([16, 12])]) for _ in range(3)]

    torch.testing.assert_close(found, expected)
    assert not any(outcome.skipped for outcome in outcomes)


def test_transposed_weights_are_meant() -> None:
    """GPT-2's Conv1D keeps its matrix the other way round."""
    torch.manual_seed(0)
    model = build.empty_model(build.transformers_config(GPT2), "float32", "cpu")
    adapted = build.add_adapters(model, rank=4, alpha=8)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    tokens = tiny.random_batch([8]).input_ids

    def run() -> list[torch.Tensor]:
        logits = adapted(input_ids=tokens).logits
        return list(torch.autograd.grad(logits.square().sum(), trained))

    ours = run()
    for module in adapted.modules():
        module.__dict__.pop("forward", None)
    theirs = run()

    assert furthest(ours, theirs) < 5e-6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_what_does_more_is_left_to_peft(setting: dict[str, Any]) -> None:
    """Dropout, biases and DoRA as PEFT begins it keep PEFT's forward pass."""
    config = LoraConfig(r=4, target_modules=["q_proj"], **setting)

    assert adapter.fuse(get_peft_model(tiny.base(), config)) == 0


def test_a_disabled_adapter_is_not_there() -> None:
    """Under PEFT's ``disable_adapter`` the model is its base."""
    trainee = tiny.trainee()
    tokens = tiny.random_batch([16]).input_ids
    model: Any = trainee.model

    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=tokens).logits

    assert torch.equal(without, tiny.base()(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_less_is_kept(kind: Adapter, through_peft: Callable[..., Trainee]) -> None:
    """A half-precision micro-batch keeps less for its backward pass, and never holds as much."""
    peaks = []
    for make in (tiny.trainee, through_peft):
        trainee = make("fp16", compute_dtype="float16", adapter=kind)
        (levels,) = allocator_levels([functools.partial(gradients, trainee)])
        peaks.append(max(levels))

    assert peaks[0] < 0.8 * peaks[1]
