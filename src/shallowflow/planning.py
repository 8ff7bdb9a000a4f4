"""From a request to a plan: facts in, profiles traced or remembered, the search, the money."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shallowflow.planner import breakdown, costs, money, problem, solver, wall_time
from shallowflow.planner.costs import LayerRuns
from shallowflow.planner.plan import FORMAT_VERSION, Candidate, Plan, SearchRecord, WallTime, Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.remedies import MOST_REMEDIES, Change, Infeasible, Remedy, changes
from shallowflow.planner.solver import Solution
from shallowflow.profiles import model_facts
from shallowflow.profiles.load import gpu_names, load_gpu, load_instances, load_model
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.session import Progress, RequestError, Session

LEAST_PADDING_SHOWN = 0.02


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
    try:
        wanted = msgspec.convert(workload, type=Workload, strict=True)
    except msgspec.ValidationError as error:
        raise RequestError(f"bad workload: {error}") from None
    unknown = sorted(set(workload) - set(Workload.__dataclass_fields__))
    if unknown:
        raise RequestError(f"unknown workload {unknown[0]!r}; there are {', '.join(Workload.__dataclass_fields__)}")
    return make_plan(load_model(str(model)), load_gpu(gpu), wanted, progress=progress)


def make_plan(
    model: ModelSpec,
    gpu: GpuSpec,
    workload: Workload,
    *,
    progress: Progress = lambda _message: None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The best plan for *workload* among all uniform configurations; *notes* are carried along.

    Raises:
        RequestError: the workload contradicts itself or the model.
        Infeasible: nothing fits; carries remedies that do.
    """
    _check(workload, model, gpu)
    session = Session(model, gpu, progress)
    posed = session.problem(workload)
    solution = solver.solve(posed, session.trace) if posed.profiles else None
    if solution is None:
        raise _infeasible(session, workload)
    return _plan(session, workload, solution, notes)


def _check(workload: Workload, model: ModelSpec, gpu: GpuSpec) -> None:
    if workload.global_batch_size % workload.num_gpus:
        raise RequestError(
            f"a global batch of {workload.global_batch_size} sequences does not divide over {workload.num_gpus} GPUs; "
            f"try --global-batch-size {math.ceil(workload.global_batch_size / workload.num_gpus) * workload.num_gpus}"
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


def _plan(session: Session, workload: Workload, solution: Solution, notes: tuple[str, ...]) -> Plan:
    best, gpu = solution.best, session.gpu
    configuration = best.configuration
    runs = session.profiles(configuration.layers[0].strategy, workload.sequence_length)

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
        budget_bytes=problem.budget_bytes(gpu),
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
            method="exhaustive over uniform configurations",
            num_candidates=solution.num_candidates,
            num_fitting=solution.num_fitting,
            num_traced=solution.num_traced,
            num_rejected=solution.num_rejected,
        ),
        notes=(*notes, *_notes(session, workload, (best, *solution.alternatives))),
        versions=cache.versions(),
    )


def _wall_time(
    session: Session, workload: Workload, chosen: Candidate, runs: LayerRuns, disk_bytes_per_second: float
) -> WallTime:
    configuration, gpu = chosen.configuration, session.gpu
    micro_batch_size, rank = configuration.micro_batch_size, configuration.rank
    steps = math.ceil(workload.sequences / configuration.global_batch_size)
    evaluated = wall_time.NUM_EVALUATIONS * math.ceil(workload.num_eval_sequences / micro_batch_size)
    return wall_time.wall_time(
        num_parameters=session.num_parameters(),
        total_tokens=workload.total_tokens,
        training_seconds=steps * chosen.prediction.step_seconds,
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
    if workload.padding_share >= LEAST_PADDING_SHOWN:
        notes.append(
            f"{workload.padding_share:.0%} of the positions are padding, as documents are not packed: packed, they "
            f"would fill {workload.packed_sequences:,} of the {workload.sequences:,} sequences."
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


def _infeasible(session: Session, workload: Workload) -> Infeasible:
    """The refusal, with the smallest peak traced whole and remedies that each fit when traced whole."""
    gpu = session.gpu
    peak = _smallest_process_bytes(session, workload)
    remedies: list[Remedy] = []
    for group in changes(workload, gpu, [load_gpu(name) for name in gpu_names()]):
        remedies += _first_that_fits(session, group)
        if len(remedies) == MOST_REMEDIES:
            break
    needed = math.ceil(peak / (1 - problem.HEADROOM))  # the memory of which headroom leaves the peak
    return Infeasible(needed, gpu.memory_bytes, remedies)


def _first_that_fits(session: Session, group: tuple[Change, ...]) -> list[Remedy]:
    for change in group:
        try:
            _check(change.workload, session.model, change.gpu)
        except RequestError:
            continue
        session.progress(f"trying {change.option}")
        changed = replace(session, gpu=change.gpu)
        peak = _smallest_process_bytes(changed, change.workload)
        if peak <= problem.budget_bytes(change.gpu) + change.gpu.context_bytes:
            return [Remedy(option=change.option, peak_process_bytes=peak)]
    return []


def _smallest_process_bytes(session: Session, workload: Workload) -> int:
    """The lowest process peak over all strategies, weights too large for the GPU included, traced whole."""
    roomy = replace(session.gpu, memory_bytes=2**62)
    strategies = [s for s in problem.strategies(workload, roomy, 0, 0) if s.activations == "recompute"]
    profiles = {s: session.profiles(s, workload.sequence_length) for s in strategies}
    candidate = solver.smallest(problem.Problem(workload, session.num_layers, session.gpu, profiles))
    assert candidate is not None
    return session.trace(candidate.configuration).peak_reserved_bytes + session.gpu.context_bytes
