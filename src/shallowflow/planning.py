"""From a request to a plan: facts in, profiles traced or remembered, the search, the money."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallowflow import caveats, packing, refusals
from shallowflow.hub import find_model
from shallowflow.planner import (
    allowed,
    breakdown,
    costs,
    latency,
    money,
    paying,
    problem,
    solver,
    staged_plan,
    wall_time,
)
from shallowflow.planner.costs import LayerRuns
from shallowflow.planner.cuts import FAR
from shallowflow.planner.packing import trimmed_seconds
from shallowflow.planner.pipelined import StagedSearch
from shallowflow.planner.plan import FORMAT_VERSION, Candidate, Plan, SearchRecord, StepTime, WallTime, Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.solver import Solution
from shallowflow.planner.strategies import Cell
from shallowflow.profiles.load import load_gpu, load_instances
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.session import Progress, Session
from shallowflow.staging import Staged
from shallowflow.work import path_of, size_of_work
from shallowflow.workloads import check, deadline_hours, part_counts, space, stage_counts, workload_of

if TYPE_CHECKING:
    from shallowflow.runtime.documents import Format

MOST_DEADLINE_ROUNDS = 3
"""Of solving again where a run takes longer beside its steps than was allowed for."""


def plan(
    model: str | Path,
    gpu: str = "t4",
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    data_format: Format | None = None,
    progress: Progress = lambda _message: None,
    **workload: Any,
) -> Plan:
    """The best plan for fine-tuning *model* on *gpu*.

    Args:
        model: a shipped name, a path of a folder or ``config.json``, or, with a network, a name of the Hub.
        gpu: a shipped name.
        data, eval_data: files to learn and to evaluate on, whose size the work then has.
        data_format: how their rows are read; None tells it from their columns.
        progress: told what is being worked on.
        workload: fields of Workload, such as ``sequence_length=1024``.

    Raises:
        FactsError: model or GPU is unknown, or the configuration is broken.
        RequestError: the workload contradicts itself or the model.
        DataError: the data cannot be read.
        Infeasible: nothing fits; carries remedies that do.
    """
    facts, device, asked = find_model(str(model)), load_gpu(str(gpu)), workload_of(workload)
    learned, held_out = (path_of(name, given) for name, given in (("data", data), ("eval_data", eval_data)))
    tokens, names = workload.get("total_tokens"), (str(model), facts.name)
    size, notes = size_of_work(names, tokens, learned, held_out, data_format, asked.sequence_length)
    made = make_plan(facts, device, replace(asked, **size), progress=progress, notes=notes)
    return beside_one(made, facts, device, progress=progress)


def make_plan(
    model: ModelSpec,
    gpu: GpuSpec,
    workload: Workload,
    *,
    progress: Progress = lambda _message: None,
    notes: tuple[str, ...] = (),
    num_alternatives: int = solver.NUM_ALTERNATIVES,
    with_remedies: bool = True,
) -> Plan:
    """The best plan for *workload* among all configurations; *notes* are carried along.

    Raises:
        RequestError: the workload contradicts itself or the model.
        Infeasible: nothing fits; carries remedies that do, which take several times as long to find, if wanted.
    """
    check(workload, model, gpu)
    session = Session(model, gpu, progress, workload.adapter, workload.target_modules)

    def best(work: Workload, /, *, refused_in_full: bool = True) -> Plan:
        wanted = _Wanted(num_alternatives, with_remedies=with_remedies and refused_in_full)
        return _best(session, work, notes, wanted)

    return packing.decided(workload, model, best)


def beside_one(plan: Plan, model: ModelSpec, gpu: GpuSpec, *, progress: Progress = lambda _message: None) -> Plan:
    """*plan* with a note on what the same work takes on one GPU, if it is for several; nothing is planned otherwise."""
    work = plan.workload
    if work.num_gpus == 1:
        return plan
    alone = replace(
        work,
        num_gpus=1,
        num_machines=1,
        num_stages=None,
        parts_per_stage=None,
        sharding=None,
        deadline_hours=None,
        budget_usd=None,
    )
    one: Plan | None = None
    if not paying.is_too_large(plan.num_parameters, alone, gpu):
        progress("planning for one GPU")
        with contextlib.suppress(Infeasible):
            one = make_plan(model, gpu, alone, progress=progress, num_alternatives=0, with_remedies=False)
    return replace(plan, notes=(*plan.notes, paying.note(plan, one, load_instances(gpu.name))))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is wanted beside the best plan."""

    num_alternatives: int
    _: KW_ONLY
    with_remedies: bool
    with_reason: bool = True


