"""The search space: which configurations there are, and what each is predicted to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shallowflow.profiles.specs import GpuSpec

from . import communication, costs, latency, quality
from .costs import LayerRuns
from .plan import Candidate, Prediction, Workload
from .strategies import Activations, Configuration, Strategy, WeightFormat, uniform

RANKS = (8, 16, 32, 64, 128)
"""LoRA ranks to choose from where none is fixed."""

HEADROOM = 0.06
"""Share of a GPU's memory left free.

Recorded T4 steps with SDPA reserved up to 4.9 % more than is predicted today, and one of only 1.2 GiB 6.7 %: loading
quantized weights leaves gaps between them that differ from run to run (`make accuracy`).
"""

BYTES_PER_WEIGHT: dict[WeightFormat, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "nf4": 0.5}


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, a device and a workload, with profiles of every strategy that is worth considering.

    Attributes:
        profiles: of each strategy, the layers' profiles in the model's order.
        reserved_per_allocated: what the caching allocator reserves per allocated byte, for whoever was not traced.
    """

    workload: Workload
    num_layers: int
    gpu: GpuSpec
    profiles: Mapping[Strategy, LayerRuns]
    reserved_per_allocated: float = 1.0

    @property
    def budget_bytes(self) -> int:
        """What the allocator may reserve."""
        return budget_bytes(self.gpu)


def budget_bytes(gpu: GpuSpec) -> int:
    """The device's memory less the CUDA context and the headroom."""
    return int(gpu.memory_bytes * (1 - HEADROOM)) - gpu.context_bytes


def unquantized_format(gpu: GpuSpec) -> WeightFormat:
    """How *gpu* stores weights that are not quantized."""
    formats: dict[str, WeightFormat] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return formats[gpu.compute_dtype]


def strategies(workload: Workload, gpu: GpuSpec, num_parameters: int, num_outside: int) -> tuple[Strategy, ...]:
    """The strategies allowed, less those whose weights alone exceed the budget.

    Of *num_parameters*, at least *num_outside* lie outside the decoder layers and are never quantized, which bounds
    the weights from below.
    """
    plain = unquantized_format(gpu)
    if workload.quantization == "any":
        formats: tuple[WeightFormat, ...] = (plain, "int8", "nf4")
    else:
        formats = (plain if workload.quantization == "fp16" else workload.quantization,)
    activations: tuple[Activations, ...] = ("save", "recompute")
    budget = budget_bytes(gpu)
    inside = num_parameters - num_outside
    outside_bytes = num_outside * BYTES_PER_WEIGHT[plain]
    return tuple(
        Strategy(weight_format=weight_format, activations=policy)
        for weight_format in formats
        if inside * BYTES_PER_WEIGHT[weight_format] + outside_bytes <= budget
        for policy in activations
    )


def configurations(workload: Workload, num_layers: int, strategy: Strategy) -> Iterator[Configuration]:
    """Every rank and micro-batch under *strategy*; the micro-batch divides each GPU's share of the global batch."""
    ranks = [workload.rank] if workload.rank else [r for r in RANKS if r >= workload.min_rank] or [workload.min_rank]
    share = workload.global_batch_size // workload.num_gpus
    for rank in ranks:
        for micro_batch_size in (n for n in range(1, share + 1) if share % n == 0):
            yield Configuration(
                layers=uniform(strategy, num_layers),
                rank=rank,
                alpha=2 * rank,
                sequence_length=workload.sequence_length,
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=share // micro_batch_size,
                num_gpus=workload.num_gpus,
            )


def candidates(problem: Problem) -> list[Candidate]:
    """Every configuration of *problem* with its prediction, composed from the profiles."""
    return [
        Candidate(
            configuration=configuration,
            prediction=predict(problem, strategy, configuration),
            weight_error=quality.WEIGHT_ERROR[strategy.weight_format],
        )
        for strategy in problem.profiles
        for configuration in configurations(problem.workload, problem.num_layers, strategy)
    ]


def predict(problem: Problem, strategy: Strategy, configuration: Configuration) -> Prediction:
    """The prediction for one uniform *configuration*."""
    runs = problem.profiles[strategy]
    micro_batch_size, rank = configuration.micro_batch_size, configuration.rank
    gpu, num_gpus = problem.gpu, configuration.num_gpus
    accumulation = configuration.gradient_accumulation_steps
    footprint = costs.footprint(runs, micro_batch_size, rank, accumulates=accumulation > 1)
    gradient_bytes = sum(costs.gradient_bytes(profile, count, rank) for profile, count in runs)
    buckets = gradient_bytes if num_gpus > 1 else 0
    allocated = footprint.peak_allocated_bytes + buckets
    reserved = int(allocated * problem.reserved_per_allocated)
    compute = latency.step_seconds(runs, micro_batch_size, rank, gpu).step(accumulation)
    waiting = communication.all_reduce_seconds(gradient_bytes, num_gpus, communication.pcie(gpu.pcie_bytes_per_second))
    tokens = configuration.global_batch_size * configuration.sequence_length
    return Prediction(
        resident_bytes=footprint.resident_bytes + buckets,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        peak_process_bytes=reserved + gpu.context_bytes,
        step_seconds=compute + waiting,
        communication_seconds=waiting,
        tokens_per_second=tokens / (compute + waiting),
        traced=False,
    )
