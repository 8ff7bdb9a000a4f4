"""From a search over stages to what a plan holds: prediction, alternatives and proof."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from . import limited, quality, staged_limits
from .cuts import FAR
from .cutting import seconds
from .limited import Kept
from .needs import Unproven
from .pipelined import StagedSearch, Traced
from .plan import Candidate, Prediction, Sensitivity, StageMemory
from .problem import Problem
from .proof import OPTIMAL_GAP, Proof, Status, Tables, gap
from .solver import LEANER, Solution
from .staged import Staging, harm_price


def solution(search: StagedSearch, num_alternatives: int, better_than: int = FAR) -> Solution | None:
    """The best of *search* with its proof, and what needs less memory; None where nothing scores less and fits."""
    kept = limited.best(search, better_than)
    if kept is None:
        return None
    found = kept.found
    others = _alternatives(kept.by, found) if num_alternatives else ()
    return Solution(
        best=_candidate(search.problem, found),
        peak=max(found.peaks, key=lambda peak: peak.peak_reserved_bytes),
        proof=_best_proof(kept),
        sensitivity=Sensitivity(binding="nothing", seconds_per_100_mib=0.0, next_rank=None, next_rank_seconds=None),
        alternatives=tuple(_candidate(search.problem, one) for one in others[:num_alternatives]),
        num_cells=len(search.made),
        num_nodes=0,
        num_traced=kept.num_traced,
        num_rejected=kept.num_rejected,
        best_uniform_seconds=None,
    )


def _alternatives(search: StagedSearch, found: Traced) -> tuple[Traced, ...]:
    """What a run goes on with where memory is short after all."""
    most = max(stage.taken.peak_bytes for stage in found.chosen.stages)
    leaner = search.best(int(LEANER * most))
    if leaner is None or leaner.configuration == found.configuration or not limited.keeps(search, leaner):
        return ()
    return (leaner,)


def _candidate(problem: Problem, found: Traced) -> Candidate:
    """What was found, with its traced prediction."""
    chosen, configuration, gpu = found.chosen, found.configuration, problem.gpu
    step = seconds(chosen.step_picoseconds)
    stages = tuple(
        StageMemory(
            resident_bytes=peak.resident_bytes,
            peak_allocated_bytes=peak.peak_allocated_bytes,
            peak_reserved_bytes=peak.peak_reserved_bytes,
            peak_process_bytes=peak.peak_reserved_bytes + gpu.context_bytes,
        )
        for peak in found.peaks
    )
    prediction = Prediction(
        resident_bytes=max(stage.resident_bytes for stage in stages),
        peak_allocated_bytes=max(stage.peak_allocated_bytes for stage in stages),
        peak_reserved_bytes=max(stage.peak_reserved_bytes for stage in stages),
        peak_process_bytes=max(stage.peak_process_bytes for stage in stages),
        step_seconds=step,
        communication_seconds=seconds(chosen.waiting_picoseconds),
        tokens_per_second=configuration.global_batch_size * configuration.sequence_length / step,
        traced=True,
        stages=stages,
    )
    error = quality.mean_error(configuration.strategies(), problem.weighed)
    return Candidate(configuration=configuration, prediction=prediction, weight_error=error)


def _best_proof(kept: Kept) -> Proof:
    """That of the tables that show most; some of another price than the usual show nothing."""
    proofs = [_proof(kept.tables[0], kept)]
    for made in kept.tables[1:]:
        with contextlib.suppress(Unproven):
            proofs.append(_proof(made, kept))
    return min(proofs, key=lambda proof: proof.gap)


def _harm_limit(problem: Problem) -> int | None:
    """The proof's: none where weights were measured, as its tables count layers alike."""
    return None if problem.weighed else problem.limits.harm


def _proof(made: Sequence[Staging], kept: Kept) -> Proof:
    """The tables of all cells as they were *made* at some price of harm, and the gap that follows from them."""
    problem, usual = kept.by.problem, harm_price(kept.tables[0])
    limits, tables = problem.limits, Tables()
    staged = tuple(staging.told(tables.table(staging.groups)) for staging in made)
    proof = Proof(
        status="feasible",
        gap=0.0,
        unfragmented_gap=0.0,
        score_picoseconds=kept.score_picoseconds,
        bound_picoseconds=0,
        budget_bytes=problem.budget_bytes,
        harm=_harm_limit(problem),
        host_bytes=problem.host_bytes,
        step_picoseconds=limits.step_picoseconds,
        strategies=tuple(tables.strategies),
        tables=tuple(tables.tables),
        cells=(),
        unfragmented=(),
        harm_price=0 if harm_price(made) == usual else usual,
        staged=staged,
    )
    least = staged_limits.least_score(proof)
    shown = gap(proof.score_picoseconds, [least])
    status: Status = "optimal" if shown <= OPTIMAL_GAP else "within"
    return replace(
        proof,
        status=status,
        gap=shown,
        unfragmented_gap=shown,
        bound_picoseconds=max(0, proof.score_picoseconds if least is None else least),
    )
