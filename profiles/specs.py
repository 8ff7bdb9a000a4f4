"""What is known of GPUs, instances and models: the types of the facts, and nothing that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Trust = Literal["measured", "derived", "datasheet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one number comes from, and how far to trust it."""

    text: str
    trust: Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator as the planner sees it.

    Attributes:
        name: the word typed after ``--gpu``.
        title: the name a person reads.
        device_type: ``cuda`` or ``cpu``.
        aliases: other spellings of the name, lower case.
        compute_capability: CUDA's (major, minor); None for a CPU.
        memory_bytes: what ``torch.cuda.get_device_properties`` reports as total, or a host's memory.
        context_bytes: taken by the CUDA context before the first tensor, outside the caching allocator.
        cublas_workspace_bytes: what PyTorch gives each cuBLAS handle and stream; 0 for a CPU.
        fp16_flops_per_second, bf16_flops_per_second, fp32_flops_per_second: sustained dense matrix products.
        dram_bytes_per_second: sustained, bytes read plus bytes written.
        pcie_bytes_per_second: host to device, pinned.
        int8_flops_per_second: sustained dense products of int8 matrices.
        attention_fp16_flops_per_second, attention_bf16_flops_per_second, attention_fp32_flops_per_second: sustained, of
            fused attention, its operations counted as if no score were masked.
        fp32_matmul_bytes_per_second: sustained, where a product in fp32 is bound by its bytes, as with an adapter.
        dequantized_elements_per_second: weights of 4 bits made into numbers of 16 again.
        kernel_gap_seconds: what a kernel takes on the device whatever its size.
        kernel_launch_seconds: of the host, per operator of a step, when the host is the bound.
        quantized_launch_seconds: of the host, beyond it, for each product with a quantized weight.
        step_error: share by which nine of ten measured steps stay within the prediction.
        sources: for each number above, its Source.
    """

    name: str
    title: str
    device_type: Literal["cuda", "cpu"]
    aliases: tuple[str, ...]
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    context_bytes: int
    cublas_workspace_bytes: int
    fp16_flops_per_second: float
    bf16_flops_per_second: float
    fp32_flops_per_second: float
    dram_bytes_per_second: float
    pcie_bytes_per_second: float
    int8_flops_per_second: float
    attention_fp16_flops_per_second: float
    attention_bf16_flops_per_second: float
    attention_fp32_flops_per_second: float
    fp32_matmul_bytes_per_second: float
    dequantized_elements_per_second: float
    kernel_gap_seconds: float
    kernel_launch_seconds: float
    quantized_launch_seconds: float
    step_error: float
    sources: Mapping[str, Source]

    @property
    def compute_dtype(self) -> Literal["float16", "bfloat16", "float32"]:
        """The dtype to train in: by compute capability, because a T4 claims a bf16 that it emulates."""
        if self.device_type == "cpu" or self.compute_capability is None:
            return "float32"
        return "bfloat16" if self.compute_capability >= (8, 0) else "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an instance costs in one region on one day.

    Attributes:
        spot_usd_per_hour: the median over the region's zones; None where none was offered.
        interruption_bucket: the Spot Advisor's monthly frequency, such as ``5-10%``.
    """

    region: str
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float | None
    interruption_bucket: str | None
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePrices:
    """What one kind of storage costs by region; regions whose price could not be sourced are left out."""

    name: str
    usd_per_gb_month: Mapping[str, float]
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpec:
    """Storage of one provider: *volume* is an instance's own disk, *bucket* keeps what outlives it."""

    cloud: str
    volume: StoragePrices
    bucket: StoragePrices


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """One cloud instance type: what it holds, and its price by region.

    Attributes:
        ram_bytes, nvme_bytes: as the provider states them.
        network_bits_per_second: the baseline, which lasts, not the burst.
        disk_bytes_per_second: EBS's baseline.
    """

    name: str
    cloud: str
    gpu: str
    num_gpus: int
    num_vcpus: int
    ram_bytes: int
    nvme_bytes: int
    network_bits_per_second: float
    disk_bytes_per_second: float
    prices: tuple[Price, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One causal language model: its configuration in Hugging Face's own keys.

    Attributes:
        name: ``organisation/name`` as on the Hub, or a folder's name.
        config: what its ``config.json`` says, as far as sizes and structure go.
        num_parameters: the published count of distinct parameters; None for a model of the user's own.
        num_parameters_source: where that count was published.
        gated: whether the Hub asks for a login and an accepted licence.
        location: the folder of the configuration, for a model of the user's own.
    """

    name: str
    config: Mapping[str, Any]
    num_parameters: int | None = None
    num_parameters_source: str | None = None
    gated: bool = False
    location: str | None = None
