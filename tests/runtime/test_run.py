"""A plan is run from end to end on a tiny model, and what it predicted is what is measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import shallowflow
from shallowflow.planner import serialize
from shallowflow.planner.plan import Plan
from shallowflow.runtime import batches, build, quantized
from shallowflow.runtime.documents import read_documents
from shallowflow.runtime.record import RunRecord, StepRecord, median_step_seconds, timed_steps
from shallowflow.runtime.run import RunRequest, train
from shallowflow.runtime.weights import find_weights, load_tokenizer, load_weights
from tests.runtime import tiny

MIB = 2**20


class Sources(HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        loads = {"src", "srcset", "data", "poster"} | ({"href"} if tag == "link" else set())
        self.found += [value for name, value in attributes if name in loads and value]


def trained_model(plan: Plan, folder: Path, adapter: Path) -> Any:
    """The base model in the plan's format with a saved adapter, put together by PEFT alone."""
    base = load_weights(find_weights("tiny", folder), plan.model_config, plan.compute_dtype, plan.num_parameters)
    build.apply_formats(base, plan.configuration.strategies(), plan.compute_dtype)
    return PeftModel.from_pretrained(base, str(adapter))


def perplexity_by_hand(model: torch.nn.Module, found: list[batches.Window]) -> float:
    """exp of the mean loss, window by window in double precision."""
    total = 0.0
    for window in found:
        tokens, labels = (torch.tensor([row[: window.num_targets]]) for row in (window.input_ids, window.labels))
        with torch.no_grad():
            logits = model(input_ids=tokens).logits.double()
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
    return math.exp(total / sum(window.num_targets for window in found))


# A whole run


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("weight_format", tiny.PLANNED_FORMATS)
def test_a_run_learns_and_can_be_taken_away(
    weight_format: str,
    plans: dict[str, Plan],
    request_for: Callable[..., RunRequest],
    held_out: Path,
    tiny_folder: Path,
) -> None:
    """Perplexity falls, and PEFT puts the saved adapter on the base to the very perplexity that the record tells."""
    plan = plans[weight_format]
    request = request_for(eval_data=held_out, num_steps=8, learning_rate=5e-3)

    record = train(plan, request)

    assert record.outcome == "completed"
    assert len(record.steps) == 8
    assert record.perplexity_before is not None and record.perplexity_after is not None
    assert record.perplexity_after < 0.9 * record.perplexity_before
    adapter = load_file(request.output / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in adapter.values())
    assert all(bool(t.any()) for name, t in adapter.items() if "lora_B" in name)
    model = trained_model(plan, tiny_folder, request.output / "adapter")
    assert sum(map(quantized.is_quantized, model.modules())) == (0 if weight_format == "fp16" else 7 * tiny.NUM_LAYERS)
    tokenizer = load_tokenizer(find_weights("tiny", tiny_folder))
    found = batches.windows(read_documents(held_out), tokenizer, plan.configuration.sequence_length)
    assert perplexity_by_hand(model, found) == pytest.approx(record.perplexity_after, rel=1e-4)
    with model.disable_adapter():
        # int8 activations are rounded anew in another batch: the last digits differ
        assert perplexity_by_hand(model, found) == pytest.approx(record.perplexity_before, rel=1e-3)


@pytest.mark.parametrize("weight_format", tiny.PLANNED_FORMATS)
def test_memory_is_what_was_predicted(
    weight_format: str, plans: dict[str, Plan], request_for: Callable[..., RunRequest]
) -> None:
    """Resident and peak bytes that the CPU's allocator reports are within 2 % of the plan's."""
    record = train(plans[weight_format], request_for())

    prediction = plans[weight_format].prediction
    by_quantity = {c.quantity: c for c in record.comparisons}
    assert by_quantity["resident between steps"].predicted == prediction.resident_bytes
    assert by_quantity["peak allocated"].predicted == prediction.peak_allocated_bytes
    for quantity in ("resident between steps", "peak allocated"):
        assert abs(by_quantity[quantity].error) < 0.02
        assert by_quantity[quantity].measured > 0.1 * MIB
    assert by_quantity["step"].measured == record.steps[-1].seconds


def test_a_plan_that_recomputes_is_run_as_planned(
    plans: dict[str, Plan], request_for: Callable[..., RunRequest], tiny_folder: Path
) -> None:
    """Run with recomputation, the same model takes less memory and learns the same."""
    plan = plans["nf4"]
    other = shallowflow.plan(
        str(tiny_folder),
        "cpu",
        quantization="nf4",
        activations="recompute",
        sequence_length=32,
        global_batch_size=4,
        rank=8,
        double_quantization=False,
    )
    assert {run.strategy.activations for run in plan.configuration.layers} == {"save"}

    kept = train(plan, request_for())
    forgotten = train(other, request_for(output=request_for().output.with_name("other")))

    assert [s.loss for s in forgotten.steps] == pytest.approx([s.loss for s in kept.steps], rel=1e-5)
    peaks = [next(c.measured for c in r.comparisons if c.quantity == "peak allocated") for r in (forgotten, kept)]
    assert peaks[0] < 0.9 * peaks[1]


