"""A layer's cost under every strategy, and profiles at sequence lengths between those that were traced."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shallowflow
from shallowflow.planner import costs
from shallowflow.planner.allowed import every_strategy
from shallowflow.planner.costs import StepProfile
from shallowflow.planner.layer_cost import LayerCost, LengthProfile, Unlike, layer_cost
from shallowflow.planner.strategies import Activations, Adapter, Strategy, TargetModules, WeightFormat
from shallowflow.profiles import ModelSpec, load_gpu, load_model
from shallowflow.profiling import length_profile
from shallowflow.runtime import build
from shallowflow.session import RequestError, Session
from tests.planner import tiny
from tests.profile_strategies import step_profiles
from tests.strategies import FORMATS, POLICIES, T4


def cost(
    weight_format: WeightFormat, activations: Activations, family: str = "llama", twice: bool = False
) -> LayerCost:
    """One layer of a tiny model, 2 x 128 tokens at rank 8."""
    strategy = Strategy(weight_format=weight_format, activations=activations)
    return layer_cost(tiny.profiled(family, "t4", strategy, 128), 2, 8, T4)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("weight_format", FORMATS)
def test_policies_keep_what_they_say(family: str, weight_format: WeightFormat) -> None:
    """The less of a layer is saved the more is computed again, and only what is offloaded goes to the host."""
    found = {policy: cost(weight_format, policy, family) for policy in POLICIES}

    saved = {policy: c.saved_bytes for policy, c in found.items()}
    assert saved["recompute"] < min(saved["recompute attention"], saved["recompute mlp"])
    assert max(saved["recompute attention"], saved["recompute mlp"]) < saved["save"]
    assert saved["offload"] < saved["save"] - found["offload"].host_bytes / 2
    for policy, c in found.items():
        assert (c.host_bytes > 0) == (policy == "offload")
        assert (c.recomputed_bytes > 0) == policy.startswith("recompute")
        assert c.recomputed_bytes <= c.backward_transient_bytes + c.saved_bytes
        assert (c.resident_bytes, c.gradient_bytes) == (found["save"].resident_bytes, found["save"].gradient_bytes)
    assert (
        found["recompute"].backward_seconds > found["recompute mlp"].backward_seconds > found["save"].backward_seconds
    )
    assert found["offload"].forward_seconds > found["save"].forward_seconds


def test_weights_weigh_what_their_format_does() -> None:
    """Between steps int8 takes half of fp16, nf4 a quarter and its constants, fewer where they are quantized, too."""
    smollm = Session(load_model("SmolLM2-135M"), T4)
    formats: list[tuple[WeightFormat, bool]] = [("fp16", False), ("int8", False), ("nf4", False), ("nf4", True)]
    found: list[int] = []
    for weight_format, twice in formats:
        strategy = Strategy(weight_format=weight_format, activations="save", double_quantization=twice)
        known = layer_cost(smollm.profile(strategy, 64), 1, 8, T4)
        found.append(known.resident_bytes - 3 * known.gradient_bytes)
    num_weights = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536

    bytes_per_weight = [num_bytes / num_weights for num_bytes in found]
    assert bytes_per_weight == pytest.approx([2, 1, 0.5 + 4 / 64, 0.5 + 1 / 64], rel=0.02)


@pytest.mark.parametrize("target_modules", ["all-linear", "attention", ("q_proj", "down_proj")])
@pytest.mark.parametrize("adapter", get_args(Adapter))
def test_an_adapter_has_the_parameters_that_it_is_built_with(adapter: Adapter, target_modules: TargetModules) -> None:
    """What rank is enough follows from the parameters of this kind of adapter on these modules, counted at any rank."""
    config = {**tiny.LLAMA, "num_hidden_layers": 5}
    chosen = Session(ModelSpec(name="tiny", config=config), T4, adapter=adapter, target_modules=target_modules)

    at_any, per_rank = chosen.adapter_parameters(64)

    for rank in (4, 12):
        model = build.load_model(config)
        adapted = build.add_adapters(model, rank, 2 * rank, adapter, target_modules)
        assert at_any + rank * per_rank == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@given(
    profile=step_profiles(), micro_batch_size=st.integers(1, 8), rank=st.integers(1, 64), num_layers=st.integers(4, 30)
)
def test_a_layer_more_costs_its_cost(profile: StepProfile, micro_batch_size: int, rank: int, num_layers: int) -> None:
    """One more layer holds its resident bytes more between steps, and no step needs less than before."""
    found = layer_cost(profile, micro_batch_size, rank, T4)

    fewer, more = (
        costs.footprint([(profile, n)], micro_batch_size, rank, accumulates=True) for n in (num_layers, num_layers + 1)
    )

    assert more.resident_bytes - fewer.resident_bytes == found.resident_bytes
    kept = found.resident_bytes + found.gradient_bytes + found.saved_bytes
    assert 0 <= more.peak_allocated_bytes - fewer.peak_allocated_bytes <= max(kept, found.resident_bytes) + num_layers


# Sequence lengths


def session(**changes: Any) -> Session:
    """A tiny model on a T4."""
    config = {**tiny.LLAMA, "max_position_embeddings": 4096, **changes}
    return Session(ModelSpec(name="tiny", config=config), load_gpu("t4"))


def same(first: StepProfile, second: StepProfile) -> bool:
    """Whether two profiles agree to the last byte."""
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(StepProfile))


@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize("length", [640, 896])
def test_between_traced_lengths_a_profile_is_the_traced_one(activations: Activations, length: int) -> None:
    """Every size of every allocation and operator, to the byte."""
    strategy = Strategy(weight_format="nf4", activations=activations)

    found = length_profile(session(), strategy, 128, 1280).at(length)

    assert same(found, session().profile(strategy, length))


def test_quadratic_scores_are_followed() -> None:
    """Eager attention's scores grow with the square of the length, and so do their bytes."""
    strategy = Strategy(weight_format="fp16", activations="save")
    capped = session(model_type="gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=4096)

    profile = length_profile(capped, strategy, 128, 1280)

    assert same(profile.at(1024), capped.profile(strategy, 1024))


def test_a_length_where_the_step_changes_is_refused() -> None:
    """Beyond a sliding window there is a mask, and no polynomial leads there."""
    sliding = session(model_type="mistral", sliding_window=512)

    with pytest.raises(Unlike, match="tokens"):
        length_profile(sliding, Strategy(weight_format="fp16", activations="save"), 128, 2048)


@pytest.mark.parametrize(("shortest", "longest"), [(128, 256), (1, 4096), (512, 512)])
def test_too_few_lengths_are_refused(shortest: int, longest: int) -> None:
    """Three samples fix a parabola, a fourth checks it."""
    with pytest.raises(RequestError, match="fewer than four steps of 128 tokens; try"):
        length_profile(session(), Strategy(weight_format="fp16", activations="save"), shortest, longest)


def test_lengths_out_of_step_are_not_covered() -> None:
    """Kernels round sequences up, so nothing is said of lengths between the steps, nor outside the samples."""
    profile = tiny.profiled("llama", "t4", Strategy(weight_format="fp16", activations="save"), 128)
    lengths = LengthProfile({128: profile, 256: profile, 512: profile})

    assert [n for n in range(100, 700) if lengths.covers(n)] == [128, 256, 384, 512]
    with pytest.raises(ValueError, match="130 tokens are not between"):
        lengths.at(130)


@given(st.tuples(*3 * [st.integers(0, 10**6)]), st.lists(st.integers(1, 40), min_size=3, max_size=3, unique=True))
def test_a_parabola_is_found_again(coefficients: tuple[int, int, int], places: list[int]) -> None:
    """Three values of a polynomial of second degree give all others, without a rounding error."""
    base = tiny.profiled("llama", "t4", Strategy(weight_format="fp16", activations="save"), 128)

    def at(length: int) -> StepProfile:
        value = coefficients[0] + coefficients[1] * length + coefficients[2] * length**2
        return replace(base, sizes=np.full_like(base.sizes, value))

    lengths = LengthProfile({128 * n: at(128 * n) for n in places})

    for n in range(min(places), max(places) + 1):
        assert same(lengths.at(128 * n), at(128 * n))


# The whole model


def test_kinds_of_layers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without rotary embeddings are another kind; each kind has all strategies, as JSON says, too."""
    config = {**tiny.LLAMA, "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    config |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    spec = ModelSpec(name="tiny", config=config)
    monkeypatch.setattr("shallowflow.profiling.load_model", lambda _name: spec)
    one = (Strategy(weight_format="fp16", activations="save"),)
    monkeypatch.setattr("shallowflow.profiling.every_strategy", lambda *_: one)

    found = shallowflow.profile("tiny", sequence_length=64)

    assert [kind.layers for kind in found.kinds] == [(0, 1, 2), (3,)]
    with_rope, without = (kind.costs[0][1] for kind in found.kinds)
    assert without.saved_bytes == with_rope.saved_bytes
    assert without.forward_seconds < with_rope.forward_seconds


def test_every_strategy_of_a_device() -> None:
    """Four formats and five policies, and three more for nf4; where host and device are one, nothing is offloaded."""
    assert len(set(every_strategy(T4))) == 26
    assert len(every_strategy(load_gpu("cpu"))) == 22
    assert {s.weight_format for s in every_strategy(load_gpu("cpu"))} == {"fp32", "int8", "nf4"}
    assert all(s.weight_format == "nf4" for s in every_strategy(T4) if s.double_quantization)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence_length": 10**6}, "built for"),
        ({"rank": 10**5}, "hidden size"),
        ({"micro_batch_size": 0}, "is none"),
        ({"sequence_length": 1}, "is none"),
    ],
)
def test_sizes_that_are_none_are_refused(changes: dict[str, int], words: str) -> None:
    """Before anything is traced."""
    with pytest.raises(RequestError, match=words):
        shallowflow.profile("SmolLM2-135M", **changes)  # type: ignore[arg-type]


def test_what_a_model_has_no_module_for_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture without an MLP module lacks those strategies alone, on the screen and in JSON."""
    from shallowflow.cli import main

    two: tuple[Strategy, ...] = tuple(
        Strategy(weight_format="fp16", activations=policy) for policy in ("save", "recompute mlp")
    )
    monkeypatch.setattr("shallowflow.profiling.every_strategy", lambda *_: two)

    main(["profile", "opt-125m", "--sequence-length", "64"])
    shown = capsys.readouterr().out
    main(["profile", "opt-125m", "--sequence-length", "64", "--json"])
    record = json.loads(capsys.readouterr().out)

    assert "fp16, save activations" in shown
    assert "cannot recompute mlp: OPTDecoderLayer has no such module" in shown
    assert [pair[0]["activations"] for pair in record["kinds"][0]["costs"]] == ["save"]
    assert [pair[0]["activations"] for pair in record["refused"]] == ["recompute mlp"]
