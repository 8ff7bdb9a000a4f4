"""Training state on disk: there whole or not at all, and verified before it is believed.

A checkpoint is a folder of its own. Its files are written beside it, the manifest with their SHA-256 last, and the
folder gets its name once everything is on the disk; one that does not agree with its manifest is passed over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import optimizers
from .files import to_disk
from .record import EvaluationRecord, FallbackRecord, StepRecord
from .request import RunError
from .step import Trainee

NUM_KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back to."""

_NAME = re.compile(r"step-(\d{8})")
_LEARNED, _OPTIMIZER, _STATE, _MANIFEST = "learned.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_BEST = "best.safetensors"
"""Only where what is learned by the best of the evaluations is kept."""
_ELSE = "go on with the plan it was made under, or give a new folder with --output"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a run had come to when its state was saved.

    Attributes:
        steps: every update so far.
        seconds: on the wall, all sessions together.
        loss_scale, num_skipped, num_calm: see LossScale.
        before: answers to the prompts before training.
        alternative, best_step, moved_at, plan, interruptions: see Progress.
        total: updates that the run was to make.
    """

    steps: tuple[StepRecord, ...]
    started: str
    seconds: float
    loss_scale: float
    num_skipped: int
    num_calm: int
    evaluations: tuple[EvaluationRecord, ...] = ()
    before: tuple[str, ...] = ()
    fallbacks: tuple[FallbackRecord, ...] = ()
    alternative: int | None = None
    best_step: int | None = None
    moved_at: int = 0
    plan: str = ""
    interruptions: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds, by name; *best* is the best of what was *learned*, where it is kept."""

    path: Path
    state: State
    learned: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Held:
    """What was learned, by name: what learns, the optimizer's state, and the best of what learns, where it is kept."""

    learned: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None = None


def held(trainee: Trainee, best: Mapping[str, torch.Tensor] | None = None) -> Held:
    """What *trainee* has learned, its parameters numbered as in the whole model."""
    mine = learned(trainee)
    numbered = optimizers.state(trainee.optimizer, _numbers(trainee, mine))
    return Held(mine, numbered, None if best is None else dict(best))


