"""The folder that a run writes: held by one process, of one run, complete once ``run.json`` is there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from shallowflow.planner import serialize, words
from shallowflow.planner.plan import Plan

from . import checkpoint, report
from .documents import digest, read_documents
from .files import new_folder, write_text
from .record import RunRecord, to_json
from .request import RunError, RunRequest, learning_rate
from .simulated import step_timeline
from .spend import SPENDING_FOLDER
from .step import Trainee
from .weights import plain, write_model

CHECKPOINTS = "checkpoints"
"""The folder inside a run's that holds its state."""
REQUEST = "request.json"
"""What tells whether a folder holds the run that is to be resumed."""
_HELD = ".running"
"""Held while a run writes; one that was killed leaves it behind."""
_LEFT = (_HELD, SPENDING_FOLDER)
"""What a run that was refused may leave behind: its seconds are paid."""
_GPUS, _COURSE = "GPUs", "course"
"""Of what tells a run from others, that which lets it go on with a plan for another number of GPUs."""
BEST = "best"
"""The folder of the best adapter, or model, so far."""
ADAPTER, MODEL = "adapter", "model"
"""The folder of the results: an adapter for PEFT, or, where every weight was learned, a model."""


def check_output(output: Path, resume: bool) -> None:
    """Refuse an *output* that is no new folder and no run to go on with.

    Raises:
        RunError: which it is, and what would work.
    """
    for path in (output, *output.parents):
        if path.is_file():
            raise RunError(f"{path} is a file; give a folder with --output")
    if output.is_dir() and any(path.name not in _LEFT for path in output.iterdir()):
        if not (output / REQUEST).is_file():
            raise RunError(f"{output} is not empty; give a new folder with --output")
        if not resume:
            raise RunError(f"{output} holds a run; go on with it by --resume, or give a new folder with --output")


def check_writable(output: Path) -> None:
    """Refuse an *output* that cannot be made or written to; what is made for that is gone again.

    Raises:
        RunError: why it cannot.
    """
    missing = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _unwritable(output: Path, error: OSError) -> RunError:
    return RunError(f"{output} cannot be written: {error.strerror}; give another folder with --output")


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Make the folder and hold it by a file of its own: once nothing else can be wrong, and before hours are spent."""
    held = output / _HELD
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = held.open("a")
    except OSError as error:
        raise _unwritable(output, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a killed process gives up by itself
        except BlockingIOError as error:
            raise RunError(f"{output} is being written by another run; give a new folder with --output") from error
        if not held.exists() or not os.path.samestat(os.fstat(lock.fileno()), held.stat()):
            raise RunError(f"{output} was just left by another run; try again")  # which took the file's name away
        try:
            yield
        finally:
            held.unlink(missing_ok=True)
            if not any(output.iterdir()):
                output.rmdir()


def check_same(plan: Plan, request: RunRequest) -> bool:
    """Refuse to go on with another run; returns whether it goes on with another plan.

    That may be one for another number of GPUs, if it makes of the same data the same steps.

    Raises:
        RunError: which of plan, data, held-out text, seed or learning rate is another.
    """
    path = request.output / REQUEST
    if not path.is_file():
        return False
    try:
        other = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError:
        raise RunError(f"{path} is not what a run writes; give a new folder with --output") from None
    return check_alike(plan, request, other, str(request.output), "a new folder with --output")


def check_alike(plan: Plan, request: RunRequest, other: Mapping[str, str], where: str, instead: str) -> bool:
    """As ``check_same``, with the run of the fingerprint *other*; people are told *where* it lies and what to give."""
    mine = fingerprint(plan, request)
    differing = {name for name in mine if other.get(name, "") != mine[name]}
    moves = _GPUS in differing and _COURSE not in differing
    for name in mine:
        if name in differing and name not in ({_GPUS, _COURSE, "plan"} if moves else {_GPUS, _COURSE}):
            raise RunError(
                f"{where} holds a run whose {name} differs; give the same {name} as it began with, or {instead}"
            )
    return moves


def note_request(plan: Plan, request: RunRequest) -> None:
    """Leave in the folder what run it holds."""
    path = request.output / REQUEST
    if not path.is_file():
        text = msgspec.json.format(msgspec.json.encode(fingerprint(plan, request)), indent=2).decode()
        write_text(path, text + "\n")


def fingerprint(plan: Plan, request: RunRequest) -> dict[str, str]:
    """What tells this run from others, part by part."""
    parts: dict[str, bytes | str | float] = {
        "plan": serialize.to_json(plan).encode(),
        "data": _content(request.data, request),
        "data format": request.data_format or "",
        "weights": str(request.weights.resolve()) if request.weights else "",
        "held-out text": _content(request.eval_data, request) if request.eval_data else "",
        "seed": request.seed,
        "learning rate": learning_rate(plan, request),
        _GPUS: _gpus(plan),
        _COURSE: msgspec.json.encode(_course(plan)),
    }
    return checkpoint.fingerprint(parts)


def _gpus(plan: Plan) -> str:
    """How a run is spread over GPUs: what it may go on with otherwise."""
    number, sharding, stages = plan.configuration.num_gpus, plan.configuration.sharding, plan.configuration.stages
    if len(stages) > 1:
        parts = plan.configuration.parts_per_stage
        interleaved = f", in {parts} parts each" if parts > 1 else ""
        return f"{number}, stages from layers {', '.join(map(str, stages))}{interleaved}"
    return f"{number}" if sharding == "none" else f"{number}, sharded {sharding}"


def plan_digest(plan: Plan) -> str:
    """What tells *plan* from others."""
    return checkpoint.fingerprint({"plan": serialize.to_json(plan).encode()})["plan"]


def _course(plan: Plan) -> list[Any]:
    """What of a plan its steps' data, and what they learn, depend on; how coarse the base's weights are is left out."""
    c = plan.configuration
    adapter = (c.adapter, c.target_modules, c.rank, c.alpha)
    return [plan.model_config, plan.compute_dtype, adapter, c.sequence_length, c.global_batch_size, c.packing]


def _content(data: Path, request: RunRequest) -> bytes | str:
    """A file's SHA-256, of which only a part is in memory at a time; of a dataset what is learned."""
    if not data.is_file():
        return digest(read_documents(data, request.data_format))
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(plan: Plan, request: RunRequest) -> dict[str, str | int | float]:
    """What a tracker shows beside a run."""
    configuration = plan.configuration
    adapter: dict[str, str | int | float] = {"adapter": configuration.adapter}
    if configuration.rank is not None and configuration.target_modules is not None:
        adapter["target_modules"] = words.targets(configuration.target_modules)
        adapter["rank"] = configuration.rank
    return {
        "model": plan.model_name,
        "layers": words.strategies(configuration),
        **adapter,
        "global_batch_size": configuration.global_batch_size,
        "sequence_length": configuration.sequence_length,
        "learning_rate": learning_rate(plan, request),
        "seed": request.seed,
    }


