"""Who is told how a run goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .meter import MeasuredPeak
from .record import EvaluationRecord, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """What a run has cost and will have: dollars of all its sessions, by the time that really passed.

    Attributes:
        interruptions: times that it was ended before its end and gone on with.
    """

    usd: float
    projected_usd: float | None
    budget_usd: float | None
    interruptions: int


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stage(self, message: str, total: int | None = None) -> None:
        """A new stage of *total* parts begins."""

    def advance(self) -> None:
        """One part of the stage is done."""

    def step(self, record: StepRecord, peak: MeasuredPeak | None) -> None:
        """One optimizer update is done."""

    def money(self, money: Money) -> None:
        """What the run has cost so far."""

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

    def money(self, money: Money) -> None:
        """Hear of dollars."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """Hear of an evaluation."""

    def note(self, message: str) -> None:
        """Hear a note."""
