"""From a request to a plan: it fits, it adds up, it is remembered, and more memory never slows it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from shallowflow.planner.plan import Workload
from shallowflow.planner.serialize import from_json, to_json
from shallowflow.planning import make_plan
from shallowflow.profiles import load_gpu, load_model
from shallowflow.session import Session
from tests.planner.planned import (
    CONFIG,
    MIB,
    SHORT,
    T4,
    WORK,
    model,
    planned,
    refusal,
    smallest_reserved,
    with_budget,
)

WORKS = pytest.mark.parametrize(
    "work",
    [
        WORK,
        SHORT,
        replace(WORK, quantization="nf4", rank=8),
        replace(WORK, quantization="int8", objective="quality"),
        replace(WORK, quantization="fp16", global_batch_size=6, num_gpus=2),
        replace(WORK, quantization="fp16", adapter="dora", target_modules="attention", activations="save"),
        replace(WORK, quantization="nf4", num_gpus=4, sharding="weights", activations="recompute"),
    ],
    ids=["any", "short", "nf4", "int8 by quality", "two GPUs", "DoRA in attention", "shared weights"],
)


@WORKS
@pytest.mark.parametrize("budget_mib", [96, 14_000])
def test_a_plan_fits_and_adds_up(work: Workload, budget_mib: int) -> None:
    """The step was traced whole, what it reserves is within the budget, and its parts sum to the process's peak."""
    plan = planned(work, budget_mib * MIB)

    prediction = plan.prediction
    assert prediction.traced
    assert prediction.peak_reserved_bytes <= plan.budget_bytes == budget_mib * MIB
    assert prediction.peak_process_bytes == prediction.peak_reserved_bytes + T4.context_bytes <= plan.memory_bytes
    assert sum(part.num_bytes for part in plan.memory) == prediction.peak_process_bytes
    assert all(c.prediction.peak_reserved_bytes <= plan.budget_bytes for c in plan.alternatives)
    assert plan.configuration not in [c.configuration for c in plan.alternatives]
    assert plan.configuration.global_batch_size == work.global_batch_size
    assert plan.configuration.num_layers == CONFIG["num_hidden_layers"]


@WORKS
def test_a_plan_survives_its_file(work: Workload) -> None:
    """What was planned can be written and read."""
    plan = planned(work)

    assert from_json(to_json(plan)) == plan


def test_offers_cost_the_hours_of_all_steps() -> None:
    """Training takes the number of steps times their predicted seconds, and every offer pays the whole wall's hours."""
    plan = planned(WORK)

    assert plan.wall.training_seconds == plan.num_steps * plan.prediction.step_seconds
    hours = plan.wall.total_seconds / 3600
    assert plan.num_steps == math.ceil(math.ceil(WORK.total_tokens / 128) / 4)
    assert plan.offers
    assert all(offer.hours >= hours > plan.wall.training_seconds / 3600 for offer in plan.offers)
    assert all(offer.on_demand_usd == offer.hours * offer.on_demand_usd_per_hour for offer in plan.offers)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_model_may_be_a_path(as_folder: bool, tmp_path: Path) -> None:
    """A folder with a config.json, or the file itself, plans like the facts in it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))

    found = load_model(str(tmp_path if as_folder else file))

    plan = make_plan(found, T4, SHORT)
    assert (plan.model_name, plan.model_config) == (tmp_path.name, CONFIG)
    assert replace(plan, model_name="tiny") == planned(SHORT)


def test_a_second_plan_traces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was traced once is remembered on disk, whole steps and parameter counts included."""
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))
    first_said: list[str] = []
    second_said: list[str] = []
    first = make_plan(model(), T4, SHORT, progress=first_said.append)

    def fail(*_: object) -> None:
        raise AssertionError("nothing is left to trace")

    monkeypatch.setattr(Session, "_meta_step", fail)
    second = make_plan(model(), T4, SHORT, progress=second_said.append)

    assert second == first
    assert first_said
    assert second_said == []


