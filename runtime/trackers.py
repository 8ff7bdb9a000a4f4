"""Accelerate's trackers and CloudWatch, told of every step and evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .meter import MeasuredPeak
from .record import EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from .aws.cloudwatch import CloudWatch

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker"}
"""What may be asked for, by the names of the packages, and Accelerate's classes for them."""
CLOUDWATCH = "cloudwatch"
"""What may be asked for as well, of the package boto3."""
PROJECT = "shallowflow"


def missing_package(name: str) -> str | None:
    """Why the tracker *name* cannot be used here; None if it can."""
    if name not in (*TRACKERS, CLOUDWATCH):
        return f"there is no tracker {name!r}; give one of {', '.join((*TRACKERS, CLOUDWATCH))}"
    package = "boto3" if name == CLOUDWATCH else name
    if importlib.util.find_spec(package) is None:
        return f"--track {name} needs the package {package}; install it with: pip install {package}"
    return None


class Trackers:
    """Those that were asked for, from the start of a run to its end."""

    def __init__(self, names: Sequence[str], output: Path, settings: dict[str, Any]) -> None:
        self.names, self.output, self.settings = names, output, settings
        self.made: list[Any] | None = None
        self.cloudwatch: CloudWatch | None = None
        self._failed: list[str] = []

    def _started(self) -> list[Any]:
        """All of them, made when there is something to tell: a run that is refused leaves nothing behind."""
        from accelerate import tracking

        if self.made is None:
            self.made = []
            if CLOUDWATCH in self.names:
                from .aws.cloudwatch import CloudWatch

                self.cloudwatch = CloudWatch(self.output.resolve().name)
            for name in self.names:
                if name == CLOUDWATCH:
                    continue
                place = {"logging_dir" if name == "tensorboard" else "dir": str(self.output)}
                tracker = getattr(tracking, TRACKERS[name])(name if name == "tensorboard" else PROJECT, **place)
                if self._try(name, tracker.start) and (
                    name == "tensorboard"  # whose own way to store settings makes a second run of them
                    or self._try(name, partial(tracker.store_init_configuration, self.settings))
                ):
                    self.made.append(tracker)
        return self.made

    def _try(self, name: str, tell: Callable[[], object]) -> bool:
        """Whether *tell* went well: no tracker's trouble ends a run."""
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's own code raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._failed.append(f"{name} is told no more: {reason}")
            return False
        return True

    def step(self, record: StepRecord, peak: MeasuredPeak | None = None, usd: float | None = None) -> None:
        """Tell all of one update: everything that its record holds; of *peak* and all dollars so far CloudWatch."""
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
        if self.cloudwatch is not None:
            self.cloudwatch.step(record, peak, usd)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Tell all of one evaluation."""
        self._log({"evaluation/loss": record.loss, "evaluation/perplexity": record.perplexity}, record.step)
        if self.cloudwatch is not None:
            self.cloudwatch.evaluation(record)

    def news(self) -> list[str]:
        """What a person should know: why something was not told."""
        failed, self._failed = self._failed, []
        return failed if self.cloudwatch is None else [*failed, *self.cloudwatch.news()]

    def finish(self) -> None:
        """Write what is pending."""
        for tracker in self.made or ():
            self._try(tracker.name, tracker.finish)
        if self.cloudwatch is not None:
            self.cloudwatch.finish()

    def _log(self, values: dict[str, float], step: int) -> None:
        told = self._started()
        self.made = [t for t in told if self._try(t.name, partial(t.log, values, step=step))]