def test_the_folder_holds_everything(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """All of a run lies in the new folder, what it spent too, and the record in JSON is the record returned."""
    plan, request = plans["nf4"], request_for(usd_per_hour=36.0)

    record = train(plan, request)

    names = {"adapter", "run.json", "plan.json", "report.html", "request.json", "checkpoints", "spending"}
    assert {path.name for path in request.output.iterdir()} == names
    assert serialize.from_json((request.output / "plan.json").read_bytes()) == plan
    written = json.loads((request.output / "run.json").read_text(encoding="utf-8"))
    assert [step["loss"] for step in written["steps"]] == [step.loss for step in record.steps]
    assert (written["outcome"], written["model_name"]) == ("completed", "tiny")
    assert written["versions"]["torch"] == version("torch")
    card = json.loads((request.output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (card["r"], card["lora_alpha"]) == (plan.configuration.rank, plan.configuration.alpha)
    assert card["base_model_name_or_path"] == plan.model_name


def test_the_page_needs_nothing_else(
    plans: dict[str, Plan], request_for: Callable[..., RunRequest], held_out: Path
) -> None:
    """The report loads nothing from anywhere, and tells the model, the perplexities and the measured peak."""
    request = request_for(eval_data=held_out)

    record = train(plans["nf4"], request)

    page = (request.output / "report.html").read_text(encoding="utf-8")
    sources = Sources()
    sources.feed(page)
    assert all(source.startswith("data:") for source in sources.found)
    styles = re.findall(r"<style>.*?</style>", page, re.DOTALL)
    assert styles and not any("url(" in style or "@import" in style for style in styles)
    assert re.search(r"<h1>tiny on cpu</h1>", page, re.IGNORECASE)
    assert f"{record.perplexity_before:.2f} &rarr; {record.perplexity_after:.2f}" in page
    assert all(c.quantity in page for c in record.comparisons)


def test_a_name_is_no_code(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """A model's name with markup in it is shown, not obeyed."""
    request = request_for(num_steps=1)

    train(replace(plans["nf4"], model_name="<script>alert(1)</script>"), request)

    page = (request.output / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


# What a record tells


def test_the_same_seed_gives_the_same_run(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """Losses and adapters repeat to the last bit with the seed, and differ with another."""
    folders = [request_for().output.with_name(name) for name in ("one", "two", "three")]

    runs = [train(plans["fp16"], request_for(output=f, seed=s)) for f, s in zip(folders, (7, 7, 8), strict=True)]

    losses = [[step.loss for step in run.steps] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(t, adapters[1][name]) for name, t in adapters[0].items())
    assert not all(torch.equal(t, adapters[2][name]) for name, t in adapters[0].items())


def test_one_pass_is_the_default(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """Without a number of steps every window is learned, and the tokens and the padding told are those of the data."""
    length, per_step = 32, 4
    num_windows = sum(math.ceil(len(line) / length) for line in tiny.LINES)
    assert num_windows % per_step == 0  # so that no window is taken from a second pass

    record = train(plans["fp16"], request_for(num_steps=None))

    assert len(record.steps) == num_windows // per_step
    assert sum(step.num_target_tokens for step in record.steps) == sum(map(len, tiny.LINES))
    assert record.padding_share == pytest.approx(1 - sum(map(len, tiny.LINES)) / (num_windows * length))


def test_a_step_begun_is_a_step(plans: dict[str, Plan], request_for: Callable[..., RunRequest], tmp_path: Path) -> None:
    """Where the last sequences of a pass do not fill a step, that step is still made, from the next pass on."""
    (tmp_path / "five.txt").write_text("x" * (4 * 32 + 1), encoding="utf-8")

    record = train(plans["fp16"], request_for(data=tmp_path / "five.txt", num_steps=None))

    assert len(record.steps) == 2


def test_money_is_time_times_price(plans: dict[str, Plan], request_for: Callable[..., RunRequest]) -> None:
    """At 36 dollars an hour a second costs a cent; without a price nothing is said to cost anything."""
    paid = train(plans["fp16"], request_for(usd_per_hour=36.0))
    free = train(plans["fp16"], request_for(output=request_for().output.with_name("free")))

    assert paid.usd == pytest.approx(paid.seconds / 100)
    assert [step.usd for step in paid.steps] == pytest.approx([step.seconds / 100 for step in paid.steps])
    assert free.usd is None and all(step.usd is None for step in free.steps)


def test_time_is_taken_of_ordinary_steps() -> None:
    """Neither the first step nor the one whose memory is measured counts for speed."""
    seconds = [100.0, 50.0, 2.0, 4.0, 9.0]
    steps = tuple(
        StepRecord(
            index=i,
            loss=1.0,
            gradient_norm=1.0,
            loss_scale=1.0,
            skipped=False,
            num_target_tokens=30,
            seconds=s,
            usd=None,
            memory_measured=i == 1,
        )
        for i, s in enumerate(seconds)
    )

    assert [step.index for step in timed_steps(steps)] == [2, 3, 4]
    assert median_step_seconds(steps) == 4.0
    assert median_step_seconds(steps[:2]) is None
    record = RunRecord(
        format_version=1,
        model_name="x",
        device="x",
        outcome="completed",
        started="",
        seconds=1.0,
        usd=None,
        comparisons=(),
        perplexity_before=None,
        perplexity_after=None,
        padding_share=0.0,
        num_skipped=0,
        steps=steps,
        versions={},
    )
    assert record.tokens_per_second == pytest.approx(90 / 15)
    assert replace(record, steps=()).tokens_per_second is None
