"""Adapted layers compute what PEFT's computes, in fewer passes and with less kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from shallowflow.planner.strategies import Activations, WeightFormat
from shallowflow.runtime import adapter, build
from shallowflow.runtime.meter import allocator_levels
from shallowflow.runtime.step import Trainee
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
    """DoRA, dropout and biases keep PEFT's forward pass."""
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


def test_less_is_kept(through_peft: Callable[..., Trainee]) -> None:
    """A half-precision micro-batch keeps less for its backward pass, and never holds as much."""
    peaks = []
    for make in (tiny.trainee, through_peft):
        trainee = make("fp16", compute_dtype="float16")
        (levels,) = allocator_levels([functools.partial(gradients, trainee)])
        peaks.append(max(levels))

    assert peaks[0] < 0.8 * peaks[1]
