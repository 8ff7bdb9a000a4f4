"""Nothing fits: say by how much, and which single change was computed to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shallowflow.profiles.specs import GpuSpec

from .plan import Workload

SMALLEST_SEQUENCE = 64
SMALLEST_RANK = 8
MOST_REMEDIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change to the request under which a whole traced step fits."""

    option: str
    peak_process_bytes: int


class Infeasible(Exception):
    """No configuration fits.

    Attributes:
        smallest_bytes: the lowest process peak among all configurations, headroom included.
        memory_bytes: the device's.
        reason: what it is that does not fit, where it is not plainly the device's memory.
        is_memory: whether it is that memory all the same, of which a share was to stay free.
    """

    def __init__(
        self,
        smallest_bytes: int,
        memory_bytes: int,
        remedies: Sequence[Remedy],
        reason: str = "",
        *,
        is_memory: bool = False,
    ) -> None:
        self.reason = reason
        self.is_memory = is_memory or not reason
        self.smallest_bytes = smallest_bytes
        self.memory_bytes = memory_bytes
        self.remedies = tuple(remedies)
        super().__init__(str(self))

    def as_dict(self) -> dict[str, Any]:
        """The refusal for JSON."""
        return {
            "error": "infeasible",
            "reason": self.reason or "memory",
            "smallest_bytes": self.smallest_bytes,
            "memory_bytes": self.memory_bytes,
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }

    def __str__(self) -> str:
        smallest, memory = self.smallest_bytes / 2**30, self.memory_bytes / 2**30
        lines = [
            f"no plan fits in {memory:.2f} GiB: the smallest needs {smallest:.2f} GiB, "
            f"{smallest - memory:.2f} GiB too much."
        ]
        if self.reason:
            lines = [self.reason]
        if self.remedies:
            width = max(len(remedy.option) for remedy in self.remedies)
            lines.append("This would fit:")
            lines += [f"  {r.option:<{width}}   ({r.peak_process_bytes / 2**30:.2f} GiB)" for r in self.remedies]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Change:
    """A request changed in one way, mildest change first in every list of them."""

    option: str
    workload: Workload
    gpu: GpuSpec


def changes(
    workload: Workload, gpu: GpuSpec, gpus: Sequence[GpuSpec], counts: Sequence[int] = ()
) -> Iterator[tuple[Change, ...]]:
    """Groups of changes to try; within a group the first that fits is enough. More GPUs are as many as *counts* say."""
    if workload.optimizer == "adamw":
        yield (Change("--optimizer adamw8bit", replace(workload, optimizer="adamw8bit"), gpu),)
    is_full = workload.adapter == "full"
    if workload.quantization != "any" and not is_full:
        yield (Change("--quantization any", replace(workload, quantization="any"), gpu),)
    if is_full:
        yield (Change("--adapter lora", replace(workload, adapter="lora"), gpu),)
    elif workload.rank is not None and workload.rank > SMALLEST_RANK:
        yield (Change(f"--rank {SMALLEST_RANK}", replace(workload, rank=SMALLEST_RANK), gpu),)
    elif workload.rank is None and workload.min_rank > SMALLEST_RANK:
        yield (Change(f"--min-rank {SMALLEST_RANK}", replace(workload, min_rank=SMALLEST_RANK), gpu),)
    if workload.sharding == "none" and workload.num_gpus > 1:
        yield (Change("--sharding weights", replace(workload, sharding="weights"), gpu),)
    free = replace(
        workload,
        micro_batch_size=None,
        loss_chunks=None,
        activations=None,
        double_quantization=None,
        packing=None,
        parts_per_stage=None,
    )
    if free != workload:
        yield (Change("the same without --fix", free, gpu),)
    shorter: list[Change] = []
    length = workload.sequence_length // 2
    while length >= SMALLEST_SEQUENCE:
        shorter.append(Change(f"--sequence-length {length}", of_length(workload, length), gpu))
        length //= 2
    yield tuple(shorter)
    larger = sorted(
        (g for g in gpus if g.device_type == "cuda" and g.memory_bytes > gpu.memory_bytes),
        key=lambda g: (g.memory_bytes, g.name),
    )
    yield tuple(Change(f"--gpu {g.name}", workload, g) for g in larger)
    yield tuple(_spread(workload, number, gpu) for number in counts)


def _spread(workload: Workload, num_gpus: int, gpu: GpuSpec) -> Change:
    """*workload* on more GPUs; where its stages are fixed, in as many times more of them."""
    if workload.num_stages in (None, 1):
        return Change(f"--gpus {num_gpus}", replace(workload, num_gpus=num_gpus), gpu)
    stages = (workload.num_stages or 1) * num_gpus // workload.num_gpus
    changed = replace(workload, num_gpus=num_gpus, num_stages=stages)
    return Change(f"--gpus {num_gpus} --stages {stages}", changed, gpu)


def of_length(workload: Workload, sequence_length: int) -> Workload:
    """The same work in sequences of another length; how many its documents make is then not known."""
    if sequence_length == workload.sequence_length:
        return workload
    return replace(
        workload, sequence_length=sequence_length, num_sequences=None, num_packed_sequences=None, window_counts=()
    )