def test_a_remembered_plan_needs_no_torch(tmp_path: Path) -> None:
    """A process that finds everything remembered never imports torch or transformers."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    make_plan(load_model(str(tmp_path)), T4, SHORT)
    program = f"""
import sys
from shallowflow.planning import plan
plan({str(tmp_path)!r}, "t4", sequence_length=64, global_batch_size=2, total_tokens=100_000, rank=8,
     quantization="fp16")
print([name for name in ("torch", "transformers", "peft", "bitsandbytes") if name in sys.modules])
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_gradients_are_summed_in_memory_that_is_free_by_then() -> None:
    """A replica among two needs what it needs alone with the same micro-batch: its passes are over when it sends."""
    alone = planned(replace(WORK, quantization="fp16", rank=64, global_batch_size=2))

    many = planned(replace(WORK, quantization="fp16", rank=64, global_batch_size=4, num_gpus=2))

    assert many.configuration == replace(alone.configuration, num_gpus=2)
    assert many.prediction.resident_bytes == alone.prediction.resident_bytes
    assert many.prediction.peak_allocated_bytes == alone.prediction.peak_allocated_bytes
    assert many.prediction.communication_seconds > 0


def test_weights_are_shared_where_they_must_be() -> None:
    """With memory enough every GPU holds them all, which is faster; with too little for that they are shared."""
    work = replace(WORK, quantization="fp16", num_gpus=4, rank=8, num_stages=1)
    whole, shared = (replace(work, sharding=sharding) for sharding in ("none", "weights"))
    least = [smallest_reserved(each) for each in (whole, shared)]

    roomy, tight = planned(work), planned(work, least[1])

    assert least[1] < least[0]
    assert roomy.configuration.sharding == "none"
    assert roomy.prediction.step_seconds < planned(shared).prediction.step_seconds
    assert tight.configuration.sharding == "weights"
    assert "--sharding weights" in [remedy.option for remedy in refusal(with_budget(least[1]), whole).remedies]


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_shared_weights_are_divided(num_gpus: int) -> None:
    """What is resident is less by the frozen matrices, but for each GPU's part of them and what it is rounded up by."""
    work = replace(WORK, quantization="fp16", rank=8, num_gpus=num_gpus, micro_batch_size=1, optimizer="adamw")
    whole, shared = (planned(replace(work, sharding=s, activations="save")).prediction for s in ("none", "weights"))

    hidden, inner, layers = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
    each = hidden * (2 * hidden + 2 * hidden // 2) + 3 * hidden * inner
    matrices = 2 * (layers * each + CONFIG["vocab_size"] * hidden)  # in fp16, the head being the embeddings
    saved = whole.resident_bytes - shared.resident_bytes
    assert saved == pytest.approx(matrices * (num_gpus - 1) / num_gpus, abs=1024 * (7 * layers + 1))


@pytest.mark.parametrize(
    ("gpu", "plain", "dtype"), [("t4", "fp16", "float16"), ("l4", "bf16", "bfloat16"), ("cpu", "fp32", "float32")]
)
def test_quality_leaves_weights_unquantized_where_they_fit(gpu: str, plain: str, dtype: str) -> None:
    """By quality, with memory enough, every layer keeps its weights in the dtype of the chip."""
    plan = make_plan(model(), load_gpu(gpu), replace(SHORT, objective="quality", quantization="any"))

    assert {run.strategy.weight_format for run in plan.configuration.layers} == {plain}
    assert (plan.compute_dtype, plan.weight_error) == (dtype, 0)


def test_more_memory_never_slows_a_plan() -> None:
    """Over GPUs that differ in memory alone, the predicted step gets no slower as they grow."""
    smallest = smallest_reserved(WORK)
    budgets = [smallest + extra * MIB for extra in (0, 8, 32, 64, 128, 512)]

    seconds = [planned(WORK, budget).prediction.step_seconds for budget in budgets]

    assert all(later <= 1.02 * earlier for earlier, later in pairwise(seconds))
    assert seconds[-1] < seconds[0]
