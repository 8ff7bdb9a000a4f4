"""From a request to a plan: it fits, it adds up, it is remembered, and a refusal offers what was computed to work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shallowflow import planning
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.problem import HEADROOM, budget_bytes
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.serialize import from_json, to_json
from shallowflow.planning import make_plan
from shallowflow.profiles import GpuSpec, ModelSpec, load_gpu, load_model
from shallowflow.session import RequestError, Session

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "sliding_window": 32,
    "max_position_embeddings": 512,
}
T4 = load_gpu("t4")
MIB = 2**20
WORK = Workload(sequence_length=128, global_batch_size=4)
SHORT = Workload(sequence_length=64, global_batch_size=2, total_tokens=100_000, rank=8, quantization="fp16")


def model(config: dict[str, Any] = CONFIG) -> ModelSpec:
    """A model of these facts."""
    return ModelSpec(name="tiny", config=config)


@cache
def planned(work: Workload, budget: int | None = None) -> Plan:
    """The plan for the tiny model on a T4, whole or with a smaller budget."""
    return make_plan(model(), T4 if budget is None else with_budget(budget), work)


def refusal(gpu: GpuSpec, work: Workload) -> Infeasible:
    """Why nothing fits."""
    with pytest.raises(Infeasible) as caught:
        make_plan(model(), gpu, work)
    return caught.value


def with_budget(budget: int) -> GpuSpec:
    """A T4 whose allocator may reserve just so much."""
    gpu = replace(T4, memory_bytes=math.ceil((budget + T4.context_bytes) / (1 - HEADROOM)))
    assert budget_bytes(gpu) == budget
    return gpu


@cache
def smallest_reserved(work: Workload) -> int:
    """The smallest budget with a plan, found by halving; segments are multiples of 2 MiB."""
    step = 2 * MIB
    low, high = 0, 512
    while high - low > 1:
        middle = (low + high) // 2
        try:
            make_plan(model(), with_budget(middle * step), work)
        except Infeasible:
            low = middle
        else:
            high = middle
    return high * step


WORKS = pytest.mark.parametrize(
    "work",
    [
        WORK,
        SHORT,
        replace(WORK, quantization="nf4", rank=8),
        replace(WORK, quantization="int8", objective="quality"),
        replace(WORK, quantization="fp16", global_batch_size=6, num_gpus=2),
    ],
    ids=["any", "short", "nf4", "int8 by quality", "two GPUs"],
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


def test_memory_decides_to_the_byte() -> None:
    """With as much as the smallest step reserves there is a plan, and with one byte less there is none."""
    needed = refusal(with_budget(2 * MIB), WORK)
    reserved = smallest_reserved(WORK)

    plan = make_plan(model(), with_budget(reserved), WORK)

    assert plan.prediction.peak_reserved_bytes == plan.budget_bytes == reserved
    assert refusal(with_budget(reserved - 1), WORK).smallest_bytes > 0
    assert needed.smallest_bytes >= reserved + T4.context_bytes


def test_as_much_memory_as_the_refusal_asks_for_is_enough() -> None:
    """The number in the message is the number that a device needs to have."""
    gpu = with_budget(smallest_reserved(WORK) // 2)

    needed = refusal(gpu, WORK).smallest_bytes

    enough = replace(T4, memory_bytes=needed)
    assert make_plan(model(), enough, WORK).prediction.peak_reserved_bytes <= budget_bytes(enough)


@pytest.mark.parametrize(
    ("share", "work"),
    [(0.0, WORK), (0.9, WORK), (0.6, replace(WORK, quantization="fp16", rank=64)), (0.999, SHORT)],
    ids=["nothing", "most", "half of much", "almost all"],
)
def test_every_offered_remedy_fits(share: float, work: Workload) -> None:
    """Each option of a refusal, given alone, leads to a plan within the memory it names."""
    gpu = with_budget(int(share * smallest_reserved(work)))

    found = refusal(gpu, work)

    assert found.smallest_bytes > found.memory_bytes == gpu.memory_bytes
    assert found.remedies
    for remedy in found.remedies:
        changed, changed_gpu = applied(remedy.option, work, gpu)
        plan = make_plan(model(), changed_gpu, changed)
        assert plan.prediction.peak_reserved_bytes <= budget_bytes(changed_gpu)
        assert remedy.peak_process_bytes <= budget_bytes(changed_gpu) + changed_gpu.context_bytes


def test_a_host_too_small_for_what_is_offloaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the host's memory is short, the refusal says so, and its remedy plans without offloading."""
    monkeypatch.setattr(Session, "_host_bytes", lambda _session, _workload: 1000)

    found = refusal(T4, replace(SHORT, activations="offload"))

    assert "GiB of host memory for offloaded activations" in str(found) and "too much" not in str(found)
    assert [remedy.option for remedy in found.remedies] == ["the same without --fix activations=offload"]
    free = make_plan(model(), T4, SHORT)
    assert all(strategy.activations != "offload" for strategy in free.configuration.strategies())


