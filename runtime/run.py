"""Execute a plan: load, evaluate, train, evaluate, save, report."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from shallowflow.planner import serialize
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import cache

from . import batches, checkpoint, interrupts, report
from .documents import read_documents
from .evaluate import perplexity
from .files import write_text
from .heap import keeping_freed_memory
from .meter import MeasuredPeak
from .record import RUN_FORMAT_VERSION, Comparison, RunRecord, StepRecord, median_step_seconds, to_json
from .simulated import step_timeline
from .step import LEARNING_RATE, Trainee, make_trainee
from .train import train as training_steps
from .weights import find_weights, load_tokenizer, load_weights

MOST_STEPS = 10**9
CHECKPOINTS = "checkpoints"
"""The folder inside a run's that holds its state."""
REQUEST = "request.json"
"""What tells whether a folder holds the run that is to be resumed."""
SAVE_SECONDS = 600.0
"""Between two checkpoints: what a lost machine costs at most, besides starting again."""


class RunError(ValueError):
    """A run that cannot start here: one line that says why and what would work."""


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stage(self, message: str, total: int | None = None) -> None:
        """A new stage of *total* parts begins."""

    def advance(self) -> None:
        """One part of the stage is done."""

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """One optimizer update is done."""


class Silent:
    """A watcher who says nothing."""

    def stage(self, message: str, total: int | None = None) -> None:
        """Hear of a stage."""

    def advance(self) -> None:
        """Hear of a part."""

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """Hear of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What to run a plan on.

    Attributes:
        num_steps: optimizer updates; None for one pass over the data.
        usd_per_hour: what the machine costs, for the meter; None shows no dollars.
        resume: go on from the newest good checkpoint in the output folder, where there is one.
        save_every: updates between two checkpoints; None saves one every SAVE_SECONDS.
    """

    data: Path
    output: Path
    eval_data: Path | None = None
    weights: Path | None = None
    num_steps: int | None = None
    learning_rate: float = LEARNING_RATE
    usd_per_hour: float | None = None
    seed: int = 0
    resume: bool = False
    save_every: int | None = None


@dataclass(slots=True)
class _Progress:
    """What a run has come to so far, so that an interrupted one can still be recorded."""

    steps: list[StepRecord] = field(default_factory=list)
    peak: MeasuredPeak | None = None
    before: float | None = None
    after: float | None = None
    interrupted: bool = False
    started: str = ""
    clock: float = 0.0
    earlier_seconds: float = 0.0
    saved: int = 0
    saved_at: float = 0.0
    notes: list[str] = field(default_factory=list)

    def seconds(self) -> float:
        """On the wall so far, all sessions together."""
        return self.earlier_seconds + time.perf_counter() - self.clock


def train(plan: Plan, request: RunRequest, watcher: Watcher | None = None) -> RunRecord:
    """Fine-tune as *plan* says and write adapter, ``run.json``, ``plan.json`` and ``report.html`` to the output folder.

    Checkpoints are written as it goes. Ctrl-C, or SIGTERM, ends training before the next micro-batch; what was learned
    is saved and recorded as interrupted, without the step it cut short, and a request to resume goes on from there.

    Raises:
        RunError: the plan is for a GPU and this machine has none, the output folder cannot be had, or what is to be
            resumed is another run.
        DataError, WeightsError: see there.
    """
    watcher = watcher or Silent()
    device = _device(plan)
    _check_numbers(request)
    _check_output(request.output, request.resume)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    progress = _Progress(started=now, clock=time.perf_counter())
    documents = read_documents(request.data)
    held_out = read_documents(request.eval_data) if request.eval_data else []
    watcher.stage("loading tokenizer and weights")
    source = find_weights(plan.model_name, request.weights)
    tokenizer = load_tokenizer(source)
    length = plan.configuration.sequence_length
    windows = _windows(batches.windows(documents, tokenizer, length), request.data)
    eval_windows = _windows(batches.windows(held_out, tokenizer, length), request.eval_data) if held_out else []
    model = load_weights(source, plan.model_config, plan.compute_dtype, plan.num_parameters)
    with _claimed(request.output), keeping_freed_memory() if device.type == "cpu" else contextlib.nullcontext():
        _check_same(plan, request)
        torch.manual_seed(request.seed)
        trainee = make_trainee(model, plan.configuration, plan.compute_dtype, device, request.learning_rate)
        if request.resume:
            _go_on(request, trainee, progress)
        with interrupts.deferred() as check:
            trainee.before_micro_batch = check
            _learn(plan, request, watcher, trainee, windows, eval_windows, device, progress)
        record = _record(plan, request, progress, windows)
        watcher.stage("saving")
        _save(plan, request.output, trainee, record)
    return record


