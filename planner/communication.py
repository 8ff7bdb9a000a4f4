"""What data-parallel GPUs say to each other, and how long it takes."""

from __future__ import annotations


def all_reduce_seconds(num_bytes: int, num_gpus: int, bytes_per_second: float) -> float:
    """A ring all-reduce: each GPU sends and receives 2 (n - 1) / n of the data (Patarasuk and Yuan, 2009).

    Latency per message and overlap with the backward pass are left out.
    """
    return 2 * (num_gpus - 1) / num_gpus * num_bytes / bytes_per_second
