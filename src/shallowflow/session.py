"""One model on one device: where profiles and traces come from, and what is remembered of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shallowflow.planner import allowed, costs, machines, problem, quality, solver
from shallowflow.planner.costs import PROFILED_LAYERS, StepProfile
from shallowflow.planner.memory_record import TracedPeak
from shallowflow.planner.plan import Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.solver import Solution
from shallowflow.planner.strategies import (
    PARTIAL,
    Cell,
    Configuration,
    Method,
    Optimizer,
    Sharding,
    Strategy,
    TargetModules,
    traced_micro_batches,
    uniform,
)
from shallowflow.planner.weighed import Weighed
from shallowflow.profiles import FactsError, model_facts
from shallowflow.profiles.load import load_instances
from shallowflow.profiles.specs import GpuSpec, ModelSpec

Progress = Callable[[str], None]
_Profiles = dict[tuple[Strategy, int], StepProfile]
"""Of layers of each kind under each strategy."""

FP32_BYTES = 4
UPDATED_LENGTH = 32
"""Of the sequences before an update, which knows nothing of them."""


class RequestError(ValueError):
    """A request that contradicts itself: one line that says what, the value, and what would work."""


@dataclass(frozen=True, slots=True)
class Session:
    """One model, of which an adapter of one kind or every weight learns, on one device: where profiles come from."""

    model: ModelSpec
    gpu: GpuSpec
    progress: Progress = field(default=lambda _message: None)
    adapter: Method = "lora"
    target_modules: TargetModules = "all-linear"

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

    def weighed(self) -> Weighed | None:
        """What formats do to the model's own weights, where `sfplan weigh` measured it, and they may be quantized."""
        if self.adapter == "full":
            return None
        from shallowflow.runtime.weighed import recorded

        found = recorded(self.model)
        return found if found is not None and len(found.layers) == self.num_layers else None

    def profile(
        self,
        strategy: Strategy,
        sequence_length: int,
        like_layer: int = 0,
        loss_chunks: int = 1,
        *,
        packing: bool = False,
        shared_by: int = 1,
    ) -> StepProfile:
        """The profile of *strategy* for layers like *like_layer*, from the cache or traced now.

        Of so many GPUs as the weights are *shared_by* it is one's.
        """
        facts = {**self._facts(), **self._adapter_facts(), "strategy": asdict(strategy), "like": like_layer}
        facts["sequence_length"] = sequence_length
        if loss_chunks > 1:
            facts["loss_chunks"] = loss_chunks
        if packing:
            facts["packing"] = packing
        if shared_by > 1:
            facts["shared_by"] = shared_by
        name = cache.key("profile", facts)
        known = cache.read_profile(name)
        if known is not None:
            return known
        self.progress(f"tracing layers: {strategy}")
        from shallowflow.planner.profiler.kernels import Target
        from shallowflow.planner.profiler.profile import profile_full_step, profile_step

        whole = replace(self._cut(strategy, sequence_length), loss_chunks=loss_chunks, packing=packing)
        if shared_by > 1:
            whole = replace(whole, num_gpus=shared_by, sharding="weights")

        def make(micro_batch_size: int, rank: int | None = None) -> Any:
            step = self._meta_step(replace(whole, micro_batch_size=micro_batch_size, rank=rank), like_layer)
            step.update_alone()
            return step

        with self._tracing():
            profiled: Any = profile_full_step if self.adapter == "full" else profile_step
            made: StepProfile = profiled(make, Target.of(self.gpu))
        cache.write_profile(name, made)
        return made

    def update(self, optimizer: Optimizer, rank: int | None, like_layer: int = 0) -> StepProfile:
        """A profile of what *optimizer* does and keeps for an adapter of *rank*, which depends on nothing else.

        Where every weight learns, also those outside of the layers do, and a model of one more layer tells how much.
        """
        asked = {"optimizer": optimizer, "rank": rank, "like": like_layer}
        name = cache.key("update", {**self._facts(), **self._adapter_facts(), **asked})
        known = cache.read_profile(name)
        if known is not None:
            return known
        self.progress(f"tracing the optimizer: {optimizer}")
        from shallowflow.planner.profiler.kernels import Target
        from shallowflow.planner.profiler.profile import profile_update

        plain = Strategy(weight_format=allowed.unquantized_format(self.gpu, self.adapter), activations="save")
        configuration = replace(self._cut(plain, UPDATED_LENGTH), rank=rank, optimizer=optimizer)
        with self._tracing():
            made = profile_update(self._meta_step(configuration, like_layer), Target.of(self.gpu))
            if self.adapter == "full":
                deeper = replace(configuration, layers=uniform(plain, PROFILED_LAYERS + 1))
                made = costs.with_deeper(made, profile_update(self._meta_step(deeper, like_layer), Target.of(self.gpu)))
        cache.write_profile(name, made)
        return made

    def trace(self, configuration: Configuration) -> TracedPeak:
        """The whole step of *configuration* traced and replayed, or remembered."""
        alike = configuration
        if configuration.sharding == "none":  # one sends nothing, any others as much
            alike = replace(configuration, num_gpus=min(configuration.num_gpus, 2))
        name = cache.key("peak", {**self._facts(), "configuration": asdict(alike)})
        known = cache.read_peak(name)
        if known is None:
            self.progress(f"tracing the whole step: micro-batch {configuration.micro_batch_size}")
            from shallowflow.planner.profiler.kernels import Target
            from shallowflow.planner.profiler.simulate import traced_peak

            with self._tracing():
                known = traced_peak(self._meta_step(alike), Target.of(self.gpu), self.gpu.context_bytes)
            cache.write_peak(name, known)
        return known

    def trace_stage(self, configuration: Configuration, stage: int) -> TracedPeak:
        """One *stage* of *configuration* traced and replayed, or remembered.

        It depends on its own layers, on whether it is the first or the last, and on how many micro-batches are in
        flight.
        """
        layers, strategies = configuration.layers_of(stage), configuration.strategies()
        alike = replace(
            configuration,
            layers=(),
            stages=(0,),
            num_gpus=min(configuration.num_replicas, 2),
            gradient_accumulation_steps=traced_micro_batches(configuration, stage),
        )
        place = {
            "strategies": [asdict(strategies[number]) for number in layers],
            "kinds": [self.layer_kinds()[number] for number in layers],
            "is_first": stage == 0,
            "behind": configuration.num_stages - stage,
            "stages": configuration.num_stages if configuration.parts_per_stage > 1 else None,
            "accumulates": configuration.gradient_accumulation_steps,
        }
        name = cache.key("stage", {**self._facts(), "configuration": asdict(alike), "place": place})
        known = cache.read_peak(name)
        if known is None:
            self.progress(f"tracing stage {stage + 1} of {configuration.num_stages}")
            from shallowflow.planner.profiler.kernels import Target
            from shallowflow.planner.profiler.simulate import traced_peak
            from shallowflow.runtime.simulated import make_stage_step

            with self._tracing():
                step = make_stage_step(self.model.config, configuration, self.gpu.compute_dtype, stage)
                known = traced_peak(step, Target.of(self.gpu), self.gpu.context_bytes)
            cache.write_peak(name, known)
        return known

    def solve(
        self, posed: problem.Problem, considered: tuple[Cell, ...], num_alternatives: int = solver.NUM_ALTERNATIVES
    ) -> Solution | None:
        """The best of *posed* in the cells *considered*, its steps traced here; None where nothing fits."""
        if not posed.strategies:
            return None
        return solver.solve(posed, considered, self.trace, num_alternatives)

    def problem(
        self,
        workload: Workload,
        considered: tuple[Cell, ...],
        rank: int | None,
        only: Callable[[Strategy], bool] = lambda _strategy: True,
    ) -> problem.Problem:
        """The search problem of *workload* with an adapter of *rank*, in the cells *considered*, over *only* some."""
        kinds = self.layer_kinds()
        wanted = list(filter(only, allowed.strategies(workload, self.gpu)))
        length, packing = workload.sequence_length, workload.packing is True
        found: dict[Sharding, tuple[_Profiles, dict[int, StepProfile]]] = {"none": ({}, {}), "weights": ({}, {})}
        for sharding in {cell.sharding for cell in considered}:
            shared_by = workload.num_gpus if sharding == "weights" else 1
            profiles = self._profiles(wanted, length, packing, shared_by)
            last = next((strategy for strategy, kind in profiles if kind == kinds[-1]), None)
            heads: dict[int, StepProfile] = {}
            for chunks in {cell.loss_chunks for cell in considered}:
                if last is not None:
                    heads[chunks] = self.profile(last, length, kinds[-1], chunks, packing=packing, shared_by=shared_by)
            found[sharding] = profiles, heads
        own = self.weighed()
        return problem.Problem(
            workload,
            self.gpu,
            kinds,
            *found["none"],
            rank,
            self._host_bytes(workload),
            link=machines.link(self.gpu, load_instances(self.gpu.name), workload.num_gpus, workload.num_machines),
            updates=self._updates(considered, rank) if any(profiles for profiles, _ in found.values()) else {},
            weighed=() if own is None else own.layers,
            sharded=found["weights"][0],
            sharded_heads=found["weights"][1],
        )

    def _updates(
        self, considered: tuple[Cell, ...], rank: int | None
    ) -> dict[tuple[Optimizer, int | None, int], StepProfile]:
        """Of every optimizer but an adapter's AdamW, whose update is in every profile, at *rank* and at the next."""
        wider = None if rank is None else quality.next_rank(rank)
        ranks = [rank] if wider is None else [rank, wider]
        known = set() if rank is None else {"adamw"}
        return {
            (optimizer, adapted, kind): self.update(optimizer, adapted, kind)
            for optimizer in sorted({cell.optimizer for cell in considered} - known)
            for adapted in ranks
            for kind in sorted(set(self.layer_kinds()))
        }

    def _profiles(self, wanted: Sequence[Strategy], sequence_length: int, packing: bool, shared_by: int) -> _Profiles:
        """Of each kind of layer under each of *wanted*, but for those that the model's code does not allow."""
        found: _Profiles = {}
        refusal: RequestError | None = None
        for strategy in wanted:
            for kind in sorted(set(self.layer_kinds())):
                try:
                    found[strategy, kind] = self.profile(
                        strategy, sequence_length, kind, packing=packing, shared_by=shared_by
                    )
                except RequestError as error:
                    if strategy.activations not in PARTIAL:
                        raise
                    refusal = error
        if wanted and not found:
            assert refusal is not None
            raise refusal
        return found

    def adapter_parameters(self, sequence_length: int, *, packing: bool = False) -> tuple[int, int]:
        """How many parameters the adapter has at any rank, and how many more for each unit of its rank."""
        plain = Strategy(weight_format=allowed.unquantized_format(self.gpu), activations="save")
        per_layer = {
            kind: self.profile(plain, sequence_length, kind, packing=packing).gradients.sum(axis=0) // FP32_BYTES
            for kind in set(self.layer_kinds())
        }
        at_any, _, per_rank, _ = sum(per_layer[kind] for kind in self.layer_kinds())
        return int(at_any), int(per_rank)

    def _host_bytes(self, workload: Workload) -> int | None:
        """What activations may take of the memory of the smallest machine that has the GPUs."""
        return allowed.host_bytes(load_instances(self.gpu.name), workload.gpus_per_machine)

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

    def _adapter_facts(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "target_modules": None if self.adapter == "full" else self.target_modules}

    def _cut(self, strategy: Strategy, sequence_length: int) -> Configuration:
        """A model of few layers, all under *strategy*, in two micro-batches."""
        return Configuration(
            layers=uniform(strategy, PROFILED_LAYERS),
            rank=None if self.adapter == "full" else 1,
            alpha=None if self.adapter == "full" else 1,
            sequence_length=sequence_length,
            micro_batch_size=1,
            gradient_accumulation_steps=2,
            adapter=self.adapter,
            target_modules=None if self.adapter == "full" else self.target_modules,
        )

    def _meta_step(self, configuration: Configuration, like_layer: int | None = None) -> Any:
        from shallowflow.runtime.simulated import make_meta_step

        micro_batches = min(2, configuration.gradient_accumulation_steps)
        return make_meta_step(self.model.config, configuration, self.gpu.compute_dtype, micro_batches, like_layer)