def applied(option: str, work: Workload, gpu: GpuSpec) -> tuple[Workload, GpuSpec]:
    """The request after one option of the command line."""
    name, value = option.split()
    if name == "--gpu":
        return work, load_gpu(value)
    if name == "--quantization":
        assert value == "any"
        return replace(work, quantization="any"), gpu
    entry: dict[str, Any] = {name.removeprefix("--").replace("-", "_"): int(value)}
    return replace(work, **entry), gpu


def test_the_step_of_several_gpus_holds_their_buckets() -> None:
    """A replica among two needs at least its gradients once more than it needs alone with the same micro-batch."""
    alone = planned(replace(WORK, quantization="fp16", rank=64, global_batch_size=2))

    many = planned(replace(WORK, quantization="fp16", rank=64, global_batch_size=4, num_gpus=2))

    assert many.configuration == replace(alone.configuration, num_gpus=2)
    adapter = next(part.num_bytes for part in alone.memory if part.category == "adapter")
    assert many.prediction.peak_allocated_bytes >= alone.prediction.peak_allocated_bytes + adapter
    assert many.prediction.communication_seconds > 0


def test_what_overflows_in_fp16_needs_a_gpu_with_bf16() -> None:
    """A model whose activations leave fp16's range is refused on a T4, and what the refusal names works."""
    with pytest.raises(RequestError, match=r"overflows in fp16 .*--gpu l4$"):
        make_plan(model(GEMMA), T4, SHORT)

    plan = make_plan(model(GEMMA), load_gpu("l4"), SHORT)
    assert plan.compute_dtype == "bfloat16"
    assert plan.prediction.peak_reserved_bytes <= plan.budget_bytes


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does() -> None:
    """Sequences are not cut: the message names the next global batch that all GPUs can share."""
    work = replace(SHORT, global_batch_size=5, num_gpus=2)

    with pytest.raises(RequestError, match=r"5 sequences .* 2 GPUs; try --global-batch-size 6$"):
        make_plan(model(), T4, work)

    assert make_plan(model(), T4, replace(work, global_batch_size=6)).configuration.global_batch_size == 6


@pytest.mark.parametrize(
    ("change", "said", "remedy"),
    [
        ({"sequence_length": 1025}, "--sequence-length 1024$", {"sequence_length": 1024}),
        ({"rank": 129}, "hidden size 128 .* rank up to 128$", {"rank": 128}),
        ({"rank": None, "min_rank": 300}, "rank 300 is more than", {"rank": None, "min_rank": 128}),
        ({"region": "nowhere"}, "'nowhere'; known: .*us-east-1", {"region": "us-east-1"}),
    ],
)
def test_a_request_that_cannot_be_is_refused_with_one_that_can(
    change: dict[str, Any], said: str, remedy: dict[str, Any]
) -> None:
    """The message names the value, its limit, and a value that plans."""
    with pytest.raises(RequestError, match=said) as caught:
        make_plan(model(), T4, replace(SHORT, **change))

    assert "\n" not in str(caught.value)
    assert make_plan(model(), T4, replace(SHORT, **remedy)).prediction.traced


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        ({"sequence_lenght": 64}, "unknown workload 'sequence_lenght'; there are sequence_length"),
        ({"sequence_length": "long"}, r"bad workload: Expected `int`, got `str` - at `\$.sequence_length`"),
        ({"sequence_length": 1}, r"bad workload: .*\$.sequence_length"),
        ({"global_batch_size": 0}, r"bad workload: .*\$.global_batch_size"),
        ({"quantization": "fp4"}, r"bad workload: .*\$.quantization"),
    ],
)
def test_a_workload_that_is_none_is_refused(workload: dict[str, Any], said: str) -> None:
    """The entry that is unknown or wrong is named in one line."""
    with pytest.raises(RequestError, match=said) as caught:
        planning.plan("HuggingFaceTB/SmolLM2-135M", "t4", **workload)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "plain", "dtype"), [("t4", "fp16", "float16"), ("l4", "bf16", "bfloat16"), ("cpu", "fp32", "float32")]
)
def test_quality_leaves_weights_unquantized_where_they_fit(gpu: str, plain: str, dtype: str) -> None:
    """By quality, with memory enough, every layer keeps its weights in the dtype of the chip."""
    plan = make_plan(model(), load_gpu(gpu), replace(SHORT, objective="quality", quantization="any"))

    assert {run.strategy.weight_format for run in plan.configuration.layers} == {plain}
    assert (plan.compute_dtype, plan.weight_error) == (dtype, 0)


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a model's own code raises on ``meta`` becomes one line that names the model."""
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))

    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator\nand a long explanation")

    monkeypatch.setattr(Session, "_meta_step", fail)

    with pytest.raises(RequestError, match=r"^the training step of tiny cannot be traced: no such operator$"):
        make_plan(model(), T4, SHORT)


def test_more_memory_never_slows_a_plan() -> None:
    """Over GPUs that differ in memory alone, the predicted step gets no slower as they grow."""
    smallest = smallest_reserved(WORK)
    budgets = [smallest + extra * MIB for extra in (0, 8, 32, 64, 128, 512)]

    seconds = [planned(WORK, budget).prediction.step_seconds for budget in budgets]

    assert all(later <= 1.02 * earlier for earlier, later in pairwise(seconds))
    assert seconds[-1] < seconds[0]
