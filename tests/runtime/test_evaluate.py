"""Perplexity is what its definition says, and measuring it leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch

from shallowflow.planner.strategies import WeightFormat
from shallowflow.runtime.batches import Window
from shallowflow.runtime.evaluate import mean_loss, perplexity
from shallowflow.runtime.step import Trainee
from tests.runtime import tiny

WINDOWS = [tiny.window(range(first, first + count)) for first, count in ((0, 17), (40, 5), (90, 12), (7, 2), (200, 9))]


def by_hand(trainee: Trainee, windows: list[Window]) -> float:
    """exp of the mean cross-entropy, token by token in double precision, each window without its padding."""
    losses = []
    for window in windows:
        tokens = torch.tensor([window.input_ids[: window.num_targets]])
        with torch.no_grad():
            likelihoods = trainee.model(input_ids=tokens).logits[0].double().log_softmax(-1)
        losses += [-float(row[label]) for row, label in zip(likelihoods, window.labels, strict=False)]
    assert len(losses) == sum(w.num_targets for w in windows)
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 8])
def test_perplexity_is_its_definition(micro_batch_size: int) -> None:
    """Whatever the micro-batch, also where the last is smaller, it is exp of the mean loss per learned token."""
    trainee = tiny.trainee()
    told: list[None] = []

    found = perplexity(mean_loss(trainee, WINDOWS, micro_batch_size, tiny.CPU, lambda: told.append(None)))

    assert found == pytest.approx(by_hand(trainee, WINDOWS), rel=1e-5)
    assert len(told) == math.ceil(len(WINDOWS) / micro_batch_size)


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "nf4"])
def test_measuring_leaves_the_model_alone(weight_format: WeightFormat) -> None:
    """Afterwards the model trains as before, with the same bits in every weight and no gradient."""
    trainee = tiny.trainee(weight_format)
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    expected = tiny.trainee(weight_format).step([tiny.random_batch([9, 16])])

    first = mean_loss(trainee, WINDOWS, 2, tiny.CPU)
    second = mean_loss(trainee, WINDOWS, 2, tiny.CPU)

    assert first == second
    assert all(module.training for module in trainee.model.modules())
    after = dict(trainee.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(p.grad is None for p in trainee.parameters)
    assert trainee.step([tiny.random_batch([9, 16])]) == expected


def test_dropout_is_off_while_measuring_only() -> None:
    """A model that drops activations in training drops none in evaluation, and does again afterwards."""
    trainee = tiny.trainee()
    dropout = torch.nn.Dropout(0.5)
    trainee.layers[0].add_module("dropout", dropout)
    trainee.layers[0].get_submodule("mlp").register_forward_hook(lambda _module, _inputs, output: dropout(output))

    found = {mean_loss(trainee, WINDOWS, 2, tiny.CPU) for _ in range(3)}

    assert len(found) == 1
    assert len({float(trainee.loss(tiny.random_batch([16])).detach()) for _ in range(3)}) > 1


def test_an_interrupted_measurement_leaves_the_model_training() -> None:
    """Ctrl-C in the middle still hands back a model in training mode."""
    trainee = tiny.trainee("nf4")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mean_loss(trainee, WINDOWS, 2, tiny.CPU, interrupt)
    assert all(module.training for module in trainee.model.modules())
