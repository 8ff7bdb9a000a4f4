"""A device that has less memory than predicted costs a run no step."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shallowflow.planner.plan import Plan
from shallowflow.runtime import attempts, folder, merge
from shallowflow.runtime.checkpoint import latest, read
from shallowflow.runtime.fallback import candidate, following
from shallowflow.runtime.meter import MeasuredPeak, measure_peak
from shallowflow.runtime.promise import Promise
from shallowflow.runtime.record import RunRecord
from shallowflow.runtime.run import CHECKPOINTS, RunFailed, RunRequest, Silent, train
from shallowflow.runtime.step import MicroBatch, Trainee
from shallowflow.runtime.watch import Watcher
from tests.runtime.short import OUT, Seen

Requests = Callable[..., RunRequest]
NUM_STEPS = 5


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A device to run on."""
    return Seen(monkeypatch)


@pytest.fixture
def plan(plans: dict[str, Plan]) -> Plan:
    """A plan whose first alternative needs less memory and cuts the data alike."""
    return plans["fp16"]


def losses(record: RunRecord) -> list[float]:
    """Every step's."""
    return [step.loss for step in record.steps]


def rows(batches: list[list[list[int]]]) -> list[list[int]]:
    """The sequences of all micro-batches, in order."""
    return [row for batch in batches for row in batch]


def failing_once(number: int) -> Callable[[Seen], bool]:
    """Memory runs out at one micro-batch of training."""
    left = [True]

    def fails(seen: Seen) -> bool:
        if torch.is_grad_enabled() and len(seen.batches) == number and left[0]:
            left[0] = False
            return True
        return False

    return fails


@pytest.mark.parametrize("at", [1, 3, NUM_STEPS])
def test_no_step_is_lost(at: int, plan: Plan, request_for: Requests, seen: Seen) -> None:
    """Memory runs out in some step: the losses before stay, all steps are made, and the data's order is the same."""
    whole = train(plan, request_for(num_steps=NUM_STEPS, output=request_for().output.with_name("whole")))
    order = rows(seen.batches)
    seen.batches.clear()
    seen.fails = failing_once(at)

    record = train(plan, request_for(num_steps=NUM_STEPS))

    assert losses(record)[: at - 1] == losses(whole)[: at - 1]
    assert losses(record) == pytest.approx(losses(whole), rel=1e-4)
    assert [step.index for step in record.steps] == list(range(NUM_STEPS))
    del seen.batches[at - 1]
    assert rows(seen.batches) == order
    (fallback,) = record.fallbacks
    assert (fallback.step, fallback.reason) == (at - 1, OUT)
    assert record.configuration == plan.alternatives[fallback.alternative].configuration
    assert fallback.peak_reserved_bytes < plan.prediction.peak_reserved_bytes
    predicted = {c.quantity: c.predicted for c in record.comparisons}
    assert predicted["peak allocated"] == plan.alternatives[fallback.alternative].prediction.peak_allocated_bytes


def test_an_evaluation_may_run_out(plan: Plan, request_for: Requests, seen: Seen, held_out: Any) -> None:
    """Memory runs out between steps: the evaluation is made again, and every evaluation is there once."""
    wanted = {"num_steps": 4, "eval_every": 2, "eval_data": held_out}
    whole = train(plan, request_for(output=request_for().output.with_name("whole"), **wanted))
    seen.batches.clear()
    left = [True]

    def fails(now: Seen) -> bool:
        return len(now.batches) == 2 and not torch.is_grad_enabled() and bool(left) and left.pop()

    seen.fails = fails
    record = train(plan, request_for(**wanted))

    assert [e.step for e in record.evaluations] == [0, 2, 4]
    assert [e.loss for e in record.evaluations] == pytest.approx([e.loss for e in whole.evaluations], rel=1e-4)
    assert [fallback.step for fallback in record.fallbacks] == [2]


def test_the_last_evaluation_may_run_out(plan: Plan, request_for: Requests, seen: Seen, held_out: Any) -> None:
    """With no step made under the alternative nothing measured is held against its prediction."""
    left = [True]

    def fails(now: Seen) -> bool:
        return len(now.batches) == 3 and not torch.is_grad_enabled() and bool(left) and left.pop()

    seen.fails = fails
    record = train(plan, request_for(num_steps=3, eval_data=held_out))

    assert ([e.step for e in record.evaluations], len(record.steps)) == ([0, 3], 3)
    assert record.configuration != plan.configuration
    assert record.comparisons == ()