def results(plan: Plan) -> str:
    """The folder, inside a run's, of what it learned."""
    return MODEL if plan.configuration.is_full else ADAPTER


def save_best(output: Path, plan: Plan, trainee: Trainee, tokenizer: Any) -> None:
    """Write what was learned as the best so far, whole or not at all; all that hold a stage of it call this."""
    _save_learned(output / BEST, plan, trainee, tokenizer)


def save_learned(output: Path, plan: Plan, trainee: Trainee, tokenizer: Any) -> None:
    """Write what was learned; all that hold a stage of it call this."""
    _save_learned(output / results(plan), plan, trainee, tokenizer)


def save_record(plan: Plan, output: Path, record: RunRecord) -> None:
    """Write what became of the run, the record last: a folder with ``run.json`` is complete."""
    write_text(output / "plan.json", serialize.to_json(plan))
    write_text(output / "report.html", report.html(plan, record, step_timeline(plan)))
    write_text(output / "run.json", to_json(record))


def _save_learned(path: Path, plan: Plan, trainee: Trainee, tokenizer: Any) -> None:
    """The adapter, or the model as it was trained, in fp32, with its tokenizer."""
    model: Any = trainee.model
    told = trainee.ranks.of_stages(_as_peft_has_it(trainee)) if trainee.pipe is not None else []
    if not trainee.ranks.leads:
        return
    if plan.configuration.is_full:
        write_model(plain(model, plan.model_config, "float32"), tokenizer, path)
        return
    model.peft_config["default"].base_model_name_or_path = plan.model_name
    with new_folder(path) as partial:
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        if told:  # PEFT writes what there is, which is one stage's
            whole = {name: tensor for each in told for name, tensor in each.items()}
            save_file(whole, partial / ADAPTER_FILE, metadata={"format": "pt"})


ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name for it."""


def _as_peft_has_it(trainee: Trainee) -> dict[str, torch.Tensor]:
    """The adapter under the names that PEFT writes: without its own, and DoRA's lengths as the parameters they were."""
    found = checkpoint.on_host(checkpoint.learned(trainee))
    names = {name: name.replace(".default.", ".") for name in found}
    lengths = "lora_magnitude_vector.weight"
    return {names[n].removesuffix(".weight") if names[n].endswith(lengths) else names[n]: t for n, t in found.items()}
