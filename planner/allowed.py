"""What may be chosen for a workload on a GPU: strategies of layers, cells, and how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from typing import get_args

from shallowflow.profiles.specs import GpuSpec, InstanceSpec

from . import schedule
from .plan import Workload
from .strategies import (
    Activations,
    Cell,
    Configuration,
    Method,
    Optimizer,
    Sharding,
    Strategy,
    StrategyRun,
    WeightFormat,
)

LOSS_CHUNKS = (1, 4, 16)
"""Parts that the loss may be computed in."""

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)

ALPHA: dict[Method, int | None] = {"lora": 32, "rslora": 8, "dora": 32, "full": None}
"""The alpha at every rank; of rsLoRA one that scales an adapter of rank 16 as LoRA's does.

With adapters scaled by alpha / rank, one alpha makes the best learning rate nearly the same for all ranks (LoRA Without
Regret, Schulman et al., 2025), so that the rank decides capacity and nothing else.
"""

HEADROOM = 0.06
"""Share of a GPU's memory left free.

Recorded T4 steps with SDPA reserved up to 4.9 % more than is predicted today, and one of only 1.2 GiB 6.7 %: loading
quantized weights leaves gaps between them that differ from run to run (`make accuracy`).
"""

OFFLOAD_SHARE = 0.5
"""Of the host's memory, for activations; loading and the process itself take the rest."""

QUANTIZED: tuple[tuple[WeightFormat, bool], ...] = (("int8", False), ("nf4", False), ("nf4", True))
"""Formats of frozen weights, and whether their constants are quantized, too."""

BYTES_PER_WEIGHT: dict[WeightFormat, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "nf4": 0.5}


def budget_bytes(gpu: GpuSpec, workload: Workload | None = None) -> int:
    """The device's memory less the headroom, or what the workload allows a process, less the CUDA context."""
    headroom, most = HEADROOM, gpu.memory_bytes
    if workload is not None:
        headroom = HEADROOM if workload.headroom is None else workload.headroom
        most = gpu.memory_bytes if workload.max_process_bytes is None else workload.max_process_bytes
    return min(int(gpu.memory_bytes * (1 - headroom)), most) - gpu.context_bytes


def host_bytes(instances: Sequence[InstanceSpec], num_gpus: int) -> int | None:
    """What activations of one GPU may take of the memory of the smallest of *instances* that has *num_gpus*."""
    hosts = [instance.ram_bytes for instance in instances if instance.num_gpus >= num_gpus]
    return int(min(hosts) * OFFLOAD_SHARE) // num_gpus if hosts else None


def unquantized_format(gpu: GpuSpec, method: Method = "lora") -> WeightFormat:
    """How *gpu* stores weights that are not quantized.

    Those that learn are in fp32 everywhere: in 16 bits an update of less than a part in 2048, or 256, would be lost
    (Mixed Precision Training, Micikevicius et al., 2018, section 3.1).
    """
    formats: dict[str, WeightFormat] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return "fp32" if method == "full" else formats[gpu.compute_dtype]


def formats(gpu: GpuSpec, method: Method) -> tuple[tuple[WeightFormat, bool], ...]:
    """Those of weights, and whether they are double-quantized; what is quantized cannot learn."""
    plain = unquantized_format(gpu, method)
    return ((plain, False), *(() if method == "full" else QUANTIZED))


def every_strategy(gpu: GpuSpec, method: Method = "lora") -> tuple[Strategy, ...]:
    """All that can be done to a layer on *gpu*.

    Where host and device are one, nothing is offloaded. Only nf4's weights are reused: int8's are multiplied as they
    are in the forward pass, and made into numbers once, for the backward pass.
    """
    found = [
        Strategy(weight_format=weight_format, activations=policy, double_quantization=twice)
        for (weight_format, twice), policy in product(formats(gpu, method), get_args(Activations))
        if policy != "offload" or gpu.device_type == "cuda"
    ]
    return tuple(strategy for strategy in found if strategy.weight_format == "nf4" or not strategy.reuses_weights)


def strategies(workload: Workload, gpu: GpuSpec) -> tuple[Strategy, ...]:
    """Those that *workload* allows."""
    plain = unquantized_format(gpu, workload.adapter)
    wanted = plain if workload.quantization == "fp16" else workload.quantization
    return tuple(
        strategy
        for strategy in every_strategy(gpu, workload.adapter)
        if wanted in ("any", strategy.weight_format)
        and workload.double_quantization in (None, strategy.double_quantization)
        and workload.activations in (None, strategy.activations)
    )


