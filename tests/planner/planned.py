"""A model small enough to be planned within a test, on a T4 with as much memory as is wanted."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from shallowflow.planner.allowed import HEADROOM, budget_bytes
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.remedies import Infeasible
from shallowflow.planning import make_plan
from shallowflow.profiles import GpuSpec, ModelSpec, load_gpu

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
            make_plan(model(), with_budget(middle * step), work, with_remedies=False)
        except Infeasible:
            low = middle
        else:
            high = middle
    return high * step
