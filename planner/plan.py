"""The values that a request, a prediction and a plan are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .bounds import Meta, Number
from .proof import Proof
from .strategies import (
    MOST_SEQUENCES,
    MOST_TOKENS,
    Activations,
    Configuration,
    Method,
    Optimizer,
    Parts,
    Positive,
    Sharding,
    TargetModules,
)
from .weighed import MOST_ERROR, Weighed

FORMAT_VERSION = 3
Quantization = Literal["any", "fp16", "int8", "nf4"]
Objective = Literal["time", "cost", "quality"]
Bytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Usd = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be done, and what the answer may and may not choose.

    Attributes:
        total_tokens: size of the whole work, padding not counted.
        num_sequences: of *sequence_length* tokens, the last padded, where the data is known; None derives it.
        num_packed_sequences: as many as documents of these lengths were packed into, where the data is known.
        window_counts: how many sequences that are not packed have up to 64, 128, ... tokens, where the data is known.
        packing: several documents to a sequence, or one; None lets the planner choose.
        num_eval_sequences: held out, and evaluated before and after training.
        global_batch_size: sequences per optimizer update over all GPUs.
        num_machines: that the GPUs are in, as many in each.
        num_stages: that the model is cut into, each on a GPU of its own; 1 means that each GPU holds the whole model.
        parts_per_stage: into which each stage is divided; see Configuration. None leaves both to the planner.
        rank: LoRA's rank if it is fixed; None lets the planner choose one of at least *min_rank*.
        adapter, target_modules: the kind of LoRA, and what it is on, or ``full``, with which nothing may be said of
            rank and modules; see Configuration.
        quantization: ``fp16`` means not quantized: bf16 where the chip has it, fp32 on a CPU.
        region: where prices are taken from.
        micro_batch_size, loss_chunks, activations, double_quantization, optimizer, sharding: decisions that are fixed;
            None leaves them to the planner.
        max_weight_error: the coarsest that the base weights may become, as a root mean square over layers.
        headroom: the share of the device's memory that stays free; None for the planner's own.
        max_process_bytes: what the process may take.
        deadline_hours, budget_usd: for the whole run on the wall.
    """

    sequence_length: Annotated[int, Meta(ge=2, le=MOST_TOKENS)] = 2048
    total_tokens: Positive = 10_000_000
    num_sequences: Positive | None = None
    num_packed_sequences: Positive | None = None
    window_counts: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    num_eval_sequences: Annotated[int, Meta(ge=0)] = 0
    global_batch_size: Annotated[int, Meta(ge=1, le=MOST_SEQUENCES)] = 16
    num_gpus: Number = 1
    num_machines: Number = 1
    num_stages: Number | None = None
    parts_per_stage: Parts | None = None
    rank: Positive | None = None
    min_rank: Positive = 16
    adapter: Method = "lora"
    target_modules: TargetModules = "all-linear"
    quantization: Quantization = "any"
    objective: Objective = "time"
    region: str = "us-east-1"
    micro_batch_size: Positive | None = None
    loss_chunks: Positive | None = None
    activations: Activations | None = None
    double_quantization: bool | None = None
    packing: bool | None = None
    optimizer: Optimizer | None = None
    sharding: Sharding | None = None
    max_weight_error: Annotated[float, Meta(ge=0, le=MOST_ERROR)] | None = None
    headroom: Annotated[float, Meta(ge=0, lt=1)] | None = None
    max_process_bytes: Positive | None = None
    deadline_hours: Annotated[float, Meta(gt=0)] | None = None
    budget_usd: Annotated[float, Meta(gt=0)] | None = None

    @property
    def gpus_per_machine(self) -> int:
        """In each of the machines."""
        return self.num_gpus // self.num_machines

    def sequences(self, *, packing: bool) -> int:
        """Sequences in the whole work; where the data is not known, as many as its tokens would fill."""
        known = self.num_packed_sequences if packing else self.num_sequences
        return known or -(-self.total_tokens // self.sequence_length)

    def padding_share(self, *, packing: bool) -> float:
        """Positions that hold no token."""
        return max(0.0, 1 - self.total_tokens / (self.sequences(packing=packing) * self.sequence_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What one stage of a model takes on each GPU that holds it; see Prediction."""

    resident_bytes: Bytes
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_process_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a configuration is expected to take, on the GPU that takes the most of each.

    Attributes:
        resident_bytes: allocated between steps: weights, adapter, optimizer state.
        peak_allocated_bytes: most bytes in live tensors at once, in the allocator's blocks.
        peak_reserved_bytes: most bytes that the caching allocator holds.
        peak_process_bytes: reserved plus the CUDA context.
        step_seconds: one optimizer update with all its micro-batches.
        communication_seconds: the part of it that waits for other GPUs.
        tokens_per_second: over all GPUs.
        traced: True if the whole step was traced and replayed through the allocator; False if it was
            composed from a profile of single layers.
        stages: each stage's memory, where the model is cut.
    """

    resident_bytes: Bytes
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_process_bytes: Bytes
    step_seconds: Seconds
    communication_seconds: Seconds
    tokens_per_second: Seconds
    traced: bool
    stages: tuple[StageMemory, ...] = ()


Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePart:
    """One kind of operator's share of a step on the device.

    Attributes:
        roofline_share: the part of it that arithmetic and bytes take at the chip's sustained rates; the rest are gaps
            between kernels.
    """

    kind: str
    seconds: Seconds
    roofline_share: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """What each of the layers *first* to *last* takes in one micro-batch, on the device."""

    first: Annotated[int, Meta(ge=0)]
    last: Annotated[int, Meta(ge=0)]
    forward_seconds: Seconds
    backward_seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Where one step's time goes.

    Attributes:
        bound: what a micro-batch waits for: the device that computes, or the host that launches.
        device_seconds, host_seconds: what each alone would take; the step takes the longer, and *waiting_seconds* for
            other GPUs.
        kinds: sum to *device_seconds*, most first.
        update_seconds: the optimizer's part of the step.
    """

    bound: Literal["device", "host"]
    device_seconds: Seconds
    host_seconds: Seconds
    waiting_seconds: Seconds
    kinds: tuple[TimePart, ...]
    layers: tuple[LayerTime, ...]
    update_seconds: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WallTime:
    """What a whole run takes on the wall; a machine's set-up, downloads and interruptions are left out."""

    start_seconds: Seconds
    load_seconds: Seconds
    tokenize_seconds: Seconds
    training_seconds: Seconds
    evaluation_seconds: Seconds
    save_seconds: Seconds

    @property
    def total_seconds(self) -> float:
        """All of it."""
        beside = self.start_seconds + self.load_seconds + self.tokenize_seconds + self.evaluation_seconds
        return beside + self.training_seconds + self.save_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """One category's share of the process's memory at the peak."""

    category: str
    num_bytes: Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration with its prediction and its quality.

    Attributes:
        weight_error: relative error of the stored base weights, as a root mean square over layers.
    """

    configuration: Configuration
    prediction: Prediction
    weight_error: Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the work costs on one instance type in one region.

    Attributes:
        num_instances: of them at once; dollars are for all, dollars an hour for one.
        hours: on the wall, with this instance's disk; without set-up and interruptions.
        price_date, price_source: of the prices.
    """

    instance: str
    region: str
    hours: Seconds
    on_demand_usd_per_hour: Usd
    on_demand_usd: Usd
    spot_usd_per_hour: Usd | None
    spot_usd: Usd | None
    price_date: str
    price_source: str
    num_instances: Positive = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What the limits cost, by the prices of the problem without whole numbers.

    Attributes:
        binding: the part of the step whose memory is the bound, or ``nothing``.
        seconds_per_100_mib: by how much a step would be faster with so much more memory.
        next_rank, next_rank_seconds: the next larger rank, and a step with it; None where the rank is fixed.
    """

    binding: str
    seconds_per_100_mib: Seconds
    next_rank: Positive | None
    next_rank_seconds: Seconds | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """What was searched, so that "best" can be read for what it is.

    Attributes:
        num_strategies: that a layer may be given.
        num_cells: combinations of the decisions that hold for all layers.
        num_nodes: parts that the cells were divided into.
        num_traced: configurations that were traced whole, the chosen one and the alternatives included.
        num_rejected: those that seemed to fit, and did not when traced whole.
        best_uniform_seconds: a step of the best configuration with one strategy for all layers; None if none fits.
    """

    num_strategies: Annotated[int, Meta(ge=0)]
    num_cells: Annotated[int, Meta(ge=0)]
    num_nodes: Annotated[int, Meta(ge=0)]
    num_traced: Annotated[int, Meta(ge=0)]
    num_rejected: Annotated[int, Meta(ge=0)]
    best_uniform_seconds: Seconds | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train one model on one kind of GPU, with the prediction and what it was made from.

    Attributes:
        model_config: the facts of the model's ``config.json``.
        compute_dtype: of matrix products, and, unless every weight learns, of activations and of weights that are not
            quantized.
        attention: ``SDPA``, or ``eager`` where the model's code has nothing leaner.
        memory_bytes: the device's.
        budget_bytes: what the allocator may reserve: the memory less context and headroom.
        memory: the process's memory at its peak, by category; sums to ``prediction.peak_process_bytes``.
        time: one step's, taken apart.
        wall: the whole run's, on a disk of usual speed.
        alternatives: other good configurations that fit, best first.
        versions: of the software that the step was traced with.
        weighed: what formats do to the model's own weights, where that was measured; else *weight_error* is what they
            do to normally distributed ones.
    """

    format_version: int
    model_name: str
    model_config: dict[str, Any]
    num_parameters: Positive
    gpu: str
    compute_dtype: Literal["float16", "bfloat16", "float32"]
    attention: str
    memory_bytes: Bytes
    budget_bytes: Bytes
    workload: Workload
    configuration: Configuration
    prediction: Prediction
    weight_error: Annotated[float, Meta(ge=0)]
    memory: tuple[MemoryPart, ...]
    time: StepTime
    wall: WallTime
    offers: tuple[Offer, ...]
    alternatives: tuple[Candidate, ...]
    search: SearchRecord
    sensitivity: Sensitivity
    proof: Proof
    notes: tuple[str, ...]
    versions: dict[str, str]
    weighed: Weighed | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer updates for the whole work."""
        chosen = self.configuration
        return -(-self.workload.sequences(packing=chosen.packing) // chosen.global_batch_size)

    @property
    def mean_step_seconds(self) -> float:
        """A step of the work: shorter than one of full sequences where micro-batches are trimmed to their longest."""
        return self.wall.training_seconds / self.num_steps

    def _repr_html_(self) -> str:
        """What a notebook shows: the whole plan, as the command line shows it."""
        from . import notebook, render

        return notebook.html(render.plan(self))
