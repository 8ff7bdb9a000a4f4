"""The traced step against the same step done for real, with every byte that the CPU's allocator reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from shallowflow.planner.profiler.simulate import traced_peak
from shallowflow.planner.strategies import (
    Activations,
    Adapter,
    Configuration,
    Optimizer,
    TargetModules,
    WeightFormat,
)
from shallowflow.runtime.build import empty_model, transformers_config
from shallowflow.runtime.meter import MeasuredPeak, measure_peak
from shallowflow.runtime.step import MicroBatch, make_trainee
from tests.planner import tiny
from tests.planner.tiny import FAMILIES, VOCABULARY, configuration
from tests.strategies import POLICIES

CPU = torch.device("cpu")
SCALAR_BYTES = 16
"""Per adapter tensor: AdamW's count of steps, and half of the scale that autograd keeps for each pair of them."""


def measured(family: str, chosen: Configuration) -> tuple[MeasuredPeak, int]:
    """The second step of a tiny model on the CPU, its batches not counted, and the number of adapter tensors.

    The first step creates the optimizer's state.
    """
    torch.manual_seed(0)
    model = empty_model(transformers_config(FAMILIES[family], chosen.num_layers), "float32", "cpu")
    trainee = make_trainee(model, chosen, "float32")
    shape = (chosen.micro_batch_size, chosen.sequence_length)
    batches = []
    for _ in range(chosen.gradient_accumulation_steps):
        tokens = torch.randint(VOCABULARY, shape)
        batches.append(MicroBatch(tokens, tokens.clone(), tokens.numel()))
    trainee.step(batches[:1])

    _, peak = measure_peak(lambda: trainee.step(batches), trainee.resident(), CPU)

    return peak, len(trainee.parameters)


def combinations() -> Iterator[tuple[str, WeightFormat, Activations, int, int]]:
    """Every family, format and policy, with batch sizes that go round."""
    batches = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2)]
    formats: tuple[WeightFormat, ...] = ("fp32", "int8", "nf4")
    for index, (family, weight_format, activations) in enumerate(product(FAMILIES, formats, POLICIES)):
        yield family, weight_format, activations, *batches[index % len(batches)]


@pytest.mark.parametrize("target_modules", ["all-linear", "names"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize(
    ("family", "weight_format", "activations"),
    [
        ("llama", "nf4", "recompute"),
        ("llama", "fp32", "offload"),
        ("gpt2", "fp32", "save"),
        ("gpt_neox", "int8", "recompute mlp"),
    ],
)
def test_so_it_is_for_every_adapter(
    family: str, weight_format: WeightFormat, activations: Activations, adapter: Adapter, target_modules: str
) -> None:
    """Whatever learns, and of whatever kind."""
    chosen = configuration(weight_format, activations, sequence_length=128, gradient_accumulation_steps=2)
    on: TargetModules = tiny.NAMES[family] if target_modules == "names" else "all-linear"

    check(family, replace(chosen, adapter=adapter, target_modules=on))


@pytest.mark.parametrize(
    ("family", "weight_format", "activations", "micro_batch_size", "accumulation"), list(combinations())
)
def test_the_traced_peak_is_the_measured_one(
    family: str, weight_format: WeightFormat, activations: Activations, micro_batch_size: int, accumulation: int
) -> None:
    """On a CPU prediction and reality differ by no more than the batches themselves and a few scalars."""
    chosen = configuration(
        weight_format,
        activations,
        sequence_length=128,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
    )

    check(family, chosen)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("family", "loss_chunks"), [("llama", 1), ("llama", 4), ("gpt2", 1), ("gpt_neox", 4)])
@pytest.mark.parametrize("activations", ["save", "recompute", "offload"])
def test_so_it_is_where_every_weight_learns(
    family: str, activations: Activations, loss_chunks: int, accumulation: int, optimizer: Optimizer
) -> None:
    """Gradients and moments of everything, embeddings and head included."""
    chosen = configuration("fp32", activations, sequence_length=128, gradient_accumulation_steps=accumulation)
    full = replace(chosen, adapter="full", rank=None, alpha=None, target_modules=None)

    check(family, replace(full, loss_chunks=loss_chunks, optimizer=optimizer))


def check(family: str, chosen: Configuration) -> None:
    """What is traced is what is measured."""
    real, num_adapters = measured(family, chosen)

    traced = traced_peak(tiny.meta_step(family, "cpu", chosen), tiny.target("cpu"))
    scalars, batches = num_adapters * SCALAR_BYTES, chosen.global_batch_size * chosen.sequence_length * 2 * 8
    assert max(scalars, batches) < 0.004 * real.peak_allocated_bytes
    for predicted, happened in (
        (traced.resident_bytes, real.resident_bytes),
        (traced.peak_allocated_bytes, real.peak_allocated_bytes),
    ):
        assert happened - scalars <= predicted <= happened + batches
