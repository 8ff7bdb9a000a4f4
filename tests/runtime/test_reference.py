"""The step's loss and all its gradients are those of plain transformers, PEFT and autograd in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from bitsandbytes.autograd import _functions as products

from shallowflow.planner.strategies import Activations, Adapter, Configuration, Strategy, StrategyRun, WeightFormat
from shallowflow.runtime.precision import LossScale
from shallowflow.runtime.step import MicroBatch
from tests.runtime import reference, tiny

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NUM_ROUNDINGS = 3 * 15 * reference.NUM_LAYERS
"""In a row: a layer's forward pass rounds some fifteen results one after the other, its backward pass twice as many."""
NUM_ADDENDS = 2 * 64
"""Of a product in fp32, which rounds every addition; 16-bit products are added up in fp32 and rounded once."""
MICRO_BATCHES = [tiny.random_batch(counts, seed=seed) for seed, counts in enumerate([[16, 9], [1, 0], [12, 3]])]
WHOLE_ONLY = ("gemma2",)
"""Caps its logits, which chunks of the loss would miss."""


def tolerance(compute_dtype: str) -> float:
    """The relative error to be expected, twice over: n roundings by chance add up to less than sqrt(n) of the largest.

    See Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis (2019), theorem 2.4.
    """
    num_roundings = NUM_ROUNDINGS * (NUM_ADDENDS if compute_dtype == "float32" else 1)
    return 2 * math.sqrt(num_roundings) * UNIT_ROUNDOFF[compute_dtype]


def configuration(
    weight_format: WeightFormat,
    activations: Sequence[Activations] = ("recompute", "save"),
    *,
    double_quantization: bool = False,
    loss_chunks: int = 1,
) -> Configuration:
    """One policy a layer, three micro-batches."""
    runs = [
        StrategyRun(
            first=index,
            last=index,
            strategy=Strategy(weight_format=weight_format, activations=policy, double_quantization=double_quantization),
        )
        for index, policy in enumerate(activations)
    ]
    return Configuration(
        layers=tuple(runs),
        rank=4,
        alpha=8,
        sequence_length=16,
        micro_batch_size=2,
        gradient_accumulation_steps=len(MICRO_BATCHES),
        loss_chunks=loss_chunks,
    )


def check(
    family: str,
    compute_dtype: str,
    chosen: Configuration,
    within: float,
    micro_batches: Sequence[MicroBatch] = MICRO_BATCHES,
) -> None:
    """Loss, norm and each adapter's gradient are the reference's *within* that share of it."""
    ours = reference.trainee(family, chosen, compute_dtype)
    exact = reference.expected(reference.plain(family, ours, chosen), micro_batches)

    found = reference.told(ours, micro_batches)

    assert all(float(gradient.norm()) > 0 for gradient in exact.gradients.values())
    assert found.furthest(exact) < within
    assert found.loss == pytest.approx(exact.loss, rel=within)
    assert found.norm == pytest.approx(exact.norm, rel=within)


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize(
    ("compute_dtype", "weight_format", "double", "loss_chunks"),
    [
        ("float32", "fp32", False, 1),
        ("float32", "int8", False, 3),
        ("float32", "nf4", False, 3),
        ("float16", "fp16", False, 3),
        ("float16", "int8", False, 1),
        ("float16", "nf4", True, 3),
        ("bfloat16", "bf16", False, 3),
        ("bfloat16", "nf4", True, 1),
    ],
)
def test_every_architecture_learns_as_in_plain_fp32(
    family: str, compute_dtype: str, weight_format: WeightFormat, double: bool, loss_chunks: int
) -> None:
    """In every dtype and weight format, gradients over uneven micro-batches are exact up to the dtype's rounding.

    fp16 computes under its loss scale, so that the gradients are unscaled ones again. int8 weights have no further
    error here: on a CPU bitsandbytes multiplies by what they stand for.
    """
    chunks = 1 if family in WHOLE_ONLY else loss_chunks
    chosen = configuration(weight_format, double_quantization=double, loss_chunks=chunks)

    check(family, compute_dtype, chosen, tolerance(compute_dtype))


