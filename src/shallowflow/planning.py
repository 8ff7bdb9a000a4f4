"""From a request to a plan: facts in, profiles traced or remembered, the search, the money."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shallowflow import packing
from shallowflow.planner import breakdown, costs, money, problem, quality, solver, wall_time
from shallowflow.planner.costs import LayerRuns
from shallowflow.planner.packing import trimmed_seconds
from shallowflow.planner.plan import FORMAT_VERSION, Candidate, Plan, SearchRecord, WallTime, Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.remedies import MOST_REMEDIES, Change, Infeasible, Remedy, changes
from shallowflow.planner.solver import Solution
from shallowflow.planner.strategies import Cell
from shallowflow.profiles import model_facts
from shallowflow.profiles.load import gpu_names, load_gpu, load_instances, load_model
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.session import Progress, RequestError, Session

MOST_DEADLINE_ROUNDS = 3
"""Of solving again where a run takes longer beside its steps than was allowed for."""


def plan(model: str | Path, gpu: str = "t4", *, progress: Progress = lambda _message: None, **workload: Any) -> Plan:
    """The best plan for fine-tuning *model* on *gpu*.

    Args:
        model: a shipped name, or a path of a folder or ``config.json``.
        gpu: a shipped name.
        progress: told what is being worked on.
        workload: fields of Workload, such as ``sequence_length=1024``.

    Raises:
        FactsError: model or GPU is unknown, or the configuration is broken.
        RequestError: the workload contradicts itself or the model.
        Infeasible: nothing fits; carries remedies that do.
    """
    return make_plan(load_model(str(model)), load_gpu(gpu), workload_of(workload), progress=progress)


def workload_of(entries: Mapping[str, Any]) -> Workload:
    """A workload of these *entries*; RequestError where one is unknown or wrong."""
    try:
        wanted = msgspec.convert(dict(entries), type=Workload, strict=True)
    except msgspec.ValidationError as error:
        raise RequestError(f"bad workload: {error}") from None
    unknown = sorted(set(entries) - set(Workload.__dataclass_fields__))
    if unknown:
        raise RequestError(f"unknown workload {unknown[0]!r}; there are {', '.join(Workload.__dataclass_fields__)}")
    return wanted


def make_plan(
    model: ModelSpec,
    gpu: GpuSpec,
    workload: Workload,
    *,
    progress: Progress = lambda _message: None,
    notes: tuple[str, ...] = (),
    num_alternatives: int = solver.NUM_ALTERNATIVES,
) -> Plan:
    """The best plan for *workload* among all configurations; *notes* are carried along.

    Raises:
        RequestError: the workload contradicts itself or the model.
        Infeasible: nothing fits; carries remedies that do.
    """
    _check(workload, model, gpu)
    session = Session(model, gpu, progress)
    return packing.decided(workload, model, lambda work: _best(session, work, notes, num_alternatives))


def _best(session: Session, workload: Workload, notes: tuple[str, ...], num_alternatives: int) -> Plan:
    """The best plan for *workload*, which says whether documents are packed."""
    timed = replace(workload, deadline_hours=_deadline_hours(workload, session.gpu))
    considered, rank = space(session, workload)
    posed = session.problem(timed, considered, rank)
    made: Plan | None = None
    beside = _beside_seconds(session, workload)
    for _ in range(MOST_DEADLINE_ROUNDS):
        posed = replace(posed, beside_seconds=beside)
        solution = _solved(session, posed, considered, num_alternatives)
        if solution is None:
            raise _infeasible(session, posed, considered, workload)
        made = _plan(session, posed, workload, solution, notes)
        if timed.deadline_hours is None or made.wall.total_seconds <= timed.deadline_hours * 3600:
            return made
        beside = made.wall.total_seconds - made.wall.training_seconds
    raise _infeasible(session, posed, considered, workload)


def _solved(
    session: Session, posed: problem.Problem, considered: tuple[Cell, ...], num_alternatives: int
) -> Solution | None:
    if not posed.profiles:
        return None
    return solver.solve(posed, considered, session.trace, num_alternatives)


def smallest_process_bytes(model: ModelSpec, gpu: GpuSpec, workload: Workload, progress: Progress) -> int:
    """What the smallest step of *workload* takes of *gpu*, whether that has so much or not.

    Raises:
        RequestError: the workload contradicts itself or the model.
    """
    _check(workload, model, gpu)
    return _smallest_process_bytes(Session(model, gpu, progress), workload)


def space(session: Session, workload: Workload) -> tuple[tuple[Cell, ...], int]:
    """The cells to search for *workload*, and the adapter's rank in all of them."""
    divisible = not model_facts.changes_logits(session.model.config)
    if not divisible and (workload.loss_chunks or 1) > 1:
        raise RequestError(
            f"{session.model.name} changes its logits after the head, so its loss is not computed in chunks; "
            "try loss_chunks=1"
        )
    rank = workload.rank
    if rank is None:
        per_rank = session.parameters_per_rank(workload.sequence_length, packing=workload.packing is True)
        rank = quality.enough_rank(workload.total_tokens, per_rank, workload.min_rank)
        widest = model_facts.size(session.model.config, "hidden_size") or rank
        rank = max(workload.min_rank, min(rank, widest))
    return problem.cells(workload, rank, divisible_loss=divisible), rank