def _best(session: Session, workload: Workload, notes: tuple[str, ...], wanted: _Wanted) -> Plan:
    """The best plan for *workload*, which says whether documents are packed, over the numbers of stages there may be.

    Raises:
        Infeasible: nothing fits in any number of stages.
    """
    numbers = stage_counts(workload, session.model)
    timed = replace(workload, deadline_hours=deadline_hours(workload, session.gpu))
    best: Plan | None = None
    tried: dict[tuple[int, int], Plan | None] = {}
    if 1 in numbers:
        try:
            best = tried[1, 1] = _whole(session, workload, timed, notes, wanted.num_alternatives)
        except _Unsolved as nothing:
            if len(numbers) == 1 and wanted.with_reason:
                raise refusals.infeasible(
                    session,
                    nothing.posed,
                    nothing.considered,
                    workload,
                    _plan,
                    with_remedies=wanted.with_remedies,
                ) from None
            tried[1, 1] = None
    searches: dict[tuple[int, int], StagedSearch] = {}
    late: dict[int, bool] = {}
    for number in (number for number in numbers if number > 1):
        parts = part_counts(workload, session.model, number)
        searches |= Staged(session, timed, number, parts).searches()
        late[number] = best is None and not searches[number, min(parts)].may_fit  # which holds the least
    in_order = sorted(searches, key=lambda cut: (late[cut[0]], searches[cut].glance))
    for cut in in_order:  # a good one soon, the rest by its bound
        better_than = FAR if best is None else best.proof.score_picoseconds
        made = _in_stages(session, searches[cut], workload, notes, wanted.num_alternatives, better_than)
        tried[cut], best = made, made or best
    if best is None:
        if not wanted.with_reason:
            raise Infeasible(0, session.gpu.memory_bytes, ())
        briefly = _Wanted(0, with_remedies=False, with_reason=False)
        raise refusals.infeasible_in_stages(
            session, workload, lambda work: _best(session, work, notes, briefly), with_remedies=wanted.with_remedies
        )
    if len(tried) == 1:
        return best
    return replace(best, notes=(*best.notes, caveats.compared(workload, tried)))


class _Unsolved(Exception):
    """Nothing fits with the whole model on every GPU."""

    def __init__(self, posed: problem.Problem, considered: tuple[Cell, ...]) -> None:
        super().__init__()
        self.posed, self.considered = posed, considered


def _whole(
    session: Session, workload: Workload, timed: Workload, notes: tuple[str, ...], num_alternatives: int
) -> Plan:
    """The best plan for *workload*, *timed* by its deadline and budget, with the whole model on every GPU.

    Raises:
        _Unsolved: nothing fits.
    """
    considered, rank = space(session, workload)
    posed = session.problem(timed, considered, rank)

    def solve(at: problem.Problem) -> Plan | None:
        solution = session.solve(at, considered, num_alternatives)
        return None if solution is None else _plan(session, at, workload, solution, notes)

    made, last = _in_time(session, posed, solve)
    if made is None:
        raise _Unsolved(last, considered)
    return made


def _in_stages(
    session: Session,
    search: StagedSearch,
    workload: Workload,
    notes: tuple[str, ...],
    num_alternatives: int,
    better_than: int,
) -> Plan | None:
    """The best plan of a *search* for *workload* that scores less than *better_than*; None where there is none."""

    def solve(at: problem.Problem) -> Plan | None:
        solution = staged_plan.solution(replace(search, problem=at), num_alternatives, better_than)
        return None if solution is None else _plan(session, at, workload, solution, notes)

    return _in_time(session, search.problem, solve)[0]


def _in_time(
    session: Session, posed: problem.Problem, solve: Callable[[problem.Problem], Plan | None]
) -> tuple[Plan | None, problem.Problem]:
    """What *solve* makes of *posed*, and as which problem.

    It is solved again where its run takes longer beside its steps than was allowed for.
    """
    timed = posed.workload
    beside = wall_time.least_beside_seconds(
        session.num_parameters(), timed.total_tokens, session.gpu.pcie_bytes_per_second
    )
    for _ in range(MOST_DEADLINE_ROUNDS):
        posed = replace(posed, beside_seconds=beside)
        made = solve(posed)
        if made is None or timed.deadline_hours is None or made.wall.total_seconds <= timed.deadline_hours * 3600:
            return made, posed
        beside = made.wall.total_seconds - made.wall.training_seconds
    return None, posed


