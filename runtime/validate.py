"""Predict training steps, then run them on the device of this machine, and leave a record of both.

    python -m shallowflow.runtime.validate [--device cuda|cpu] [--output FOLDER] [--minutes N]

A CUDA device is held to a T4's rules: its memory is capped, attention is the memory-efficient kernel, computing is in
fp16 with a loss scale. Peaks are then a T4's; seconds are the device's own. Nothing is downloaded: weights are random.
It needs PyTorch, transformers and PEFT, and bitsandbytes for quantized weights; nothing else need be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # what PyTorch takes before Hopper, as on a T4
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "1024")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # Trainer takes all
os.environ.pop("PYTORCH_ALLOC_CONF", None)  # the allocator is predicted as it comes
os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)

import torch

from . import cells, micro, others
from .cells import Cell
from .trial import Rules, failed, forget, measured, measured_boundary, predicted, predicted_boundary, rules_for

FORMAT_VERSION = 1
ALLOCATED_TOLERANCE = 0.02
RESERVED_TOLERANCE = 0.05
"""How far predictions may be from records: the worst row, of what is allocated and of what is reserved."""


# The record


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "unsloth"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return next(iter(re.findall(r"\d+\.\d+[\d.]*", text)), None)
    return None


def _can_quantize(rules: Rules) -> bool:
    """Whether bitsandbytes can be imported; its operators are then made known to the profiler."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from .simulated import register_quantization

    try:
        register_quantization()
    except Exception as error:  # noqa: BLE001 - such as a library built for another CUDA
        rules.notes.append(f"bitsandbytes cannot be used: {failed(error)['reason']}")
        return False
    return True


def possible(grid: tuple[Cell, ...], *, quantizes: bool) -> tuple[Cell, ...]:
    """The cells of *grid* that the installed packages allow."""
    return tuple(
        cell
        for cell in grid
        if quantizes or (cell.weight_format not in ("int8", "nf4") and cell.optimizer != "adamw8bit")
    )


def validate(rules: Rules, grid: tuple[Cell, ...], boundaries: tuple[Cell, ...], tell: Callable[[str], None]) -> Any:
    """The record of everything on this device: what was predicted, then what was measured."""
    quantizes = _can_quantize(rules)
    grid, boundaries = possible(grid, quantizes=quantizes), possible(boundaries, quantizes=quantizes)
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(grid, start=1):
        tell(f"predicting {number} of {len(grid)}: {_title(cell)}")
        rows.append({"cell": asdict(cell), "predicted": predicted(cell, rules)})
    limits: list[dict[str, Any]] = []
    for cell in boundaries:
        tell(f"predicting the largest micro-batch: {_title(cell)}")
        limits.append({"cell": asdict(cell), "predicted": predicted_boundary(cell, rules)})
    tell("timing single operators")
    operators = micro.operators(rules.device, build_dtype(rules.compute_dtype), quantizes=quantizes)
    for number, (cell, row) in enumerate(zip(grid, rows, strict=True), start=1):
        tell(f"running {number} of {len(grid)}: {_title(cell)}")
        row["measured"] = {"outcome": "out of time"} if rules.out_of_time() else measured(cell, rules)
        forget(rules.device)
    for cell, limit in zip(boundaries, limits, strict=True):
        tell(f"trying the largest micro-batch: {_title(cell)}")
        limit["measured"] = None if rules.out_of_time() else measured_boundary(cell, limit["predicted"], rules)
    compared = others.COMPARED_SMALL if rules.device.type == "cpu" else others.COMPARED
    beside = [_beside(cell, rules, tell) for cell in possible(compared, quantizes=quantizes)]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "validation",
        "device": _device_name(rules.device),
        "compute_capability": rules.gpu.compute_capability,
        "driver": _driver(),
        "versions": _versions(),
        "command": "python -m shallowflow.runtime.validate " + " ".join(sys.argv[1:]),
        "rules": {
            "capacity_bytes": rules.capacity_bytes,
            "compute_dtype": rules.compute_dtype,
            "notes": rules.notes,
        },
        "rows": rows,
        "boundaries": limits,
        "operators": operators,
        "rates": micro.rates(operators),
        "side by side": beside,
    }


