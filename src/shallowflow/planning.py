"""From a request to a plan: facts in, profiles traced or remembered, the search, the money."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from shallowflow.planner import money, problem, solver
from shallowflow.planner.costs import PROFILED_LAYERS, LayerRuns, StepProfile
from shallowflow.planner.plan import FORMAT_VERSION, Candidate, MemoryPart, Plan, SearchRecord, Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.remedies import MOST_REMEDIES, Change, Infeasible, Remedy, changes
from shallowflow.planner.solver import Solution, TracedPeak
from shallowflow.planner.strategies import Configuration, Strategy, uniform
from shallowflow.profiles import FactsError, model_facts
from shallowflow.profiles.load import gpu_names, load_gpu, load_instances, load_model
from shallowflow.profiles.specs import GpuSpec, ModelSpec

Progress = Callable[[str], None]


class RequestError(ValueError):
    """A request that contradicts itself: one line that says what, the value, and what would work."""


@dataclass(frozen=True, slots=True)
class Session:
    """One model on one device: where profiles and traces come from."""

    model: ModelSpec
    gpu: GpuSpec
    progress: Progress = field(default=lambda _message: None)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return model_facts.num_layers(self.model.config)

    def num_parameters(self) -> int:
        """Distinct parameters: as published, or counted once and remembered."""
        if self.model.num_parameters is not None:
            return self.model.num_parameters
        name = cache.key("parameters", {"config": self.model.config})
        known = cache.read_numbers(name)
        if known is None:
            from shallowflow.runtime.build import count_parameters

            known = (count_parameters(self.model.config),)
            cache.write_numbers(name, known)
        return known[0]

    def layer_kinds(self) -> tuple[int, ...]:
        """For each layer, the first one that is like it."""
        name = cache.key("kinds", {"config": self.model.config})
        known = cache.read_numbers(name)
        if known is None:
            from shallowflow.runtime.build import layer_kinds

            known = layer_kinds(self.model.config)
            cache.write_numbers(name, known)
        return known

    def profiles(self, strategy: Strategy, sequence_length: int) -> LayerRuns:
        """The profiles of all layers under *strategy*, in order."""
        return [
            (self.profile(strategy, sequence_length, kind), len(list(alike)))
            for kind, alike in groupby(self.layer_kinds())
        ]

    def profile(self, strategy: Strategy, sequence_length: int, like_layer: int = 0) -> StepProfile:
        """The profile of *strategy* for layers like *like_layer*, from the cache or traced now."""
        facts = {**self._facts(), "strategy": asdict(strategy), "sequence_length": sequence_length, "like": like_layer}
        name = cache.key("profile", facts)
        known = cache.read_profile(name)
        if known is not None:
            return known
        self.progress(f"tracing layers: {strategy}")
        from shallowflow.planner.profiler.kernels import Target
        from shallowflow.planner.profiler.profile import profile_step

        def make(micro_batch_size: int, rank: int) -> Any:
            return self._meta_step(
                Configuration(
                    layers=uniform(strategy, PROFILED_LAYERS),
                    rank=rank,
                    alpha=rank,
                    sequence_length=sequence_length,
                    micro_batch_size=micro_batch_size,
                    gradient_accumulation_steps=2,
                ),
                like_layer,
            )

        with self._tracing():
            made = profile_step(make, Target.of(self.gpu))
        cache.write_profile(name, made)
        return made

    def trace(self, configuration: Configuration) -> TracedPeak:
        """The whole step of *configuration* traced and replayed, or remembered."""
        alone = replace(configuration, num_gpus=1)
        name = cache.key("peak", {**self._facts(), "configuration": asdict(alone)})
        known = cache.read_peak(name)
        if known is None:
            self.progress(f"tracing the whole step: micro-batch {configuration.micro_batch_size}")
            from shallowflow.planner.profiler.kernels import Target
            from shallowflow.planner.profiler.simulate import traced_peak

            with self._tracing():
                known = traced_peak(self._meta_step(alone), Target.of(self.gpu), self.gpu.context_bytes)
            cache.write_peak(name, known)
        return known if configuration.num_gpus == 1 else _with_buckets(known)

    def problem(self, workload: Workload) -> problem.Problem:
        """The search problem of *workload*."""
        outside = model_facts.least_outside_weights(self.model.config)
        strategies = problem.strategies(workload, self.gpu, self.num_parameters(), outside)
        profiles = {s: self.profiles(s, workload.sequence_length) for s in strategies}
        return problem.Problem(workload, self.num_layers, self.gpu, profiles)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        """Turn whatever a model's own code raises on ``meta`` into one line."""
        try:
            yield
        except FactsError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise RequestError(f"the training step of {self.model.name} cannot be traced: {reason}") from error

    def _facts(self) -> dict[str, Any]:
        return {
            "config": self.model.config,
            "device_type": self.gpu.device_type,
            "compute_capability": self.gpu.compute_capability,
            "cublas_workspace_bytes": self.gpu.cublas_workspace_bytes,
            "context_bytes": self.gpu.context_bytes,
        }

    def _meta_step(self, configuration: Configuration, like_layer: int | None = None) -> Any:
        from shallowflow.runtime.simulated import make_meta_step

        micro_batches = min(2, configuration.gradient_accumulation_steps)
        return make_meta_step(self.model.config, configuration, self.gpu.compute_dtype, micro_batches, like_layer)


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
    steps = math.ceil(workload.sequences / best.configuration.global_batch_size)
    hours = steps * best.prediction.step_seconds / 3600
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
        offers=money.offers(load_instances(gpu.name), workload.region, workload.num_gpus, hours),
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


def _with_buckets(peak: TracedPeak) -> TracedPeak:
    """Data parallelism's buckets: each gradient once more, as many bytes as the fp32 adapter has."""
    buckets = sum(part.num_bytes for part in peak.parts if part.category == "adapter")
    return replace(
        peak,
        resident_bytes=peak.resident_bytes + buckets,
        peak_allocated_bytes=peak.peak_allocated_bytes + buckets,
        peak_reserved_bytes=peak.peak_reserved_bytes + buckets,
        parts=(*peak.parts, MemoryPart(category="gradient buckets", num_bytes=buckets)),
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
