"""Time single operators on a device: what a profile of it is made from."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Case = tuple[str, dict[str, int], Callable[[], Any], int, int]
"""Name, sizes, what to run, floating-point operations, bytes moved."""

NUM_TIMED = 10
NUM_LAUNCHES = 100
THIN = 16
"""An adapter's rank, as timed."""

LARGE = {"matrix": 4096, "tokens": 4096, "width": 2048, "copy": 256 * 2**20, "heads": 32, "length": 1024}
SMALL = {"matrix": 1024, "tokens": 512, "width": 1024, "copy": 64 * 2**20, "heads": 16, "length": 512}


def operators(device: torch.device, dtype: torch.dtype, *, quantizes: bool) -> list[dict[str, Any]]:
    """The median seconds of each operator, with its rates; those that fail, or cannot be prepared, say why."""
    sizes = LARGE if device.type == "cuda" else SMALL
    groups: dict[str, Callable[[], Iterator[Case]]] = {
        "products": lambda: _products(device, dtype, sizes),
        "copies": lambda: _copies(device, sizes),
        "attention": lambda: _attention(device, dtype, sizes),
        "optimizer steps": lambda: _steps(device, sizes),
    }
    if quantizes:
        groups["dequantisation"] = lambda: _dequantisation(device, dtype, sizes)
    found: list[dict[str, Any]] = []
    for name, cases in groups.items():
        try:
            for row in _timed(cases(), device, dtype):
                found.append(row)  # noqa: PERF402 - those before a failure are kept
        except Exception as error:  # noqa: BLE001 - such as memory that is not there
            found.append({"operator": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
    return found


def _timed(cases: Iterator[Case], device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for name, shape, run, flops, num_bytes in cases:
        row: dict[str, Any] = {"operator": name, "dtype": str(dtype).removeprefix("torch."), **shape}
        try:
            seconds = _seconds(run, device)
        except Exception as error:  # noqa: BLE001 - such as a kernel that this chip lacks
            yield {**row, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        row["seconds"] = seconds
        if flops:
            row["flops_per_second"] = flops / seconds
        if num_bytes:
            row["bytes_per_second"] = num_bytes / seconds
        yield row


SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def rates(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What timed operators say of a device, by the names of a GPU's facts; what was not timed is left out.

    Matrix products by their square; where bytes bound an fp32 product, by an adapter's thinnest; a kernel's gap by many
    small ones in a row, which the host may bound.
    """
    timed = [row for row in found if "seconds" in row]
    known: dict[str, float] = {}
    for row in timed:
        name, dtype = row["operator"], SHORT.get(row["dtype"], row["dtype"])
        if name == "mm":
            dtype = "fp32" if row["bits"] == 32 else dtype
            if row["m"] == row["k"] == row["n"]:
                known[f"{dtype}_flops_per_second"] = row["flops_per_second"]
            elif dtype == "fp32" and min(row["k"], row["n"]) <= THIN:
                thinnest = min(row["bytes_per_second"], known.get("fp32_matmul_bytes_per_second", math.inf))
                known["fp32_matmul_bytes_per_second"] = thinnest
        elif name == "attention, both passes":
            known[f"attention_{dtype}_flops_per_second"] = row["flops_per_second"]
        elif name == "nf4 to numbers":
            known["dequantized_elements_per_second"] = row["elements"] / row["seconds"]
        elif name == f"{NUM_LAUNCHES} launches":
            known["kernel_gap_seconds"] = row["seconds"] / NUM_LAUNCHES
        elif name in _RATE_OF:
            field, key = _RATE_OF[name]
            known[field] = row[key]
    return known


_RATE_OF = {
    "copy on the device": ("dram_bytes_per_second", "bytes_per_second"),
    "host to device": ("pcie_bytes_per_second", "bytes_per_second"),
    "int8 product": ("int8_flops_per_second", "flops_per_second"),
}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(NUM_TIMED):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return max(statistics.median(times), 1e-9)


def _products(device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> Iterator[Case]:
    """Square, a layer's, and an adapter's thin ones, in *dtype* and in fp32."""
    n, tokens, width = sizes["matrix"], sizes["tokens"], sizes["width"]
    for rows, inner, columns in ((n, n, n), (tokens, width, 4 * width), (tokens, width, THIN), (tokens, THIN, width)):
        for kind in dict.fromkeys((dtype, torch.float32)):
            a = torch.randn(rows, inner, device=device, dtype=kind)
            b = torch.randn(inner, columns, device=device, dtype=kind)
            shape = {"m": rows, "k": inner, "n": columns, "bits": 8 * kind.itemsize}
            moved = kind.itemsize * (rows * inner + inner * columns + rows * columns)
            yield "mm", shape, lambda a=a, b=b: a @ b, 2 * rows * inner * columns, moved  # type: ignore[misc]


def _copies(device: torch.device, sizes: dict[str, int]) -> Iterator[Case]:
    count = sizes["copy"]
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield "copy on the device", {"bytes": count}, lambda: target.copy_(source), 0, 2 * count
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    yield "host to device", {"bytes": count}, lambda: target.copy_(host, non_blocking=True), 0, count
    yield "device to host", {"bytes": count}, lambda: host.copy_(source, non_blocking=True), 0, count
    small = torch.zeros(4, device=device)

    def launches() -> None:
        for _ in range(NUM_LAUNCHES):
            small.add_(1)

    yield f"{NUM_LAUNCHES} launches", {}, launches, 0, 0


def _attention(device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> Iterator[Case]:
    heads, length, size = sizes["heads"], sizes["length"], 64
    query, key, value = (
        torch.randn(1, heads, length, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    flops = 4 * heads * length * length * size

    def forward() -> torch.Tensor:
        return attend(query, key, value, is_causal=True)

    shape = {"heads": heads, "length": length, "head_dim": size}
    yield "attention", shape, forward, flops, 0
    yield "attention, both passes", shape, lambda: forward().sum().backward(), 7 * flops // 2, 0


def _steps(device: torch.device, sizes: dict[str, int]) -> Iterator[Case]:
    parameters = [torch.nn.Parameter(torch.zeros(16, sizes["width"], device=device)) for _ in range(64)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    count = sum(parameter.numel() for parameter in parameters)
    yield "AdamW", {"parameters": count}, optimizer.step, 0, 28 * count


def _dequantisation(device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> Iterator[Case]:
    from .quantized import NF4_BLOCK, bitsandbytes

    functional = bitsandbytes().functional
    n = sizes["matrix"]
    weight = torch.randn(n, n, device=device, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    moved = n * n // 2 + n * n * dtype.itemsize
    yield "nf4 to numbers", {"elements": n * n}, lambda: functional.dequantize_4bit(packed, state), 0, moved
    rows, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    tokens, _, _ = functional.int8_vectorwise_quant(weight[: n // 2].to(torch.float16))
    yield (
        "int8 product",
        {"m": n // 2, "k": n, "n": n},
        lambda: functional.int8_linear_matmul(tokens, rows),
        n * n * n,
        0,
    )
    del scales