class Stopping(Silent):
    """Presses Ctrl-C after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, record: Any, peak: Any) -> None:
        """Hear of a step."""
        if record.index + 1 == self.after:
            raise KeyboardInterrupt


def test_resuming_goes_on_under_the_alternative(plan: Plan, request_for: Requests, seen: Seen) -> None:
    """Interrupted after a fallback and resumed, the run is the one that was not interrupted, to the last bit."""
    seen.fails = failing_once(2)
    whole = train(plan, request_for(num_steps=NUM_STEPS, output=request_for().output.with_name("whole")))
    seen.batches.clear()
    seen.fails = failing_once(2)
    request = request_for(num_steps=NUM_STEPS)

    train(plan, request, Stopping(3))
    record = train(plan, replace(request, resume=True))

    assert losses(record) == losses(whole)
    assert record.configuration == whole.configuration != plan.configuration
    assert len(record.fallbacks) == 1


@pytest.mark.parametrize("moves", [True, False])
def test_an_alternative_is_of_the_plan_that_it_was_run_under(
    moves: bool, plan: Plan, request_for: Requests, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another plan, and then under the one it began with, a run takes over no other plan's alternative."""
    seen.fails = failing_once(2)
    request = request_for(num_steps=3)
    began = train(plan, request)
    monkeypatch.setattr(folder, "check_same", lambda *_: moves)
    other = replace(plan, alternatives=())

    moved = train(other, replace(request, num_steps=4, resume=True))
    back = train(plan, replace(request, num_steps=5, resume=True))

    assert began.configuration == plan.alternatives[began.fallbacks[0].alternative].configuration
    assert moved.configuration == back.configuration == plan.configuration
    path, _ = latest(request.output / CHECKPOINTS)
    assert path is not None and (read(path).alternative, read(path).moved_at) == (None, 4)