def _plan(
    session: Session, posed: problem.Problem, workload: Workload, solution: Solution, notes: tuple[str, ...]
) -> Plan:
    best, gpu = solution.best, session.gpu
    configuration = best.configuration
    runs = posed.runs(configuration)

    def wall(disk_bytes_per_second: float = wall_time.DISK_BYTES_PER_SECOND) -> WallTime:
        return _wall_time(session, workload, best, runs, min(disk_bytes_per_second, wall_time.DISK_BYTES_PER_SECOND))

    return Plan(
        format_version=FORMAT_VERSION,
        model_name=session.model.name,
        model_config=dict(session.model.config),
        num_parameters=session.num_parameters(),
        gpu=gpu.name,
        compute_dtype=gpu.compute_dtype,
        attention=solution.peak.attention,
        memory_bytes=gpu.memory_bytes,
        budget_bytes=allowed.budget_bytes(gpu, workload),
        workload=workload,
        configuration=best.configuration,
        prediction=best.prediction,
        weight_error=best.weight_error,
        memory=solution.peak.parts,
        time=_step_time(runs, best, gpu),
        wall=wall(),
        offers=money.offers(
            load_instances(gpu.name),
            workload,
            lambda instance: wall(instance.disk_bytes_per_second).total_seconds / 3600,
        ),
        alternatives=solution.alternatives,
        search=SearchRecord(
            num_strategies=len(posed.strategies),
            num_cells=solution.num_cells,
            num_nodes=solution.num_nodes,
            num_traced=solution.num_traced,
            num_rejected=solution.num_rejected,
            best_uniform_seconds=solution.best_uniform_seconds,
        ),
        sensitivity=solution.sensitivity,
        proof=solution.proof,
        notes=(*notes, *caveats.of(session, workload, (best, *solution.alternatives))),
        versions=cache.versions(),
        weighed=session.weighed(),
    )


def _step_time(runs: LayerRuns, chosen: Candidate, gpu: GpuSpec) -> StepTime:
    """Where a step's time goes; of a model that is cut, on the mean of its stages."""
    configuration, prediction = chosen.configuration, chosen.prediction
    found = breakdown.step_time(
        runs,
        configuration.micro_batch_size,
        configuration.rank or 0,
        gpu,
        configuration.gradient_accumulation_steps,
        prediction.communication_seconds,
    )
    number = configuration.num_stages
    return found if number == 1 else breakdown.of_each_stage(found, number, prediction.step_seconds)


def _wall_time(
    session: Session, workload: Workload, chosen: Candidate, runs: LayerRuns, disk_bytes_per_second: float
) -> WallTime:
    configuration, gpu = chosen.configuration, session.gpu
    micro_batch_size, rank = configuration.micro_batch_size, configuration.rank or 0
    steps = math.ceil(workload.sequences(packing=configuration.packing) / configuration.global_batch_size)
    whole = latency.step_seconds(runs, micro_batch_size, rank, gpu).step(configuration.gradient_accumulation_steps)
    shared = chosen.prediction.step_seconds / whole if configuration.num_stages > 1 else 1.0
    step = chosen.prediction.step_seconds - shared * trimmed_seconds(runs, configuration, workload, gpu)
    learned = costs.learned_bytes(runs, rank)
    stages, parts = configuration.num_stages, configuration.parts_per_stage
    together = ((parts + 1) * stages - 1) / (parts * stages**2)  # as many at once as stages
    evaluated = together * wall_time.NUM_EVALUATIONS * math.ceil(workload.num_eval_sequences / micro_batch_size)
    return wall_time.wall_time(
        num_parameters=session.num_parameters(),
        total_tokens=workload.total_tokens,
        training_seconds=steps * step,
        evaluation_seconds=evaluated * breakdown.forward_seconds(runs, micro_batch_size, rank, gpu),
        saved_bytes=learned,
        checkpoint_bytes=learned + costs.optimizer_bytes(runs, rank),
        host_to_device_bytes_per_second=gpu.pcie_bytes_per_second,
        disk_bytes_per_second=disk_bytes_per_second,
    )