def stage_counts(workload: Workload, num_layers: int) -> tuple[int, ...]:
    """Into how many pipeline stages, each of a layer or more, a model may be cut for *workload*.

    Each replica has as many micro-batches in a step as stages, or more: fewer would leave some without work.
    """
    wanted = workload.num_stages
    return tuple(
        stages
        for stages in range(1, workload.num_gpus + 1)
        if workload.num_gpus % stages == 0
        and stages <= min(num_layers, most_micro_batches(workload, stages))
        and wanted in (None, stages)
    )


def most_micro_batches(workload: Workload, num_stages: int) -> int:
    """In a step of one replica, if the model is cut into *num_stages*; 0 where replicas cannot share the batch."""
    share, rest = divmod(workload.global_batch_size, workload.num_gpus // num_stages)
    return 0 if rest or share % (workload.micro_batch_size or 1) else share // (workload.micro_batch_size or 1)


def cells(
    workload: Workload,
    gpu: GpuSpec,
    rank: int | None,
    *,
    divisible_loss: bool = True,
    num_stages: int = 1,
    num_parts: int = 1,
) -> tuple[Cell, ...]:
    """Every way to share the weights, to cut a replica's part of the global batch, to compute the loss, and to update.

    There are no fewer micro-batches than stages, of interleaved ones they come in full rounds, and stages share no
    weights.
    """
    share = workload.global_batch_size // (workload.num_gpus // num_stages)
    chunks = [n for n in LOSS_CHUNKS if n == 1 or (divisible_loss and workload.sequence_length % n == 0)]
    if workload.loss_chunks is not None:
        chunks = [workload.loss_chunks]
    return tuple(
        Cell(
            micro_batch_size=n,
            gradient_accumulation_steps=share // n,
            rank=rank,
            loss_chunks=parts,
            optimizer=optimizer,
            sharding=sharding,
        )
        for sharding in (shardings(workload) if num_stages == 1 else ("none",))
        for n in range(1, share + 1)
        if share % n == 0 and _takes(share // n, num_stages, num_parts) and workload.micro_batch_size in (None, n)
        for parts in chunks
        for optimizer in optimizers(workload, gpu)
    )


def _takes(num_micro_batches: int, num_stages: int, num_parts: int) -> bool:
    """Whether stages of so many parts can be given so many micro-batches."""
    return num_micro_batches >= num_stages and (num_parts == 1 or num_micro_batches % num_stages == 0)


def part_counts(workload: Workload, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Into how many parts each of *num_stages* may be divided."""
    found = schedule.parts_per_stage(num_layers, num_stages, most_micro_batches(workload, num_stages))
    return tuple(parts for parts in found if workload.parts_per_stage in (None, parts))


def shardings(workload: Workload) -> tuple[Sharding, ...]:
    """Those that *workload* allows: with one GPU, over a network, and where every weight learns, none."""
    if workload.num_gpus == 1 or workload.adapter == "full" or workload.num_machines > 1:
        return ("none",)
    return SHARDINGS if workload.sharding is None else (workload.sharding,)


def optimizers(workload: Workload, gpu: GpuSpec) -> tuple[Optimizer, ...]:
    """Those that *workload* allows.

    On a CPU 8 bits come only if they are asked for: bitsandbytes' update there takes several times AdamW's, most of it
    for rounding (97 ns a parameter against 13, one core of an AMD EPYC), which no rate of a CPU's profile describes.
    """
    if workload.optimizer is not None:
        return (workload.optimizer,)
    return OPTIMIZERS if gpu.device_type == "cuda" else ("adamw",)


def configured(
    workload: Workload, cell: Cell, layers: Sequence[Strategy], stages: tuple[int, ...] = (0,), num_parts: int = 1
) -> Configuration:
    """*cell* with one strategy for each of the *layers*, cut into *stages* of so many parts."""
    runs: list[StrategyRun] = []
    for strategy, alike in groupby(layers):
        first = runs[-1].last + 1 if runs else 0
        runs.append(StrategyRun(first=first, last=first + len(list(alike)) - 1, strategy=strategy))
    return Configuration(
        layers=tuple(runs),
        rank=cell.rank,
        alpha=ALPHA[workload.adapter],
        sequence_length=workload.sequence_length,
        micro_batch_size=cell.micro_batch_size,
        gradient_accumulation_steps=cell.gradient_accumulation_steps,
        num_gpus=workload.num_gpus,
        loss_chunks=cell.loss_chunks,
        packing=workload.packing is True,
        adapter=workload.adapter,
        optimizer=cell.optimizer,
        target_modules=None if workload.adapter == "full" else workload.target_modules,
        sharding=cell.sharding,
        stages=stages,
        parts_per_stage=num_parts,
    )