def _learn(
    plan: Plan,
    request: RunRequest,
    watcher: Watcher,
    trainee: Trainee,
    windows: list[batches.Window],
    eval_windows: list[batches.Window],
    device: torch.device,
    progress: _Progress,
) -> None:
    configuration = plan.configuration
    accumulation = configuration.gradient_accumulation_steps
    total = request.num_steps or -(-len(windows) // (configuration.micro_batch_size * accumulation))

    def advance() -> None:
        trainee.before_micro_batch()
        watcher.advance()

    def evaluate(name: str) -> float | None:
        if not eval_windows:
            return None
        watcher.stage(f"perplexity {name} training", -(-len(eval_windows) // configuration.micro_batch_size))
        return perplexity(trainee, eval_windows, configuration.micro_batch_size, device, advance)

    def keep_peak(peak: MeasuredPeak) -> None:
        progress.peak = peak

    try:
        done = len(progress.steps)
        progress.before = progress.before if done else evaluate("before")
        watcher.stage("training", max(0, total - done))
        endless = batches.steps(windows, configuration.micro_batch_size, accumulation, request.seed)
        made = training_steps(
            trainee,
            itertools.islice(endless, done, max(done, total)),
            device,
            on_peak=keep_peak,
            usd_per_hour=request.usd_per_hour,
            seed=request.seed,
            first=done,
        )
        for record in made:
            progress.steps.append(record)
            watcher.step(record, progress.peak)
            _save_when_due(request, trainee, progress)
        progress.after = evaluate("after")
    except KeyboardInterrupt:
        progress.interrupted = True
        trainee.optimizer.zero_grad(set_to_none=True)
    if len(progress.steps) > progress.saved:
        _save_state(request, trainee, progress)


def _save_when_due(request: RunRequest, trainee: Trainee, progress: _Progress) -> None:
    if request.save_every is not None:
        due = len(progress.steps) % request.save_every == 0
    else:
        due = time.perf_counter() - max(progress.clock, progress.saved_at) >= SAVE_SECONDS
    if due:
        _save_state(request, trainee, progress)


def _save_state(request: RunRequest, trainee: Trainee, progress: _Progress) -> None:
    scale = trainee.loss_scale
    state = checkpoint.Progress(
        steps=tuple(progress.steps),
        started=progress.started,
        seconds=progress.seconds(),
        perplexity_before=progress.before,
        loss_scale=scale.value,
        num_skipped=scale.num_skipped,
        num_calm=scale.num_calm,
    )
    checkpoint.save(request.output / CHECKPOINTS, trainee, state)
    progress.saved, progress.saved_at = len(progress.steps), time.perf_counter()


def _go_on(request: RunRequest, trainee: Trainee, progress: _Progress) -> None:
    """Put the newest good checkpoint, if there is one, into *trainee* and *progress*."""
    path, progress.notes = checkpoint.latest(request.output / CHECKPOINTS)
    if path is None:
        return
    state = checkpoint.restore(path, trainee)
    progress.steps, progress.saved = list(state.steps), len(state.steps)
    progress.started, progress.earlier_seconds = state.started, state.seconds
    progress.before = state.perplexity_before
    progress.notes.append(f"resumed after step {len(state.steps)}")


def _check_same(plan: Plan, request: RunRequest) -> None:
    """Refuse to resume another run, and note what this one is.

    Raises:
        RunError: which of plan, data, seed or learning rate is another.
    """
    path = request.output / REQUEST
    parts: dict[str, bytes | str | float] = {
        "plan": serialize.to_json(plan).encode(),
        "data": request.data.read_bytes(),
        "seed": request.seed,
        "learning rate": request.learning_rate,
    }
    mine = checkpoint.fingerprint(parts)
    if path.is_file():
        try:
            other = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except msgspec.DecodeError:
            raise RunError(f"{path} is not what a run writes; give a new folder with --output") from None
        for name, value in mine.items():
            if other.get(name) != value:
                raise RunError(f"{request.output} holds a run with another {name}; give the same or another --output")
        return
    write_text(path, msgspec.json.format(msgspec.json.encode(mine), indent=2).decode() + "\n")


def _device(plan: Plan) -> torch.device:
    if plan.configuration.num_gpus > 1:
        raise RunError(
            f"the plan is for {plan.configuration.num_gpus} GPUs, and training runs on one so far; plan with --gpus 1"
        )
    if plan.gpu == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError(f"the plan is for a {plan.gpu} and this machine has no CUDA device; plan with --gpu cpu")
    return torch.device("cuda", 0)


def _check_numbers(request: RunRequest) -> None:
    if not 0 <= request.seed < 2**32:
        raise RunError(f"the seed is {request.seed}; give one from 0 to {2**32 - 1}")
    if not (math.isfinite(request.learning_rate) and request.learning_rate > 0):
        raise RunError(f"the learning rate is {request.learning_rate}; give a positive number, such as {LEARNING_RATE}")
    if request.num_steps is not None and not 1 <= request.num_steps <= MOST_STEPS:
        raise RunError(f"the number of steps is {request.num_steps}; give one from 1 to {MOST_STEPS:,}")


def _check_output(output: Path, resume: bool) -> None:
    for path in (output, *output.parents):
        if path.is_file():
            raise RunError(f"{path} is a file; give a folder with --output")
    if output.is_dir() and any(output.iterdir()):
        if not (output / REQUEST).is_file():
            raise RunError(f"{output} is not empty; give a new folder with --output")
        if not resume:
            raise RunError(f"{output} holds a run; go on with it by --resume, or give a new folder with --output")


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Make the folder and hold it by a file of its own: once nothing else can be wrong, and before hours are spent."""
    held = output / ".running"
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = held.open("a")
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error.strerror}; give another folder with --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a killed process gives up by itself
        except BlockingIOError as error:
            raise RunError(f"{output} is being written by another run; give a new folder with --output") from error
        try:
            yield
        finally:
            held.unlink(missing_ok=True)
            if not any(output.iterdir()):
                output.rmdir()


def _windows(found: list[batches.Window], path: Path | None) -> list[batches.Window]:
    if not found:
        raise RunError(f"{path} holds no token to learn: its documents are shorter than two tokens")
    return found


def _record(
    plan: Plan,
    request: RunRequest,
    progress: _Progress,
    windows: list[batches.Window],
) -> RunRecord:
    seconds = progress.seconds()
    positions = len(windows) * plan.configuration.sequence_length
    return RunRecord(
        format_version=RUN_FORMAT_VERSION,
        model_name=plan.model_name,
        device=_device_name(plan),
        outcome="interrupted" if progress.interrupted else "completed",
        started=progress.started,
        seconds=seconds,
        usd=None if request.usd_per_hour is None else seconds / 3600 * request.usd_per_hour,
        comparisons=_comparisons(plan, progress),
        perplexity_before=progress.before,
        perplexity_after=progress.after,
        padding_share=1 - sum(w.num_targets for w in windows) / positions,
        num_skipped=sum(step.skipped for step in progress.steps),
        steps=tuple(progress.steps),
        versions=cache.versions(),
        notes=tuple(progress.notes),
    )


def _device_name(plan: Plan) -> str:
    if plan.gpu != "cpu":
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _comparisons(plan: Plan, progress: _Progress) -> tuple[Comparison, ...]:
    found: list[Comparison] = []
    prediction, peak = plan.prediction, progress.peak
    if peak is not None:
        rows = [
            ("resident between steps", prediction.resident_bytes, peak.resident_bytes),
            ("peak allocated", prediction.peak_allocated_bytes, peak.peak_allocated_bytes),
        ]
        if plan.gpu != "cpu":
            rows.append(("peak reserved", prediction.peak_reserved_bytes, peak.peak_reserved_bytes))
        found += [Comparison(quantity=q, unit="bytes", predicted=p, measured=m) for q, p, m in rows]
    seconds = median_step_seconds(progress.steps)
    if seconds is not None:
        found.append(Comparison(quantity="step", unit="seconds", predicted=prediction.step_seconds, measured=seconds))
    return tuple(found)


def _save(plan: Plan, output: Path, trainee: Trainee, record: RunRecord) -> None:
    """Write the adapter first and the record last: a folder with ``run.json`` is complete."""
    output.mkdir(parents=True, exist_ok=True)
    model: Any = trainee.model
    model.peft_config["default"].base_model_name_or_path = plan.model_name
    model.save_pretrained(str(output / "adapter"), safe_serialization=True, save_embedding_layers=False)
    write_text(output / "plan.json", serialize.to_json(plan))
    write_text(output / "report.html", report.html(plan, record, step_timeline(plan)))
    write_text(output / "run.json", to_json(record))