def _deadline_hours(workload: Workload, gpu: GpuSpec) -> float | None:
    """When the run must be over, for the time or for the money."""
    if workload.budget_usd is None:
        return workload.deadline_hours
    prices = [
        price.on_demand_usd_per_hour
        for instance in load_instances(gpu.name)
        if instance.num_gpus >= workload.num_gpus
        for price in instance.prices
        if price.region == workload.region
    ]
    if not prices:
        raise RequestError(f"no shipped instance has {workload.num_gpus} x {gpu.title}, so --budget-usd has no price")
    hours = workload.budget_usd / min(prices)
    return hours if workload.deadline_hours is None else min(hours, workload.deadline_hours)


def _beside_seconds(session: Session, workload: Workload) -> float:
    """What a run takes at least beside its steps."""
    return wall_time.wall_time(
        num_parameters=session.num_parameters(),
        total_tokens=workload.total_tokens,
        training_seconds=0.0,
        evaluation_seconds=0.0,
        saved_bytes=0,
        host_to_device_bytes_per_second=session.gpu.pcie_bytes_per_second,
    ).total_seconds


def _check(workload: Workload, model: ModelSpec, gpu: GpuSpec) -> None:
    if workload.global_batch_size % workload.num_gpus:
        raise RequestError(
            f"a global batch of {workload.global_batch_size} sequences does not divide over {workload.num_gpus} GPUs; "
            f"try --global-batch-size {math.ceil(workload.global_batch_size / workload.num_gpus) * workload.num_gpus}"
        )
    share = workload.global_batch_size // workload.num_gpus
    if workload.micro_batch_size is not None and share % workload.micro_batch_size:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise RequestError(
            f"micro-batches of {workload.micro_batch_size} do not divide the {share} sequences of one GPU's step; "
            f"try one of {divisors}"
        )
    if workload.loss_chunks is not None and workload.sequence_length % workload.loss_chunks:
        raise RequestError(
            f"{workload.loss_chunks} chunks do not divide a sequence of {workload.sequence_length} tokens; "
            "try a power of two"
        )
    if model_facts.is_mixture_of_experts(model.config):
        raise RequestError(f"{model.name} is a mixture of experts, which cannot be planned yet; try a dense model")
    offered = {price.region for instance in load_instances(gpu.name) for price in instance.prices}
    if offered and workload.region not in offered:
        raise RequestError(
            f"no prices of {gpu.title} instances in region {workload.region!r}; known: {', '.join(sorted(offered))}"
        )
    kind = str(model.config.get("model_type"))
    if gpu.compute_dtype == "float16" and model_facts.overflows_fp16(model.config):
        raise RequestError(
            f"{model.name} overflows in fp16 (model_type {kind}) and {gpu.title} has no bf16; "
            "try a GPU that has, such as --gpu l4"
        )
    check_sizes(model, workload.sequence_length, workload.rank or workload.min_rank)
    reason = packing.refusal(workload, model)
    if workload.packing and reason is not None:
        raise RequestError(f"documents for {model.name} cannot be packed: {reason}; try --no-packing")


def check_sizes(model: ModelSpec, sequence_length: int, rank: int) -> None:
    """RequestError where *model* was not built for sequences so long, or a rank is so large that it saves nothing."""
    longest = model_facts.size(model.config, "max_position_embeddings")
    if longest is not None and sequence_length > longest:
        raise RequestError(
            f"sequence length {sequence_length} is more than the {longest} that {model.name} was built for; "
            f"try --sequence-length {longest}"
        )
    width = model_facts.size(model.config, "hidden_size")
    if width is not None and rank > width:
        raise RequestError(
            f"rank {rank} is more than the hidden size {width} of {model.name}; try a rank up to {width}"
        )


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
        budget_bytes=problem.budget_bytes(gpu, workload),
        workload=workload,
        configuration=best.configuration,
        prediction=best.prediction,
        weight_error=best.weight_error,
        memory=solution.peak.parts,
        time=breakdown.step_time(
            runs,
            configuration.micro_batch_size,
            configuration.rank,
            gpu,
            configuration.gradient_accumulation_steps,
            best.prediction.communication_seconds,
        ),
        wall=wall(),
        offers=money.offers(
            load_instances(gpu.name),
            workload.region,
            workload.num_gpus,
            lambda instance: wall(instance.disk_bytes_per_second).total_seconds / 3600,
        ),
        alternatives=solution.alternatives,
        search=SearchRecord(
            num_strategies=len({strategy for strategy, _ in posed.profiles}),
            num_cells=solution.num_cells,
            num_nodes=solution.num_nodes,
            num_traced=solution.num_traced,
            num_rejected=solution.num_rejected,
            best_uniform_seconds=solution.best_uniform_seconds,
        ),
        sensitivity=solution.sensitivity,
        proof=solution.proof,
        notes=(*notes, *_notes(session, workload, (best, *solution.alternatives))),
        versions=cache.versions(),
    )


