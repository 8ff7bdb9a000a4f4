"""The machines that GPUs are in: which will do, how few are enough, and what joins their GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shallowflow.profiles.specs import GpuSpec, InstanceSpec

from .communication import Link, network, pcie


def suitable(instances: Sequence[InstanceSpec], gpus_per_machine: int) -> list[InstanceSpec]:
    """Those of *instances* with so many GPUs, or more."""
    return [instance for instance in instances if instance.num_gpus >= gpus_per_machine]


def fewest(instances: Sequence[InstanceSpec], num_gpus: int) -> int:
    """How many of the largest of *instances* have *num_gpus*, shared out evenly; 1 where none is known."""
    most = max((instance.num_gpus for instance in instances), default=num_gpus)
    return next(n for n in range(math.ceil(num_gpus / most), num_gpus + 1) if num_gpus % n == 0)


def link(gpu: GpuSpec, instances: Sequence[InstanceSpec], num_gpus: int, num_machines: int) -> Link:
    """The slowest hop between neighbours: PCIe within a machine; among several the network of the slowest that will do.

    Left out: that all GPUs of a machine share its network where more than one of them speaks to another machine, as
    stages of several replicas do.
    """
    inside = pcie(gpu.pcie_bytes_per_second)
    rates = [one.network_bits_per_second for one in suitable(instances, num_gpus // num_machines)]
    if num_machines == 1 or not rates:
        return inside
    outside = network(min(rates))
    return replace(outside, bytes_per_second=min(outside.bytes_per_second, inside.bytes_per_second))
