"""Accelerate's trackers, told of every step and evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import EvaluationRecord, StepRecord

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker"}
"""What may be asked for, by the names of the packages, and Accelerate's classes for them."""
PROJECT = "shallowflow"


def missing_package(name: str) -> str | None:
    """Why the tracker *name* cannot be used here; None if it can."""
    if name not in TRACKERS:
        return f"there is no tracker {name!r}; give one of {', '.join(TRACKERS)}"
    if importlib.util.find_spec(name) is None:
        return f"--track {name} needs the package {name}; install it with: pip install {name}"
    return None


class Trackers:
    """Those that were asked for, from the start of a run to its end."""

    def __init__(self, names: Sequence[str], output: Path, settings: dict[str, Any]) -> None:
        self.names, self.output, self.settings = names, output, settings
        self.made: list[Any] | None = None

    def _started(self) -> list[Any]:
        """All of them, made when there is something to tell: a run that is refused leaves nothing behind."""
        from accelerate import tracking

        if self.made is None:
            self.made = []
            for name in self.names:
                place = {"logging_dir" if name == "tensorboard" else "dir": str(self.output)}
                tracker = getattr(tracking, TRACKERS[name])(name if name == "tensorboard" else PROJECT, **place)
                tracker.start()
                if name != "tensorboard":  # whose own way to store settings makes a second run of them
                    tracker.store_init_configuration(self.settings)
                self.made.append(tracker)
        return self.made

    def step(self, record: StepRecord) -> None:
        """Tell all of one update: everything that its record holds."""
        values: dict[str, float] = {
            "loss": record.loss,
            "gradient_norm": record.gradient_norm,
            "loss_scale": record.loss_scale,
            "skipped": float(record.skipped),
            "num_target_tokens": float(record.num_target_tokens),
            "seconds": record.seconds,
            "memory_measured": float(record.memory_measured),
        }
        if record.usd is not None:
            values["usd"] = record.usd
        self._log({f"step/{name}": value for name, value in values.items()}, record.index)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Tell all of one evaluation."""
        self._log({"evaluation/loss": record.loss, "evaluation/perplexity": record.perplexity}, record.step)

    def finish(self) -> None:
        """Write what is pending."""
        for tracker in self.made or ():
            tracker.finish()

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self._started():
            tracker.log(values, step=step)