def _wall_time(
    session: Session, workload: Workload, chosen: Candidate, runs: LayerRuns, disk_bytes_per_second: float
) -> WallTime:
    configuration, gpu = chosen.configuration, session.gpu
    micro_batch_size, rank = configuration.micro_batch_size, configuration.rank
    steps = math.ceil(workload.sequences(packing=configuration.packing) / configuration.global_batch_size)
    step = chosen.prediction.step_seconds - trimmed_seconds(runs, configuration, workload, gpu)
    evaluated = wall_time.NUM_EVALUATIONS * math.ceil(workload.num_eval_sequences / micro_batch_size)
    return wall_time.wall_time(
        num_parameters=session.num_parameters(),
        total_tokens=workload.total_tokens,
        training_seconds=steps * step,
        evaluation_seconds=evaluated * breakdown.forward_seconds(runs, micro_batch_size, rank, gpu),
        saved_bytes=sum(costs.gradient_bytes(profile, count, rank) for profile, count in runs),
        host_to_device_bytes_per_second=gpu.pcie_bytes_per_second,
        disk_bytes_per_second=disk_bytes_per_second,
    )


def _time_note(gpu: GpuSpec) -> str:
    """How far the seconds can be trusted, and why."""
    return f"Seconds: give or take {gpu.step_error:.0%}: {gpu.sources['step_error'].text}."


def _notes(session: Session, workload: Workload, shown: tuple[Candidate, ...]) -> tuple[str, ...]:
    """What the numbers leave out and a user should know."""
    notes = [_time_note(session.gpu)]
    formats = {strategy.weight_format for c in shown for strategy in c.configuration.strategies()}
    if "int8" in formats and session.gpu.device_type == "cuda":
        notes.append(
            "No step with int8 weights was recorded on a GPU: their products are priced as fp16's, which is a guess."
        )
    policies = {strategy.activations for c in shown for strategy in c.configuration.strategies()}
    if "offload" in policies:
        notes.append(
            "No step with offloaded activations was recorded on a GPU: their copies are priced at the link's rate, "
            "beside the computing of their layer."
        )
    if workload.num_gpus > 1:
        notes.append("Several GPUs are planned as data parallel; `sfplan train` runs on one so far.")
    hosts = [i for i in load_instances(session.gpu.name) if i.num_gpus >= workload.num_gpus]
    cheapest = min(hosts, key=lambda i: i.ram_bytes, default=None)
    weights = session.num_parameters() * 2
    if cheapest is not None and weights > cheapest.ram_bytes:
        notes.append(
            f"The weights in 16 bits ({weights / 2**30:.1f} GiB) exceed the RAM of {cheapest.name} "
            f"({cheapest.ram_bytes / 2**30:.0f} GiB): load them shard by shard."
        )
    return tuple(notes)