def gathered(trainee: Trainee, best: Mapping[str, torch.Tensor] | None = None) -> Held:
    """``held`` of all stages, where a model is cut: in the first process, once all have called this.

    Raises:
        Lost: a process has ended.
    """
    mine = held(trainee, best)
    if trainee.pipe is None:
        return mine
    told = trainee.ranks.of_stages(Held(on_host(mine.learned), on_host(mine.optimizer), mine.best))
    whole = Held({}, {}, None if best is None else {})
    for each in told:
        whole.learned.update(each.learned)
        whole.optimizer.update(each.optimizer)
        if whole.best is not None:
            whole.best.update(each.best or {})
    return whole


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """*tensors* as they are sent to another process."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _numbers(trainee: Trainee, mine: Mapping[str, torch.Tensor]) -> list[int] | None:
    """The numbers in the whole model of the parameters that are *mine*; None where it is whole."""
    if trainee.pipe is None:
        return None
    numbers = {name: number for number, name in enumerate(trainee.names)}
    return [numbers[name] for name in mine]


def save(folder: Path, trainee: Trainee, state: State, best: Mapping[str, torch.Tensor] | None = None) -> Path:
    """``write`` what *trainee* has learned, which holds the whole model."""
    return write(folder, held(trainee, best), state)


def write(folder: Path, whole: Held, state: State) -> Path:
    """Write the state after ``state.steps`` into a new folder inside *folder*, and remove those too many.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    name = f"step-{len(state.steps):08d}"
    partial, final = folder / f".{name}.partial", folder / name
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    try:
        _fill(partial, whole, state)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # which gives back the room that there was not
        if isinstance(error, SafetensorError):
            raise OSError(errno.EIO, str(error), str(partial)) from error
        raise
    replaced = folder / f".{name}.replaced.partial"
    if final.exists():  # of the same step, and not to be believed, or it had been resumed from
        final.rename(replaced)
    partial.rename(final)
    to_disk(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    found = _found(folder)
    newer = [path for path in found if path.name > name]  # not believed, or left behind by a run that went back
    for old in (*newer, *found[len(newer) + NUM_KEPT :]):
        shutil.rmtree(old)
    return final


def _fill(partial: Path, whole: Held, state: State) -> None:
    """Write all files into the new folder *partial*, and wait for the disk."""
    save_file(whole.learned, partial / _LEARNED)
    save_file(whole.optimizer, partial / _OPTIMIZER)
    if whole.best is not None:
        save_file(whole.best, partial / _BEST)
    (partial / _STATE).write_text(json.dumps(msgspec.to_builtins(state)), encoding="utf-8")  # with infinite norms
    names = (_LEARNED, _OPTIMIZER, _STATE, *((_BEST,) if whole.best is not None else ()))
    for written in names:
        to_disk(partial / written)
    (partial / _MANIFEST).write_bytes(msgspec.json.encode({n: _sha256(partial / n) for n in names}))
    to_disk(partial / _MANIFEST)
    to_disk(partial)


def finish(folder: Path) -> None:
    """Give a checkpoint in *folder* its name that lacks nothing else, its process killed; only for who writes there."""
    for left in folder.glob(".step-????????.partial"):
        final = folder / left.name.removeprefix(".").removesuffix(".partial")
        if not final.exists() and doubt(left) is None:
            left.rename(final)


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in *folder* that is what its manifest says; and why newer ones are not believed."""
    doubts: list[str] = []
    for path in _found(folder):
        found = doubt(path)
        if found is None:
            return path, doubts
        doubts.append(f"checkpoint {path.name} is passed over: {found}")
    return None, doubts


def read(path: Path) -> State:
    """What the run of the verified checkpoint *path* had come to."""
    return msgspec.convert(json.loads((path / _STATE).read_text(encoding="utf-8")), type=State)


def load(path: Path) -> Snapshot:
    """All that the verified checkpoint *path* holds."""
    best = path / _BEST
    return Snapshot(
        path=path,
        state=read(path),
        learned=load_file(path / _LEARNED),
        optimizer=load_file(path / _OPTIMIZER),
        best=load_file(best) if best.is_file() else None,
    )


def restore(kept: Snapshot, trainee: Trainee) -> None:
    """Put the state *kept* into *trainee*; of a model that is cut, what belongs to its stage.

    Raises:
        RunError: it is another model's.
    """
    progress = kept.state
    mine = learned(trainee)
    wanted = {name: tensor.shape for name, tensor in mine.items()}
    names = set(wanted) if trainee.pipe is None else set(trainee.names)
    for other in (kept.learned, kept.learned if kept.best is None else kept.best):
        if set(other) != names or {name: other[name].shape for name in wanted} != wanted:
            raise RunError(f"checkpoint {kept.path} holds other weights than the plan's; {_ELSE}")
    put_learned(trainee, kept.learned)
    try:
        optimizers.restore(trainee.optimizer, kept.optimizer, _numbers(trainee, mine), len(names))
    except ValueError as error:
        raise RunError(f"checkpoint {kept.path} is not the plan's: {error}; {_ELSE}") from None
    scale = trainee.loss_scale
    scale.value, scale.num_skipped, scale.num_calm = progress.loss_scale, progress.num_skipped, progress.num_calm


def learned(trainee: Trainee) -> dict[str, torch.Tensor]:
    """What learns, by name: the adapter, or every weight."""
    return {name: p.detach() for name, p in trainee.model.named_parameters() if p.requires_grad}


def put_learned(trainee: Trainee, saved: Mapping[str, torch.Tensor]) -> None:
    """Give what learns in *trainee* the values *saved*."""
    for name, parameter in learned(trainee).items():
        parameter.copy_(saved[name])


def _found(folder: Path) -> list[Path]:
    """Checkpoints in *folder*, newest first."""
    names = (path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else iter(())
    return sorted(names, key=lambda path: path.name, reverse=True)


def doubt(path: Path) -> str | None:
    """Why *path* is not to be believed; None if it is."""
    try:
        manifest = msgspec.json.decode((path / _MANIFEST).read_bytes(), type=dict[str, str])
        if set(manifest) - {_BEST} != {_LEARNED, _OPTIMIZER, _STATE}:
            return "its manifest lacks files"
        for name, expected in manifest.items():
            if _sha256(path / name) != expected:
                return f"{name} is not what was written"
        read(path)
    except msgspec.ValidationError:
        return "its state is of another version of this program"
    except (OSError, msgspec.DecodeError) as error:
        return error.strerror or str(error) if isinstance(error, OSError) else "its manifest is not JSON"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(parts: Mapping[str, bytes | str | float]) -> dict[str, str]:
    """What tells one run from another: short values as they are, contents by their SHA-256."""
    return dict(_printed(parts))


def _printed(parts: Mapping[str, bytes | str | float]) -> Iterator[tuple[str, str]]:
    for name, value in parts.items():
        yield name, hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
