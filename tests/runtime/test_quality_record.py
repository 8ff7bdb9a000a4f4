"""What fine-tuning with coarser weights and other ranks came to stands in the order that the planner holds."""

from __future__ import annotations

import pytest

from benchmarks import quality as measured
from shallowflow.planner import quality

RECORD = measured.load()
NOISE = 2.0
"""Standard errors within which two losses have no order."""


def test_the_record_is_whole() -> None:
    """Every way was trained with every seed, on the same tokens."""
    for way in measured.WAYS:
        assert set(measured.losses(RECORD, way)) == set(measured.SEEDS)
    for seed in measured.SEEDS:
        assert len({row["learned_tokens"] for row in RECORD["runs"] if row["seed"] == seed}) == 1


def test_formats_stand_in_the_planners_order() -> None:
    """The format that is held to do more harm has the higher loss, by more than the seeds' noise."""
    for lesser, greater, difference, error in measured.orders(RECORD):
        assert difference > NOISE * error, f"{greater} against {lesser}"


def test_harm_adds_up_over_layers() -> None:
    """Half of the layers in nf4 cost about half of what all cost, as the squared errors say."""
    half, _ = measured.excess(RECORD, "mixed")
    whole, _ = measured.excess(RECORD, "nf4")

    assert half / whole == pytest.approx(measured.harm("mixed") / measured.harm("nf4"), rel=0.15)


def test_ranks_that_are_enough_are_alike() -> None:
    """The planner holds the least rank to be enough for so few tokens; no rank differs as any format does."""
    tokens = max(row["learned_tokens"] for row in RECORD["runs"])
    assert quality.enough_rank(tokens, parameters_per_rank=300_000, at_least=1) == quality.RANKS[0]

    formats = [abs(measured.excess(RECORD, way)[0]) for way in ("mixed", "nf4")]
    for way in ("rank 4", "rank 64"):
        assert abs(measured.excess(RECORD, way)[0]) < 0.1 * min(formats)


def test_an_optimizer_in_8_bits_costs_nothing() -> None:
    """Its loss differs from AdamW's by far less than any format's, so that the planner chooses it for its memory."""
    formats = [abs(measured.excess(RECORD, way)[0]) for way in ("mixed", "nf4")]
    assert abs(measured.excess(RECORD, "8-bit AdamW")[0]) < 0.1 * min(formats)


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_real_weights_err_as_normal_ones(weight_format: str) -> None:
    """The relative errors on the model's own weights are those held for normally distributed ones."""
    held = quality.WEIGHT_ERROR[weight_format]  # type: ignore[index]

    assert RECORD["weight_errors"][weight_format] == pytest.approx(held, rel=0.1)
