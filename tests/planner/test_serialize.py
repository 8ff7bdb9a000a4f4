"""A plan survives its file; a file that is no plan is refused in one line that names the entry."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.serialize import PlanError, from_json, to_json
from tests import strategies
from tests.strategies import plans


@st.composite
def edits(draw: st.DrawFn) -> str:
    """A plan's text with one entry at any depth replaced by any JSON value, or deleted."""
    content = json.loads(to_json(draw(plans())))
    entry = content
    while True:
        keys = list(entry) if isinstance(entry, dict) else list(range(len(entry)))
        key = draw(st.sampled_from(keys))
        inner = entry[key]
        if not (isinstance(inner, (dict, list)) and inner and draw(st.booleans())):
            break
        entry = inner
    if draw(st.booleans()):
        del entry[key]
    else:
        entry[key] = draw(strategies.json_values)
    return json.dumps(content)


def plan() -> dict[str, Any]:
    """One plan's entries, with two runs of layers and one alternative."""
    strategy = {"weight_format": "nf4", "activations": "recompute"}
    configuration = {
        "layers": [{"first": 0, "last": 3, "strategy": strategy}, {"first": 4, "last": 7, "strategy": strategy}],
        "rank": 16,
        "alpha": 32,
        "sequence_length": 2048,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_gpus": 2,
    }
    prediction = {
        "resident_bytes": 10,
        "peak_allocated_bytes": 20,
        "peak_reserved_bytes": 30,
        "peak_process_bytes": 40,
        "step_seconds": 1.5,
        "communication_seconds": 0.0,
        "tokens_per_second": 100.0,
        "traced": True,
    }
    return {
        "format_version": 3,
        "model_name": "a/b",
        "model_config": {"model_type": "llama"},
        "num_parameters": 1000,
        "gpu": "t4",
        "compute_dtype": "float16",
        "attention": "SDPA",
        "memory_bytes": 100,
        "budget_bytes": 90,
        "workload": {"sequence_length": 2048, "global_batch_size": 16, "num_gpus": 2},
        "configuration": configuration,
        "prediction": prediction,
        "weight_error": 0.1,
        "memory": [{"category": "base weights", "num_bytes": 30}, {"category": "context", "num_bytes": 10}],
        "time": {
            "bound": "device",
            "device_seconds": 1.5,
            "host_seconds": 0.5,
            "waiting_seconds": 0.0,
            "kinds": [
                {"kind": "matmul float16", "seconds": 1.0, "roofline_share": 0.9},
                {"kind": "elementwise", "seconds": 0.5, "roofline_share": 0.8},
            ],
            "layers": [{"first": 0, "last": 7, "forward_seconds": 0.01, "backward_seconds": 0.02}],
            "update_seconds": 0.001,
        },
        "wall": {
            "start_seconds": 6.0,
            "load_seconds": 10.0,
            "tokenize_seconds": 1.0,
            "training_seconds": 100.0,
            "evaluation_seconds": 0.0,
            "save_seconds": 0.5,
        },
        "offers": [],
        "alternatives": [
            {"configuration": copy.deepcopy(configuration), "prediction": prediction, "weight_error": 0.1}
        ],
        "search": {
            "num_strategies": 4,
            "num_cells": 3,
            "num_nodes": 3,
            "num_traced": 1,
            "num_rejected": 0,
            "best_uniform_seconds": None,
        },
        "sensitivity": {
            "binding": "loss",
            "seconds_per_100_mib": 0.1,
            "next_rank": None,
            "next_rank_seconds": None,
        },
        "proof": {
            "status": "optimal",
            "gap": 0.0,
            "unfragmented_gap": 0.0,
            "score_picoseconds": 1,
            "bound_picoseconds": 1,
            "budget_bytes": 90,
            "harm": None,
            "host_bytes": None,
            "step_picoseconds": None,
            "strategies": [],
            "tables": [],
            "cells": [],
            "unfragmented": [],
        },
        "notes": [],
        "versions": {},
    }


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """An edit: the entry at *path*, such as ``memory.0.num_bytes``, becomes *value*."""

    def edit(content: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in parents:
            content = content[key]
        content[last] = value

    return edit


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    """An edit: the entry at *path* is gone."""

    def edit(content: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            content = content[key]
        del content[last]

    return edit


@given(plans())
def test_plan_to_json_and_back_is_the_identity(plan: Plan) -> None:
    """Nothing is lost, rounded or reordered on the way, and the text says where it ends."""
    text = to_json(plan)

    assert from_json(text) == plan
    assert from_json(text.encode()) == plan
    assert to_json(from_json(text)) == text
    assert text.endswith("}\n")


@settings(max_examples=300)
@given(edits())
def test_an_edited_plan_is_refused_in_one_line_or_read_as_it_stands(text: str) -> None:
    """Whatever one entry becomes, the answer is a plan that reads back as itself, or one line that says why not."""
    try:
        plan = from_json(text, "the plan")
    except PlanError as refusal:
        said = str(refusal)
    else:
        said = "the plan reads back" if from_json(to_json(plan)) == plan else "something was lost"

    assert said.startswith("the plan ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("edit", "entry"),
    [
        (put("prediction.step_seconds", "fast"), "$.prediction.step_seconds"),
        (put("configuration.rank", 2.5), "$.configuration.rank"),
        (put("configuration.rank", 0), "$.configuration.rank"),
        (put("configuration.rank", True), "$.configuration.rank"),
        (put("configuration.micro_batch_size", -1), "$.configuration.micro_batch_size"),
        (put("configuration.sequence_length", 1), "$.configuration.sequence_length"),
        (put("configuration.layers.1.strategy.weight_format", "fp4"), "$.configuration.layers[1].strategy.weight_"),
        (put("memory.0.num_bytes", -30), "$.memory[0].num_bytes"),
        (put("memory_bytes", -1), "$.memory_bytes"),
        (put("prediction.peak_process_bytes", None), "$.prediction.peak_process_bytes"),
        (put("prediction.step_seconds", -0.5), "$.prediction.step_seconds"),
        (put("weight_error", -0.1), "$.weight_error"),
        (put("compute_dtype", "float8"), "$.compute_dtype"),
        (put("workload.objective", "fame"), "$.workload.objective"),
        (put("alternatives.0.configuration.rank", 0), "$.alternatives[0].configuration.rank"),
        (put("notes", "none"), "$.notes"),
        (drop("budget_bytes"), "`budget_bytes`"),
        (put("workload.adapter", "ia3"), "$.workload.adapter"),
        (put("configuration.target_modules", []), "$.configuration.target_modules"),
        (put("configuration.target_modules", "mlp"), "$.configuration.target_modules"),
        (put("configuration.target_modules", ["q_proj", "a b"]), "$.configuration.target_modules[1]"),
        (put("alternatives.0.configuration.adapter", "dora"), "alternatives[0]: configuration.adapter is dora"),
        (put("alternatives.0.configuration.target_modules", ["q_proj"]), "configuration.target_modules is ('q_proj',)"),
        (drop("configuration.layers"), "`layers` - at `$.configuration`"),
        (drop("prediction.traced"), "`traced` - at `$.prediction`"),
        (put("format_version", 1), "format_version is 1"),
        (put("configuration.layers.1.first", 5), "layer 4 comes next"),
        (put("configuration.layers.1.first", 3), "layer 4 comes next"),
        (put("configuration.layers.1.last", 3), "configuration.layers"),
        (put("configuration.layers.0.first", 1), "layer 0 comes next"),
        (put("configuration.layers", []), "configuration.layers is empty"),
        (put("alternatives.0.configuration.layers", []), "alternatives[0]: configuration.layers is empty"),
        (put("alternatives.0.configuration.packing", True), "alternatives[0]: configuration.packing is True"),
        (put("alternatives.0.configuration.num_gpus", 9), "alternatives[0]: configuration.global_batch_size is"),
        (put("configuration.sequence_length", 1024), "configuration.sequence_length is 1024"),
        (put("configuration.num_gpus", 1), "workload.global_batch_size 16"),
        (put("workload.num_gpus", 1), "workload.num_gpus 1"),
        (put("configuration.layers.0.strategy.weight_format", "fp32"), "a layer's weights fp32"),
        (put("configuration.layers.1.last", 10**9), "layers[1].last"),
        (put("configuration.sequence_length", 10**9), "sequence_length"),
        (put("prediction.resident_bytes", 10**15), "prediction.resident_bytes is 1000000000000000, more than"),
        (put("memory_bytes", 1), "more than memory_bytes of 1"),
        (put("workload.global_batch_size", 8), "workload.global_batch_size 8"),
        (put("memory.0.num_bytes", 31), "memory sums to 41"),
        (put("memory", []), "memory sums to 0"),
        (put("time.kinds.1.seconds", 0.6), "time.kinds sums to 1.6"),
        (put("time.bound", "luck"), "$.time.bound"),
        (put("time.kinds.0.roofline_share", 1.5), "$.time.kinds[0].roofline_share"),
        (put("wall.load_seconds", -1.0), "$.wall.load_seconds"),
        (put("prediction.peak_process_bytes", 39), "prediction.peak_process_bytes is 39"),
        (drop("model_config.model_type"), "model_type"),
    ],
)
def test_nonsense_is_refused_by_the_name_of_its_entry(edit: Callable[[dict[str, Any]], None], entry: str) -> None:
    """The message is one line that says which file, and which entry of it is wrong."""
    content = json.loads(json.dumps(plan()))
    from_json(json.dumps(content))
    edit(content)

    with pytest.raises(PlanError) as caught:
        from_json(json.dumps(content), "my.json")

    message = str(caught.value)
    assert message.startswith("my.json ")
    assert entry in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "plan",
        b"\xff\xfe{",
        b"\x00",
        "\ud800",
        "[" * 100_000,
        json.dumps(plan()) + "}",
        json.dumps(plan())[:-1],
        json.dumps(plan()).replace("1.5", "NaN"),
        json.dumps(plan()).replace("1.5", "Infinity"),
        json.dumps(plan()).replace("1.5", "1e999"),
        json.dumps(plan()).replace("1.5", "9" * 5000),
        json.dumps(plan()).replace("llama", "\xff").encode("latin-1"),
    ],
    ids=lambda text: repr(text[:12]) if len(text) < 100 else repr(text[:3]) + str(len(text)),
)
def test_what_is_no_json_is_a_plan_error_too(text: str | bytes) -> None:
    """Cut off, binary, nested without end or with numbers that JSON has not: one line, and no other exception."""
    with pytest.raises(PlanError, match=r"^my.json ") as caught:
        from_json(text, "my.json")

    assert "\n" not in str(caught.value)


def test_the_number_of_steps_follows_from_the_work() -> None:
    """Sequences are the work's where they are known, else tokens over their length; the last step may be part empty."""
    read = from_json(json.dumps(plan()))
    works = [(2048 * 16 * 3, None), (2048 * 16 * 3 + 1, None), (1, None), (1, 16), (1, 17)]

    found = [
        replace(
            read,
            workload=Workload(global_batch_size=16, num_gpus=2, total_tokens=tokens, num_sequences=sequences),
        ).num_steps
        for tokens, sequences in works
    ]

    assert found == [3, 4, 1, 1, 2]