def _beside(cell: Cell, rules: Rules, tell: Callable[[str], None]) -> dict[str, Any]:
    """*cell* by our step and by the other trainers, one after the other."""
    row: dict[str, Any] = {"cell": asdict(cell)}
    for name, run in {"ours": measured, **others.TRAINERS}.items():
        tell(f"side by side, {name}: {_title(cell)}")
        row[name] = {"outcome": "out of time"} if rules.out_of_time() else run(cell, rules)
        forget(rules.device)
        if row[name]["outcome"] == "ran":
            row[name]["tokens_per_second"] = cell.num_tokens / row[name]["step_seconds"]
    return row


def build_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of that name."""
    made: torch.dtype = getattr(torch, name)
    return made


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def _title(cell: Cell) -> str:
    extras: list[str] = [cell.attention] if cell.attention != "sdpa" else []
    extras += [f"loss by {cell.chunk_tokens}"] if cell.chunk_tokens else []
    extras += [cell.optimizer] if cell.optimizer != "adamw" else []
    shape = f"{cell.micro_batch_size} x {cell.sequence_length}"
    return " ".join([cell.model, cell.weight_format, f"recompute {cell.recompute}", shape, *extras])


def _error(row: dict[str, Any], name: str) -> str:
    before, after = row["predicted"].get(name), row["measured"].get(name)
    return f"{before / after - 1:+.2%}" if before and after else "-"


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The record as a table for a terminal."""
    yield f"{record['device']}, torch {record['versions']['torch']}"
    header = f"{'step':<62}{'allocated':>12}{'error':>9}{'reserved':>12}{'error':>9}{'seconds':>10}{'error':>10}"
    yield header
    for row in record["rows"]:
        found = row["measured"]
        title = _title(Cell(**row["cell"]))
        if found["outcome"] != "ran":
            yield f"{title:<62}{found['outcome']}; predicted: {row['predicted']['outcome']}"
            continue
        sizes = [f"{found[name] / 2**20:,.1f}" for name in ("peak_allocated_bytes", "peak_reserved_bytes")]
        errors = [_error(row, n) for n in ("peak_allocated_bytes", "peak_reserved_bytes", "step_seconds")]
        yield (
            f"{title:<62}{sizes[0]:>12}{errors[0]:>9}{sizes[1]:>12}{errors[1]:>9}"
            f"{found['step_seconds']:>10.4f}{errors[2]:>10}"
        )
    for limit in record["boundaries"]:
        largest = "none in time" if limit["measured"] is None else limit["measured"]
        yield f"largest micro-batch, {_title(Cell(**limit['cell']))}: predicted {limit['predicted']}, found {largest}"
    for row in record["side by side"]:
        sides = [_side(name, found) for name, found in row.items() if name != "cell"]
        yield f"tokens per second, {_title(Cell(**row['cell']))}: {', '.join(sides)}"


def _side(name: str, found: dict[str, Any]) -> str:
    if found["outcome"] != "ran":
        return f"{name} {found['outcome']}"
    return f"{name} {found['tokens_per_second']:,.0f} ({found['peak_allocated_bytes'] / 2**20:,.1f} MiB)"


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write *record* into *folder* under the device's name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", str(record["device"]).lower()).strip("_")
    path = folder / f"validation_{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _can_write(folder: Path) -> bool:
    """Whether a record can be left in *folder*, asked before minutes of measuring."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Parse, validate, print, write; exit code 2 where there is no such device or folder."""
    parser = argparse.ArgumentParser(prog="python -m shallowflow.runtime.validate", description="See the module.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("tests/measured"), help="folder for the record")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing more after so many")
    wanted = parser.parse_args(arguments)
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print("Error: this machine has no CUDA device; try --device cpu", file=sys.stderr)
        return 2
    if not _can_write(wanted.output):
        print(f"Error: cannot write into {wanted.output}; give another folder with --output", file=sys.stderr)
        return 2
    rules = rules_for(torch.device("cuda", 0) if wanted.device == "cuda" else torch.device("cpu"), wanted.minutes)
    small = wanted.device == "cpu"
    record = validate(
        rules,
        cells.SMALL if small else cells.full_grid(),
        () if small else cells.BOUNDARIES,
        lambda message: print(message, file=sys.stderr, flush=True),
    )
    path = save(record, wanted.output)
    print("\n".join(lines(record)))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
