"""From a search over stages to what a plan holds: prediction, alternatives and proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import quality, staged_bound
from .cuts import FAR
from .cutting import seconds
from .pipelined import StagedSearch, Traced
from .plan import Candidate, Prediction, Sensitivity, StageMemory
from .problem import Problem
from .proof import OPTIMAL_GAP, Proof, Status, Tables, gap
from .solver import LEANER, Solution
from .staged import Staging


def solution(search: StagedSearch, num_alternatives: int, better_than: int = FAR) -> Solution | None:
    """The best of *search* with its proof, and what needs less memory; None where nothing scores less and fits."""
    found = search.best(better_than=better_than)
    if found is None:
        return None
    others = _alternatives(search, found) if num_alternatives else ()
    return Solution(
        best=_candidate(search.problem, found),
        peak=max(found.peaks, key=lambda peak: peak.peak_reserved_bytes),
        proof=_proof(search.problem, search.made, found),
        sensitivity=Sensitivity(binding="nothing", seconds_per_100_mib=0.0, next_rank=None, next_rank_seconds=None),
        alternatives=tuple(_candidate(search.problem, one) for one in others[:num_alternatives]),
        num_cells=len(search.made),
        num_nodes=0,
        num_traced=search.num_traced,
        num_rejected=search.num_rejected,
        best_uniform_seconds=None,
    )


def _alternatives(search: StagedSearch, found: Traced) -> tuple[Traced, ...]:
    """What a run goes on with where memory is short after all."""
    most = max(stage.taken.peak_bytes for stage in found.chosen.stages)
    leaner = search.best(int(LEANER * most))
    return () if leaner is None or leaner.configuration == found.configuration else (leaner,)


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


def _proof(problem: Problem, made: Sequence[Staging], found: Traced) -> Proof:
    """The tables of all cells, and the gap that follows from them."""
    tables = Tables()
    staged = tuple(staging.told(tables.table(staging.groups)) for staging in made)
    proof = Proof(
        status="feasible",
        gap=0.0,
        unfragmented_gap=0.0,
        score_picoseconds=found.chosen.score_picoseconds,
        bound_picoseconds=0,
        budget_bytes=problem.budget_bytes,
        harm=None,
        host_bytes=problem.host_bytes,
        step_picoseconds=None,
        strategies=tuple(tables.strategies),
        tables=tuple(tables.tables),
        cells=(),
        unfragmented=(),
        staged=staged,
    )
    least = staged_bound.least_of(proof, staged)
    shown = gap(proof.score_picoseconds, [least])
    status: Status = "optimal" if shown <= OPTIMAL_GAP else "within"
    return replace(
        proof,
        status=status,
        gap=shown,
        unfragmented_gap=shown,
        bound_picoseconds=max(0, proof.score_picoseconds if least is None else least),
    )
