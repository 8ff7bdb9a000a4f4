"""Kill training again and again, resume each run, and say what came of it; with evaluations and early stopping.

python -m tests.runtime.killed NUM_KILLS

Runs in a process of its own, so that its forks start with one thread and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.runtime import checkpoint, files
from shallowflow.runtime.record import RunRecord
from shallowflow.runtime.run import RunRequest, Silent, train
from tests.runtime import tiny

NUM_STEPS, SAVE_EVERY, EVAL_EVERY, PATIENCE = 12, 2, 3, 2
LEARNING_RATE = 0.02
HELD_OUT = "ZQ%! jk 77 XX~ vv ww." * 4
"""So unlike the data that learning soon makes it worse, and training stops early."""


class Noting(Silent):
    """Writes a byte per step to a file, which outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self, record: Any, peak: Any) -> None:
        """Note one step."""
        with self.path.open("ab") as file:
            file.write(b".")


def die_at_write(number: int) -> None:
    """Let this process kill itself when something is brought to disk for the *number*-th time."""
    left = [number]
    real = files.to_disk

    def to_disk(path: Path) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    vars(checkpoint)["to_disk"] = to_disk


def killed(plan: Plan, request: RunRequest, noted: Path, *, after: float | None, at_write: int) -> None:
    """Train in a fork that dies after so many seconds, or at one of its writes."""
    child = os.fork()
    if child == 0:
        if after is None:
            die_at_write(at_write)
        train(plan, request, Noting(noted))
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def outcome(record: RunRecord, output: Path) -> dict[str, Any]:
    """All of a run that an interruption must not change, to the last bit."""
    return {
        "losses": [step.loss for step in record.steps],
        "evaluations": [(one.step, one.loss, one.perplexity) for one in record.evaluations],
        "outcome": record.outcome,
        "best_step": record.best_step,
        "adapter": hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "best": hashlib.sha256((output / "best" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def main(num_kills: int) -> None:
    """Print JSON: how the run ends in one go, and for each kill what was lost and whether it ends the same."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    weights = tiny.save(folder / "model")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES), encoding="utf-8")
    held_out = folder / "held.txt"
    held_out.write_text(HELD_OUT, encoding="utf-8")
    plan = shallowflow.plan(str(weights), "cpu", sequence_length=32, global_batch_size=4, rank=8)
    whole = RunRequest(
        data=data,
        eval_data=held_out,
        weights=weights,
        output=folder / "whole",
        num_steps=NUM_STEPS,
        learning_rate=LEARNING_RATE,
        save_every=SAVE_EVERY,
        eval_every=EVAL_EVERY,
        patience=PATIENCE,
    )
    began = time.perf_counter()
    expected = outcome(train(plan, whole), whole.output)
    seconds = time.perf_counter() - began
    chance = random.Random(0)
    found = []
    for number in range(num_kills):
        request, noted = replace(whole, output=folder / f"run{number}"), folder / f"noted{number}"
        at_write = chance.randint(1, 6 * NUM_STEPS // SAVE_EVERY)
        after = None if number % 3 == 0 else seconds * (0.2 + 0.8 * chance.random())
        killed(plan, request, noted, after=after, at_write=at_write)
        done = noted.stat().st_size if noted.exists() else 0
        record = train(plan, replace(request, resume=True))
        words = [note for note in record.notes if note.startswith("resumed after step")]
        resumed = int(words[0].split()[-1]) if words else 0
        same = outcome(record, request.output) == expected
        found.append({"in_a_save": after is None, "done": done, "resumed": resumed, "same": same})
    print(json.dumps({"outcome": expected["outcome"], "num_steps": len(expected["losses"]), "kills": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
