"""Exhaustive search over uniform configurations, each winner checked by tracing its whole step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .plan import Candidate, MemoryPart, Objective, Prediction
from .problem import Problem, candidates
from .strategies import Configuration

NUM_ALTERNATIVES = 4
MOST_TRIED = 8
"""Candidates that are tried at most as alternatives."""


SAME_SPEED = 0.02
"""Predicted times are put in steps of this ratio; within one, finer weights come first."""


@dataclass(frozen=True, slots=True)
class TracedPeak:
    """What tracing a whole step and replaying it through the allocator gave.

    Attributes:
        parts: the process's memory at the peak by category; sums to reserved plus context.
        attention: the implementation that the model took.
    """

    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    parts: tuple[MemoryPart, ...]
    attention: str


Trace = Callable[[Configuration], TracedPeak]


@dataclass(frozen=True, slots=True)
class Solution:
    """The best configuration that fits, and the next best.

    Attributes:
        num_candidates, num_fitting, num_traced, num_rejected: see SearchRecord.
    """

    best: Candidate
    peak: TracedPeak
    alternatives: tuple[Candidate, ...]
    num_candidates: int
    num_fitting: int
    num_traced: int
    num_rejected: int


def preference(objective: Objective) -> Callable[[Candidate], tuple[float, ...]]:
    """The order in which *objective* prefers candidates: smaller is better."""

    def fastest(candidate: Candidate) -> tuple[float, ...]:
        prediction = candidate.prediction
        return (
            math.floor(math.log(prediction.step_seconds) / math.log(1 + SAME_SPEED)),
            candidate.weight_error,
            prediction.step_seconds,
            prediction.peak_reserved_bytes,
        )

    def finest(candidate: Candidate) -> tuple[float, ...]:
        return (candidate.weight_error, -candidate.configuration.rank, *fastest(candidate))

    return finest if objective == "quality" else fastest


def solve(problem: Problem, trace: Trace) -> Solution | None:
    """The best uniform configuration by the workload's objective whose own traced step fits; None when none does.

    A candidate that seems to fit is traced whole; if its reserved bytes exceed the budget, it and everything of its
    strategy that needs as much is dropped, and the next is tried. Alternatives are found in the same way.
    """
    everything = candidates(problem)
    fitting = sorted(
        (c for c in everything if c.prediction.peak_reserved_bytes <= problem.budget_bytes),
        key=preference(problem.workload.objective),
    )
    verifier = _Verifier(trace, problem.budget_bytes)
    for index, candidate in enumerate(fitting):
        best = verifier.verify(candidate)
        if best is None:
            continue
        peak = verifier.peak
        alternatives: list[Candidate] = []
        for other in _different(candidate, fitting[index + 1 :])[:MOST_TRIED]:
            verified = verifier.verify(other)
            alternatives += [verified] if verified else []
            if len(alternatives) == NUM_ALTERNATIVES:
                break
        return Solution(
            best=best,
            peak=peak,
            alternatives=tuple(sorted(alternatives, key=preference(problem.workload.objective))),
            num_candidates=len(everything),
            num_fitting=1 + sum(not verifier.is_refused(c) for c in fitting[index + 1 :]),
            num_traced=verifier.num_traced,
            num_rejected=len(verifier.rejected),
        )
    return None


class _Verifier:
    """Traces candidates whole and remembers what did not fit.

    Attributes:
        peak: of the candidate that was found to fit last.
    """

    def __init__(self, trace: Trace, budget_bytes: int) -> None:
        self.trace = trace
        self.budget_bytes = budget_bytes
        self.rejected: list[Candidate] = []
        self.num_traced = 0
        self.peak: TracedPeak

    def is_refused(self, candidate: Candidate) -> bool:
        """Whether it, or one of its strategy that needs no more, did not fit."""
        return any(_needs_as_much(candidate, other) for other in self.rejected)

    def verify(self, candidate: Candidate) -> Candidate | None:
        """*candidate* with its traced prediction; None if it does not fit."""
        if self.is_refused(candidate):
            return None
        self.num_traced += 1
        peak = self.trace(candidate.configuration)
        if peak.peak_reserved_bytes > self.budget_bytes:
            self.rejected.append(candidate)
            return None
        self.peak = peak
        return _traced(candidate, peak)


def smallest(problem: Problem) -> Candidate | None:
    """The candidate with the lowest predicted peak; None without candidates."""
    return min(candidates(problem), key=lambda c: c.prediction.peak_reserved_bytes, default=None)


def _needs_as_much(candidate: Candidate, other: Candidate) -> bool:
    same = candidate.configuration.layers == other.configuration.layers
    return same and candidate.prediction.peak_allocated_bytes >= other.prediction.peak_allocated_bytes


def _with_reserved(prediction: Prediction, reserved_bytes: int) -> Prediction:
    context = prediction.peak_process_bytes - prediction.peak_reserved_bytes
    return replace(prediction, peak_reserved_bytes=reserved_bytes, peak_process_bytes=reserved_bytes + context)


def _traced(candidate: Candidate, peak: TracedPeak) -> Candidate:
    prediction = replace(
        _with_reserved(candidate.prediction, peak.peak_reserved_bytes),
        resident_bytes=peak.resident_bytes,
        peak_allocated_bytes=peak.peak_allocated_bytes,
        traced=True,
    )
    return replace(candidate, prediction=prediction)


def _different(best: Candidate, rest: Sequence[Candidate]) -> list[Candidate]:
    """The best of each other strategy, then the best other rank or micro-batch of any."""
    chosen: list[Candidate] = []
    seen = {best.configuration.layers}
    for candidate in rest:
        if candidate.configuration.layers not in seen:
            seen.add(candidate.configuration.layers)
            chosen.append(candidate)
    return [*chosen, *[c for c in rest if c not in chosen][:1]]
