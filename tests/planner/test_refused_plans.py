"""What cannot be planned is refused in one line that names what can, and what it names was computed to work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shallowflow import planning
from shallowflow.planner.allowed import budget_bytes
from shallowflow.planner.plan import Workload
from shallowflow.planning import make_plan
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.session import RequestError, Session
from tests.planner import planned
from tests.planner.planned import MIB, T4, model, refusal, smallest_reserved, with_budget

WORK, SHORT = (replace(work, num_stages=1) for work in (planned.WORK, planned.SHORT))
"""With the whole model on every GPU: what is refused in stages is tested beside them."""

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
    if name == "--gpus":
        return replace(work, num_gpus=int(value)), gpu
    if name == "--quantization":
        assert value == "any"
        return replace(work, quantization="any"), gpu
    entry: dict[str, Any] = {name.removeprefix("--").replace("-", "_"): int(value)}
    return replace(work, **entry), gpu


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
        ({"sequence_lenght": 64}, "unknown workload 'sequence_lenght'; did you mean sequence_length"),
        ({"sequence_length": "long"}, r"bad workload: Expected `int`, got `str` - at `\$.sequence_length`"),
        ({"sequence_length": 1}, r"bad workload: .*\$.sequence_length"),
        ({"max_weight_error": 1e200}, r"bad workload: .*\$.max_weight_error"),
        ({"global_batch_size": 0}, r"bad workload: .*\$.global_batch_size"),
        ({"quantization": "fp4"}, r"bad workload: .*\$.quantization"),
    ],
)
def test_a_workload_that_is_none_is_refused(workload: dict[str, Any], said: str) -> None:
    """The entry that is unknown or wrong is named in one line."""
    with pytest.raises(RequestError, match=said) as caught:
        planning.plan("HuggingFaceTB/SmolLM2-135M", "t4", **workload)

    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a model's own code raises on ``meta`` becomes one line that names the model."""
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))

    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator\nand a long explanation")

    monkeypatch.setattr(Session, "_meta_step", fail)

    with pytest.raises(RequestError, match=r"^the training step of tiny cannot be traced: no such operator$"):
        make_plan(model(), T4, SHORT)
