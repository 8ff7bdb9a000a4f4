"""Evaluations at intervals, the best adapter, samples and trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shallowflow.planner.plan import Plan
from shallowflow.runtime import sample
from shallowflow.runtime.progress import LEAST_IMPROVEMENT, exhausted, improves
from shallowflow.runtime.record import EvaluationRecord, RunRecord, StepRecord
from shallowflow.runtime.run import RunError, RunRequest, Silent, train
from shallowflow.runtime.weights import find_weights, load_tokenizer
from tests.runtime import killed, tiny

Requests = Callable[..., RunRequest]
ADAPTER = "adapter_model.safetensors"


def evaluation(step: int, loss: float) -> EvaluationRecord:
    """An evaluation that came to *loss*."""
    return EvaluationRecord(step=step, loss=loss, perplexity=1.0, seconds=1.0, tokens=1)


@pytest.fixture
def judged(request_for: Requests, tmp_path: Path) -> Callable[..., RunRequest]:
    """A run of twelve steps that gets worse after the third, and is evaluated every third."""
    path = tmp_path / "judge.txt"
    path.write_text(killed.HELD_OUT, encoding="utf-8")

    def make(**changes: Any) -> RunRequest:
        wanted = {
            "num_steps": killed.NUM_STEPS,
            "learning_rate": killed.LEARNING_RATE,
            "eval_data": path,
            "eval_every": killed.EVAL_EVERY,
            **changes,
        }
        return request_for(**wanted)

    return make


# Evaluations


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])]
)
def test_evaluations_come_at_their_steps(
    every: int | None, expected: list[int], plans: dict[str, Plan], request_for: Requests, held_out: Path
) -> None:
    """Before training, at every multiple and at the end; they change no loss, and their ends are what is told."""
    alone = train(plans["fp16"], request_for(num_steps=5, output=request_for().output.with_name("alone")))

    record = train(plans["fp16"], request_for(num_steps=5, eval_data=held_out, eval_every=every))

    assert [e.step for e in record.evaluations] == expected
    assert [step.loss for step in record.steps] == [step.loss for step in alone.steps]
    ends = (record.evaluations[0].perplexity, record.evaluations[-1].perplexity)
    assert (record.perplexity_before, record.perplexity_after) == ends
    assert {e.tokens for e in record.evaluations} == {len(held_out.read_text(encoding="utf-8"))}
    assert alone.evaluations == ()


def test_the_best_is_the_result(plans: dict[str, Plan], judged: Requests) -> None:
    """Without improvement training stops, and what is saved is the adapter of the best evaluation."""
    best = train(plans["fp16"], judged(num_steps=3, output=judged().output.with_name("three")))

    record = train(plans["fp16"], judged(patience=2))

    assert (record.outcome, len(record.steps), record.best_step) == ("stopped early", 9, 3)
    assert record.perplexity_after == best.perplexity_after == min(e.perplexity for e in record.evaluations)
    expected = load_file(judged().output.with_name("three") / "adapter" / ADAPTER)
    for folder in ("adapter", "best"):
        found = load_file(judged().output / folder / ADAPTER)
        assert all(tensor.equal(found[name]) for name, tensor in expected.items())


def test_more_patience_goes_on(plans: dict[str, Plan], judged: Requests) -> None:
    """A run that stopped early and is given more patience goes on from its last step, as if it had had it."""
    whole = train(plans["fp16"], judged(patience=3, output=judged().output.with_name("whole")))
    train(plans["fp16"], judged(patience=2))

    record = train(plans["fp16"], judged(patience=3, resume=True))

    assert [step.loss for step in record.steps] == [step.loss for step in whole.steps]
    assert [(e.step, e.loss) for e in record.evaluations] == [(e.step, e.loss) for e in whole.evaluations]
    assert (record.outcome, record.best_step) == (whole.outcome, whole.best_step)


class Interrupting(Silent):
    """Presses Ctrl-C in the middle of the evaluation after some steps."""

    def __init__(self) -> None:
        self.evaluating = False

    def stage(self, message: str, total: int | None = None) -> None:
        """Hear of a stage."""
        self.evaluating = message == "perplexity after step 6"

    def advance(self) -> None:
        """Hear of a part."""
        if self.evaluating:
            raise KeyboardInterrupt


def test_an_evaluation_cut_short_is_made_again(plans: dict[str, Plan], judged: Requests) -> None:
    """Interrupted in an evaluation and resumed, a run has the evaluations of one in one go, to the last bit."""
    whole = train(plans["fp16"], judged(patience=2, output=judged().output.with_name("whole")))

    cut = train(plans["fp16"], judged(patience=2), Interrupting())
    record = train(plans["fp16"], judged(patience=2, resume=True))

    assert (cut.outcome, [e.step for e in cut.evaluations]) == ("interrupted", [0, 3])
    assert [(e.step, e.loss) for e in record.evaluations] == [(e.step, e.loss) for e in whole.evaluations]
    assert (record.outcome, record.best_step) == (whole.outcome, whole.best_step)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.integers(1, 4))
def test_stopping_is_patience_after_the_best(losses: list[float], patience: int) -> None:
    """The best is never beaten by the least improvement; training stops at so many evaluations after it, no later."""
    made: list[EvaluationRecord] = []
    best: int | None = None
    for step, loss in enumerate(losses):
        made.append(evaluation(step, loss))
        best = step if improves(made, best) else best
        if exhausted(made, best, patience):
            break

    assert best is not None
    assert min(e.loss for e in made) >= losses[best] * (1 - LEAST_IMPROVEMENT)
    assert (len(made) - 1 - best == patience) == exhausted(made, best, patience)
    assert len(made) - 1 - best <= patience


def test_options_that_lack_others_are_told(plans: dict[str, Plan], request_for: Requests, held_out: Path) -> None:
    """Evaluations need a text, patience needs evaluations, and a number is at least one."""
    for changes, told in (
        ({"eval_every": 2}, "--eval-data"),
        ({"eval_data": held_out, "patience": 2}, "--eval-every"),
        ({"eval_data": held_out, "eval_every": 0}, "--eval-every is 0"),
        ({"track": ("abacus",)}, "give one of tensorboard, wandb"),
    ):
        with pytest.raises(RunError, match=told):
            train(plans["fp16"], request_for(**changes))


def test_other_held_out_text_is_another_run(plans: dict[str, Plan], judged: Requests, held_out: Path) -> None:
    """Losses on two texts do not belong in one list."""
    train(plans["fp16"], judged(num_steps=1))

    with pytest.raises(RunError, match="whose held-out text differs"):
        train(plans["fp16"], judged(eval_data=held_out, resume=True))


# Samples


def test_prompts_are_answered_twice(plans: dict[str, Plan], request_for: Requests) -> None:
    """Greedy answers before and after training; a resumed run keeps what was answered before."""
    prompt = "the cat"
    wanted = {"samples": (prompt,), "learning_rate": 0.02, "num_steps": 12}

    record = train(plans["fp16"], request_for(**wanted))
    again = train(plans["fp16"], request_for(**{**wanted, "num_steps": 13}, resume=True))

    (one,), (other,) = record.samples, again.samples
    assert one.prompt == prompt and one.before and one.after and one.before != one.after
    assert other.before == one.before
    written = json.loads((request_for().output / "run.json").read_text(encoding="utf-8"))
    assert written["samples"][0]["before"] == one.before


def test_an_answer_is_the_most_likely_continuation(tiny_folder: Path) -> None:
    """Each token is the one that the whole model likes best, until the sequence is full."""
    trainee = tiny.trainee()
    tokenizer = load_tokenizer(find_weights("tiny", tiny_folder))
    tokens = sample.prompt_tokens(tokenizer, "the cat", 16)
    expected = list(tokens)
    with torch.no_grad():
        while len(expected) < 16:
            likely = int(trainee.model(input_ids=torch.tensor([expected])).logits[0, -1].argmax())
            if likely == tokenizer.eos_token_id:
                break
            expected.append(likely)

    found = sample.answer(trainee, tokenizer, tokens, 16, tiny.CPU)

    assert found == tokenizer.decode(expected[len(tokens) :], skip_special_tokens=True)


def test_a_chat_template_is_used(tiny_folder: Path) -> None:
    """Where the tokenizer has one, the prompt is a user's turn and the answer the assistant's."""
    tokenizer = load_tokenizer(find_weights("tiny", tiny_folder))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"

    tokens = sample.prompt_tokens(tokenizer, "hi", 64)

    assert tokenizer.decode(tokens) == "[user]hi[assistant]"


@pytest.mark.parametrize(("prompt", "told"), [("", "is empty"), ("x" * 32, "32 tokens and the plan's sequences 32")])
def test_a_prompt_that_cannot_be_answered(
    prompt: str, told: str, plans: dict[str, Plan], request_for: Requests
) -> None:
    """Nothing, or so much that no room is left, is refused before anything is loaded."""
    with pytest.raises(RunError, match=told):
        train(plans["fp16"], request_for(samples=(prompt,)))


# Trackers


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that TensorBoard reads from *folder*, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def test_tensorboard_has_every_number(plans: dict[str, Plan], judged: Requests) -> None:
    """What TensorBoard reads back is every scalar of the record's steps and evaluations."""
    record: RunRecord = train(plans["fp16"], judged(num_steps=4, usd_per_hour=1.0, track=("tensorboard",)))

    found = scalars(judged().output / "tensorboard")
    names = [name for name in StepRecord.__dataclass_fields__ if name != "index"]
    assert set(found) == {f"step/{name}" for name in names} | {"evaluation/loss", "evaluation/perplexity"}
    for name in names:
        expected = {step.index: float(getattr(step, name)) for step in record.steps}
        assert found[f"step/{name}"] == pytest.approx(expected, rel=1e-6)
    assert found["evaluation/loss"] == pytest.approx({e.step: e.loss for e in record.evaluations}, rel=1e-6)


def test_a_missing_tracker_is_told(
    plans: dict[str, Plan], request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the package and how to get it, and nothing is begun."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    request = request_for(track=("wandb",))

    with pytest.raises(RunError, match="needs the package wandb; install it with: pip install wandb"):
        train(plans["fp16"], replace(request))
    assert not request.output.exists()
