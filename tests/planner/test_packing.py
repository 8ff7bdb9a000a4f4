"""Packing is planned where it takes fewer hours, and what trimming saves is what micro-batches come to."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.packing import first_fit_decreasing, trimmed_length, trimmed_shares, window_counts
from shallowflow.planner.plan import Workload
from shallowflow.planner.verify import doubts
from shallowflow.planning import make_plan
from shallowflow.profiles import ModelSpec, load_gpu
from shallowflow.profiles.load import load_instances
from shallowflow.session import RequestError, Session
from tests.runtime import tiny

LENGTH = 128
GPU = load_gpu("t4")
MODEL = ModelSpec(name="tiny", config=dict(tiny.CONFIG))
OWN_ATTENTION = ModelSpec(name="tiny", config={**tiny.CONFIG, "model_type": "stablelm"})
SHORT, FULL = [12] * 400, [LENGTH] * 400


def work(lengths: list[int], **changes: Any) -> Workload:
    """The work on windows of these lengths."""
    return Workload(
        sequence_length=LENGTH,
        total_tokens=sum(lengths),
        num_sequences=len(lengths),
        num_packed_sequences=len(first_fit_decreasing(lengths, LENGTH)),
        window_counts=window_counts(lengths, LENGTH),
        global_batch_size=4,
        rank=8,
        quantization="fp16",
        **changes,
    )


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    num_windows=st.integers(1, 4),
    micro_batch_size=st.sampled_from([1, 2]),
)
def test_trimmed_shares_are_those_of_every_draw(counts: list[int], num_windows: int, micro_batch_size: int) -> None:
    """The shares of lengths are those over all draws of a step's windows, each as likely as its windows are many."""
    expected = np.zeros(len(counts))
    for drawn in itertools.product(range(len(counts)), repeat=num_windows):
        likelihood = np.prod([counts[i] / sum(counts) for i in drawn])
        longest = sorted(drawn, reverse=True)[::micro_batch_size]
        for bucket, number in Counter(longest).items():
            expected[bucket] += likelihood * number / len(longest)

    np.testing.assert_allclose(trimmed_shares(counts, num_windows, micro_batch_size), expected, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 300), min_size=1), planned=st.integers(1, 300))
def test_counts_are_of_trimmed_lengths(lengths: list[int], planned: int) -> None:
    """Every window is counted once, where a micro-batch of it alone is trimmed to."""
    cut = [min(planned, length) for length in lengths]

    counts = window_counts(cut, planned)

    trimmed = Counter(trimmed_length(length, planned) for length in cut)
    assert dict(trimmed) == {trimmed_length(64 * steps, planned): n for steps, n in enumerate(counts, 1) if n}


def test_short_documents_are_packed() -> None:
    """Chosen is what takes fewer hours, and it says what the other would take; either can be had by name."""
    chosen = make_plan(MODEL, GPU, work(SHORT))
    packed, alone = (make_plan(MODEL, GPU, work(SHORT, packing=packing)) for packing in (True, False))

    assert chosen.configuration == packed.configuration and chosen.configuration.packing
    assert not alone.configuration.packing
    assert packed.wall.total_seconds < alone.wall.total_seconds
    assert (packed.num_steps, alone.num_steps) == (10, 100)
    assert chosen.workload == work(SHORT)
    assert any(note.startswith("Packed, 6% of the positions are padding, not 91%") for note in chosen.notes)
    assert all(doubts(plan, GPU, load_instances(GPU.name)) == [] for plan in (chosen, packed, alone))


def test_a_packed_step_takes_more_than_another() -> None:
    """The same configuration packed needs its mask's memory, and saves no more than a few launches."""
    packed, alone = (make_plan(MODEL, GPU, work(FULL, packing=packing)) for packing in (True, False))
    same = Session(MODEL, GPU).trace(replace(packed.configuration, packing=False))

    assert packed.prediction.peak_allocated_bytes > same.peak_allocated_bytes
    assert packed.prediction.step_seconds > 0.99 * alone.prediction.step_seconds


def test_full_sequences_are_not_traced_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packing saves no sequence a bound tells that it cannot win, and no packed step is traced."""
    make, traced = Session._meta_step, []
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))

    def watch(session: Session, configuration: Any, like_layer: int | None = None) -> Any:
        traced.append(configuration.packing)
        return make(session, configuration, like_layer)

    monkeypatch.setattr(Session, "_meta_step", watch)
    plan = make_plan(MODEL, GPU, work(FULL, activations="save", micro_batch_size=4, loss_chunks=1))

    assert traced and not any(traced)
    assert not plan.configuration.packing


def test_trimming_spares_what_padding_took() -> None:
    """Steps of full windows take what a step is predicted to; shorter windows take less, the shorter the less."""
    seconds = []
    for lengths in (FULL, [70] * 400, [64] * 400):
        plan = make_plan(MODEL, load_gpu("cpu"), work(lengths, packing=False))
        assert plan.wall.training_seconds == pytest.approx(plan.num_steps * plan.mean_step_seconds)
        seconds.append(plan.mean_step_seconds / plan.prediction.step_seconds)

    assert seconds[:2] == pytest.approx([1, 1])
    assert 0.4 < seconds[2] < 0.999


@pytest.mark.parametrize(
    ("model", "length", "reason"),
    [
        (OWN_ATTENTION, LENGTH, "model_type stablelm was never shown to keep packed documents apart"),
        (MODEL, 100, "a sequence of 100 tokens is no multiple of 16"),
    ],
)
def test_what_cannot_be_packed_is_refused_or_told(model: ModelSpec, length: int, reason: str) -> None:
    """Where packing is asked for that is an error of one line; where it is left open, a note."""
    wanted = replace(work(SHORT), sequence_length=length)

    with pytest.raises(RequestError, match=f"cannot be packed: .*{reason}; try --no-packing$"):
        make_plan(model, GPU, replace(wanted, packing=True))

    plan = make_plan(model, GPU, wanted)
    assert not plan.configuration.packing
    assert any(reason in note for note in plan.notes)


def test_without_lengths_nothing_is_packed() -> None:
    """Work that is given in tokens is taken to fill its sequences, and the plan says so."""
    plan = make_plan(MODEL, GPU, replace(work(SHORT), num_sequences=None, num_packed_sequences=None, window_counts=()))

    assert not plan.configuration.packing
    assert any("given in tokens and its sequences are taken to be full" in note for note in plan.notes)
