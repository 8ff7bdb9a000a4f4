"""Who is told how a run goes."""

from __future__ import annotations

from typing import Protocol

from .meter import MeasuredPeak
from .record import EvaluationRecord, StepRecord


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stage(self, message: str, total: int | None = None) -> None:
        """A new stage of *total* parts begins."""

    def advance(self) -> None:
        """One part of the stage is done."""

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """One optimizer update is done."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """One evaluation is done."""

    def note(self, message: str) -> None:
        """Something happened that a person should know at once."""


class Silent:
    """A watcher who says nothing."""

    def stage(self, message: str, total: int | None = None) -> None:
        """Hear of a stage."""

    def advance(self) -> None:
        """Hear of a part."""

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """Hear of a step."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """Hear of an evaluation."""

    def note(self, message: str) -> None:
        """Hear a note."""