@pytest.mark.parametrize("loss_chunks", [1, 4])
@pytest.mark.parametrize("activations", get_args(Activations))
@pytest.mark.parametrize(("compute_dtype", "weight_format"), [("float32", "fp32"), ("float16", "nf4")])
def test_every_policy_learns_as_in_plain_fp32(
    compute_dtype: str, weight_format: WeightFormat, activations: Activations, loss_chunks: int
) -> None:
    """Whatever becomes of activations, and however the loss is cut."""
    chosen = configuration(weight_format, [activations, activations], loss_chunks=loss_chunks)

    check("llama", compute_dtype, chosen, tolerance(compute_dtype))


@pytest.mark.parametrize("family", reference.FAMILIES)
@pytest.mark.parametrize(
    ("compute_dtype", "weight_format", "double"),
    [("float32", "fp32", False), ("float32", "int8", False), ("float16", "nf4", True), ("bfloat16", "bf16", False)],
)
def test_dora_learns_as_in_plain_fp32(
    family: str, compute_dtype: str, weight_format: WeightFormat, double: bool
) -> None:
    """DoRA's directions and lengths have the gradients of PEFT's own DoRA on what the stored weights stand for."""
    chosen = replace(configuration(weight_format, double_quantization=double), adapter="dora")

    check(family, compute_dtype, chosen, tolerance(compute_dtype))


@pytest.mark.parametrize("activations", get_args(Activations))
@pytest.mark.parametrize(("compute_dtype", "weight_format"), [("float32", "fp32"), ("float16", "nf4")])
def test_dora_learns_so_under_every_policy(
    compute_dtype: str, weight_format: WeightFormat, activations: Activations
) -> None:
    """Lengths are measured again where a layer is computed again, and outputs that are kept may be offloaded."""
    chosen = replace(configuration(weight_format, [activations, activations]), adapter="dora")

    check("qwen2", compute_dtype, chosen, tolerance(compute_dtype))


@pytest.mark.parametrize("adapter", get_args(Adapter))
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("down_proj",), ("mlp.up_proj", "self_attn.o_proj")])
def test_chosen_modules_learn_as_in_plain_fp32(adapter: Adapter, names: tuple[str, ...]) -> None:
    """What PEFT puts adapters on by these names has ours, with its gradients, and nothing else learns."""
    chosen = replace(configuration("fp32"), adapter=adapter, target_modules=names)

    check("llama", "float32", chosen, tolerance("float32"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_int8_on_a_gpu_rounds_activations_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products that bitsandbytes takes on CUDA, gradients are exact up to fp16's and int8's rounding.

    There each token's activations are rounded to steps of their largest entry over 127. Against their root mean square,
    of which the largest of some hundred entries is three times, that is an error of 3 / 127 / sqrt(12). It enters at
    the seven products of a layer, and returns in the two products of the backward pass that use what they gave.
    """
    monkeypatch.setattr(products, "MatMul8bitFp", products.MatMul8bitLt)
    num_roundings = 3 * 7 * reference.NUM_LAYERS
    rounding = 3 / 127 / math.sqrt(12)

    check(
        family,
        "float16",
        configuration("int8", loss_chunks=3),
        tolerance("float16") + 2 * math.sqrt(num_roundings) * rounding,
    )


@pytest.mark.parametrize("loss_chunks", [1, 4])
def test_a_large_batch_does_not_underflow(loss_chunks: int) -> None:
    """Divided by a hundred thousand targets, gradients stay exact in fp16 under the loss scale, and not without one."""
    shares = [MicroBatch(batch.input_ids, batch.labels, 100_000 // len(MICRO_BATCHES)) for batch in MICRO_BATCHES]
    chosen = configuration("fp16", loss_chunks=loss_chunks)
    check("llama", "float16", chosen, tolerance("float16"), shares)

    unscaled = reference.trainee("llama", chosen, "float16")
    exact = reference.expected(reference.plain("llama", unscaled, chosen), shares)
    unscaled.loss_scale = LossScale(1.0, dynamic=False)
    assert reference.told(unscaled, shares).furthest(exact) > tolerance("float16")
