"""What GPUs say to each other and to their host, and how long it takes: formulas over a link's rate and latency.

Latency is per message; contention between links, and a switch's topology, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The slowest hop between neighbours.

    Attributes:
        bytes_per_second: in one direction, while the other is used as well.
        latency_seconds: of one message, whatever its size.
    """

    bytes_per_second: float
    latency_seconds: float


PCIE_LATENCY_SECONDS = 5.7e-6
NETWORK_LATENCY_SECONDS = 9.6e-6
"""Of one hop of a ring under NCCL's ``Simple`` protocol, as its own tuning model has it (NCCL, src/graph/tuning.cc)."""


def pcie(bytes_per_second: float) -> Link:
    """GPUs of one machine without NVLink, at the rate of host memory to device."""
    return Link(bytes_per_second=bytes_per_second, latency_seconds=PCIE_LATENCY_SECONDS)


def network(bits_per_second: float) -> Link:
    """Machines at a network's baseline rate."""
    return Link(bytes_per_second=bits_per_second / 8, latency_seconds=NETWORK_LATENCY_SECONDS)


def send_seconds(num_bytes: float, link: Link) -> float:
    """One message to a neighbour, such as a pipeline stage's activations; nothing is not sent."""
    if num_bytes == 0:
        return 0.0
    return link.latency_seconds + num_bytes / link.bytes_per_second


def reduce_scatter_seconds(num_bytes: float, num_gpus: int, link: Link) -> float:
    """A ring: n - 1 rounds, each of one n-th of the *num_bytes* that every GPU holds (Patarasuk and Yuan, 2009)."""
    return (num_gpus - 1) * send_seconds(num_bytes / num_gpus, link)


def all_gather_seconds(num_bytes: float, num_gpus: int, link: Link) -> float:
    """As many rounds of as many bytes as a reduce-scatter; *num_bytes* is what every GPU holds at the end."""
    return reduce_scatter_seconds(num_bytes, num_gpus, link)


def all_reduce_seconds(num_bytes: float, num_gpus: int, link: Link) -> float:
    """A reduce-scatter, then an all-gather."""
    return reduce_scatter_seconds(num_bytes, num_gpus, link) + all_gather_seconds(num_bytes, num_gpus, link)


def overlapped_seconds(computing: float, communicating: float, share: float = 1.0) -> float:
    """Both together, where *share* of the computing can go on meanwhile."""
    return computing + max(0.0, communicating - share * computing)


def pipeline_seconds(
    stages: Sequence[float], num_micro_batches: int, sending: float = 0.0, interleaved: int = 1
) -> float:
    """One step of a pipeline under 1F1B (Narayanan et al., 2021): the slowest stage's micro-batches, and the bubble.

    Args:
        stages: seconds of one micro-batch, forward and backward, in each stage.
        sending: seconds of one micro-batch's activations, or their gradients, to a neighbour.
        interleaved: model chunks per stage, which shorten the bubble as many times and send as many times as often.
    """
    busy = max(stages)
    filling = (sum(stages) - busy) / interleaved
    messages = 2 * (len(stages) - 1) * interleaved
    return num_micro_batches * busy + filling + messages * sending


def bubble_share(num_stages: int, num_micro_batches: int, interleaved: int = 1) -> float:
    """The share of a step that each of equal stages waits: (p - 1) / (v m + p - 1)."""
    waiting = num_stages - 1
    return waiting / (interleaved * num_micro_batches + waiting)


def offload_seconds(computing: float, num_bytes: float, link: Link) -> float:
    """A stretch of forward or backward pass while *num_bytes* go to the host, or come back: the longer of both."""
    return max(computing, num_bytes / link.bytes_per_second)