def test_steps_are_saved_before_another_configuration_is_traced(
    plan: Plan, request_for: Requests, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the alternative is being traced, the run has lost no step."""
    real = attempts.promised

    def promised(plan: Plan, alternative: int | None, watcher: Watcher, rank: int) -> Promise:
        if alternative is not None:
            raise KeyboardInterrupt
        return real(plan, alternative, watcher, rank)

    monkeypatch.setattr(attempts, "promised", promised)
    seen.fails = failing_once(3)
    request = request_for(num_steps=NUM_STEPS)

    with pytest.raises(KeyboardInterrupt):
        train(plan, request)

    path, _ = latest(request.output / CHECKPOINTS)
    assert path is not None and len(read(path).steps) == 2


def test_a_signal_is_obeyed_though_memory_runs_out(plan: Plan, request_for: Requests, seen: Seen) -> None:
    """Asked to stop in the very micro-batch for which memory does not suffice, the run stops, and can go on."""
    fails = failing_once(3)

    def struck(now: Seen) -> bool:
        short = fails(now)
        if short:
            os.kill(os.getpid(), signal.SIGTERM)
        return short

    seen.fails = struck
    request = request_for(num_steps=NUM_STEPS)

    record = train(plan, request)

    assert (record.outcome, len(record.steps), record.fallbacks) == ("interrupted", 2, ())
    assert len(train(plan, replace(request, resume=True)).steps) == NUM_STEPS


def test_half_an_update_is_made_again(
    plan: Plan, request_for: Requests, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out inside the optimizer: the updates since the last checkpoint are made again, with their losses."""
    alike = tuple(other for other in plan.alternatives if other.configuration.optimizer == "adamw")
    plan = replace(plan, alternatives=alike)
    whole = train(plan, request_for(num_steps=NUM_STEPS, output=request_for().output.with_name("whole")))
    adam: Any = importlib.import_module("torch.optim.adam")
    real, calls = adam.adam, [0]

    def update(params: Any, *rest: Any, **named: Any) -> None:
        calls[0] += not params[0].is_meta
        if calls[0] == 4 and not params[0].is_meta:
            params[0].add_(1.0)
            raise torch.OutOfMemoryError(OUT)
        real(params, *rest, **named)

    monkeypatch.setattr(adam, "adam", update)

    record = train(plan, request_for(num_steps=NUM_STEPS, save_every=2))

    assert calls[0] == 4 + NUM_STEPS - 2
    assert losses(record) == pytest.approx(losses(whole), rel=1e-4)
    assert len(record.fallbacks) == 1


def test_an_alternative_that_is_not_what_it_was_is_passed_over(plan: Plan, request_for: Requests, seen: Seen) -> None:
    """One whose step is not the predicted one does not end the run: the next is taken, and it is said."""
    first = following(plan, candidate(plan, None))
    assert first is not None
    spoiled = list(plan.alternatives)
    wrong = replace(spoiled[first].prediction, resident_bytes=spoiled[first].prediction.resident_bytes + 512)
    spoiled[first] = replace(spoiled[first], prediction=wrong)
    second = following(plan, candidate(plan, None), {first})
    assert second is not None
    seen.fails = failing_once(2)

    record = train(replace(plan, alternatives=tuple(spoiled)), request_for(num_steps=NUM_STEPS))

    assert [made.alternative for made in record.fallbacks] == [second]
    assert any(note.startswith(f"alternative {first + 1} is passed over: ") for note in record.notes)
    assert [step.index for step in record.steps] == list(range(NUM_STEPS))


def test_nothing_left_to_fall_back_to(plan: Plan, request_for: Requests, seen: Seen) -> None:
    """Once no alternative needs less, the run ends in one line, with the steps made before saved and resumable."""
    request = request_for(num_steps=NUM_STEPS)
    seen.fails = lambda now: torch.is_grad_enabled() and len(now.batches) > 2

    with pytest.raises(RunFailed, match=r"out of memory after step 2 .*2 steps and the adapter are saved in") as told:
        train(plan, request)

    assert "\n" not in str(told.value)
    record = json.loads((request.output / "run.json").read_text(encoding="utf-8"))
    assert (record["outcome"], len(record["steps"])) == ("failed", 2)
    needs = [fallback["peak_reserved_bytes"] for fallback in record["fallbacks"]]
    assert needs and needs == sorted(needs, reverse=True)
    path, _ = latest(request.output / CHECKPOINTS)
    assert path is not None and len(read(path).steps) == 2
    seen.fails = lambda _now: False
    assert len(train(plan, replace(request, resume=True)).steps) == NUM_STEPS


def test_more_reserved_than_allowed_is_given_up(
    plan: Plan, request_for: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that reserved more than predicted and than the budget is the last one under its configuration."""
    real = measure_peak
    over = [plan.budget_bytes + 1]

    def measured(*arguments: Any) -> Any:
        outcome, peak = real(*arguments)
        reserved = over.pop() if over else peak.peak_reserved_bytes
        return outcome, MeasuredPeak(
            resident_bytes=peak.resident_bytes,
            peak_allocated_bytes=peak.peak_allocated_bytes,
            peak_reserved_bytes=reserved,
        )

    monkeypatch.setattr("shallowflow.runtime.train.measure_peak", measured)

    record = train(plan, request_for(num_steps=NUM_STEPS))

    (fallback,) = record.fallbacks
    assert (fallback.step, len(record.steps)) == (2, NUM_STEPS)
    assert "reserved" in fallback.reason and "allowed" in fallback.reason


def test_alternatives_come_down(plans: dict[str, Plan]) -> None:
    """Each fallback needs less than what failed, keeps the batch and the adapter's shape, and the last has none."""
    for plan in plans.values():
        chosen, num_tried = candidate(plan, None), 0
        while (number := following(plan, chosen)) is not None:
            after = plan.alternatives[number]
            assert after.prediction.peak_reserved_bytes < chosen.prediction.peak_reserved_bytes
            assert after.configuration.global_batch_size == chosen.configuration.global_batch_size
            chosen, num_tried = after, num_tried + 1
        assert 1 <= num_tried <= len(plan.alternatives)


def test_what_is_merged_is_what_was_run(plan: Plan, request_for: Requests, seen: Seen) -> None:
    """After a fallback to other weight formats the base is rounded as the run ended, not as it was planned."""
    request = request_for(num_steps=2)
    seen.fails = failing_once(1)
    record = train(plan, request)

    assert merge.configuration_of(merge.record_of(request.output), plan) == record.configuration != plan.configuration


def test_a_loss_that_is_no_number_stops(
    plan: Plan, request_for: Requests, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a dtype that needs no loss scale a loss of nan ends the run in one line, with the steps before it saved."""
    real = Trainee.loss

    def loss(trainee: Trainee, batch: MicroBatch) -> torch.Tensor:
        return real(trainee, batch) * (float("nan") if len(seen.batches) == 3 else 1.0)

    monkeypatch.setattr(Trainee, "loss", loss)
    request = request_for(num_steps=NUM_STEPS)

    with pytest.raises(RunFailed, match=r"the loss of step 2 is nan, .*in float32.*2 steps and the adapter are saved"):
        train(plan, request)

    record = json.loads((request.output / "run.json").read_text(encoding="utf-8"))
    assert (record["outcome"], len(record["steps"])) == ("failed", 2)