def _infeasible(
    session: Session, posed: problem.Problem, considered: tuple[Cell, ...], workload: Workload
) -> Infeasible:
    """The refusal, with remedies that each fit when traced whole."""
    gpu = session.gpu
    if posed.host_bytes is not None and workload.activations == "offload":
        without = replace(posed, host_bytes=None)
        solution = _solved(session, without, considered, 0)
        if solution is not None:
            return _too_much_sent(session, workload, posed.host_bytes, solution)
    for loosened, refusal in _beyond_memory(posed, workload):
        solution = _solved(session, loosened, considered, 0)
        if solution is not None:
            return refusal(_plan(session, loosened, workload, solution, ()))
    peak = _smallest_process_bytes(session, workload)
    remedies: list[Remedy] = []
    if workload.max_process_bytes is not None:
        option = f"--max-process-gib {math.ceil(peak / 2**30 * 100) / 100:g}"
        roomy = replace(workload, max_process_bytes=math.ceil(peak / 2**30 * 100) * 2**30 // 100)
        remedies += _first_that_fits(session, (Change(option, roomy, gpu),))
    for group in changes(workload, gpu, [load_gpu(name) for name in gpu_names()]):
        remedies += _first_that_fits(session, group)
        if len(remedies) == MOST_REMEDIES:
            break
    if workload.max_process_bytes is not None and workload.max_process_bytes < gpu.memory_bytes:
        return Infeasible(peak, workload.max_process_bytes, remedies)
    headroom = problem.HEADROOM if workload.headroom is None else workload.headroom
    needed = math.ceil(peak / (1 - headroom))  # the memory of which headroom leaves the peak
    return Infeasible(needed, gpu.memory_bytes, remedies)


def _too_much_sent(session: Session, workload: Workload, host_bytes: int, solution: Solution) -> Infeasible:
    """The refusal where the device's memory would do, and the host's does not."""
    reason = (
        f"no plan fits in {host_bytes / 2**30:.2f} GiB of host memory for offloaded activations, "
        "half of the smallest machine's with this GPU."
    )
    free = Change("the same without --fix activations=offload", replace(workload, activations=None), session.gpu)
    peak = solution.best.prediction.peak_process_bytes
    return Infeasible(peak, session.gpu.memory_bytes, _first_that_fits(session, (free,)), reason)


def _beyond_memory(
    posed: problem.Problem, workload: Workload
) -> Iterator[tuple[problem.Problem, Callable[[Plan], Infeasible]]]:
    """The problem without one of its other limits, and what to say if that can be solved."""
    timed = posed.workload
    if timed.deadline_hours is not None:

        def too_slow(plan: Plan) -> Infeasible:
            hours = plan.wall.total_seconds / 3600
            option = f"--deadline-hours {math.ceil(hours * 100) / 100:g}"
            if workload.budget_usd is not None and plan.offers:
                option = f"--budget-usd {math.ceil(plan.offers[0].on_demand_usd * 100) / 100:g}"
            remedy = Remedy(option=option, peak_process_bytes=plan.prediction.peak_process_bytes)
            reason = (
                f"no plan ends within {timed.deadline_hours:.2f} h: the best without that limit takes {hours:.2f} h."
            )
            return Infeasible(plan.prediction.peak_process_bytes, plan.memory_bytes, [remedy], reason)

        yield replace(posed, workload=replace(timed, deadline_hours=None)), too_slow
    if timed.max_weight_error is not None:

        def too_coarse(plan: Plan) -> Infeasible:
            option = f"--max-weight-error {math.ceil(plan.weight_error * 1e4) / 1e4:g}"
            remedy = Remedy(option=option, peak_process_bytes=plan.prediction.peak_process_bytes)
            reason = (
                f"no plan keeps the weight error within {timed.max_weight_error:g}: "
                f"the finest that fits has {plan.weight_error:.4f}."
            )
            return Infeasible(plan.prediction.peak_process_bytes, plan.memory_bytes, [remedy], reason)

        finest = replace(timed, max_weight_error=None, objective="quality")
        yield replace(posed, workload=finest), too_coarse


def _first_that_fits(session: Session, group: tuple[Change, ...]) -> list[Remedy]:
    for change in group:
        try:
            _check(change.workload, session.model, change.gpu)
        except RequestError:
            continue
        session.progress(f"trying {change.option}")
        changed = replace(session, gpu=change.gpu)
        if change.workload.activations == "offload" and not _can_be_planned(changed, change.workload):
            continue  # for the host's memory, of which the device's says nothing
        peak = _smallest_process_bytes(changed, change.workload)
        if peak <= problem.budget_bytes(change.gpu, change.workload) + change.gpu.context_bytes:
            return [Remedy(option=change.option, peak_process_bytes=peak)]
    return []


def _can_be_planned(session: Session, workload: Workload) -> bool:
    considered, rank = space(session, workload)
    return _solved(session, session.problem(workload, considered, rank), considered, 0) is not None


def _smallest_process_bytes(session: Session, workload: Workload) -> int:
    """The lowest process peak of all configurations with one strategy, weights too large for the GPU included."""
    least = replace(workload, max_weight_error=None, deadline_hours=None)
    considered, rank = space(session, least)
    smallest_batch = min(cell.micro_batch_size for cell in considered)
    most_chunks = max(cell.loss_chunks for cell in considered)
    considered = tuple(c for c in considered if (c.micro_batch_size, c.loss_chunks) == (smallest_batch, most_chunks))
    allowed = problem.strategies(least, session.gpu)
    lean = [s for s in allowed if s.activations in ("recompute", "offload")] or list(allowed)
    bits = min(problem.BYTES_PER_WEIGHT[s.weight_format] for s in lean)
    lean = [s for s in lean if problem.BYTES_PER_WEIGHT[s.weight_format] == bits]
    posed = session.problem(least, considered, rank, only=lambda strategy: strategy in lean)
    configuration = solver.smallest(posed, considered)
    assert configuration is not None
    return session.trace(configuration).peak_reserved_bytes + session.gpu.context_bytes
