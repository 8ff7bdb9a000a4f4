"""The tables of docs/comparison.md, and of the errors in docs/accuracy.md: ours and other tools' on recorded T4 steps.

    python -m benchmarks.comparison             # from what was predicted and recorded before
    python -m benchmarks.comparison --record    # trace every recorded step first, nine minutes on two cores

Other tools' predictions are asked of them anew each time; they take no time. Ours are traced steps, so they are kept in
a record, of which the tests trace a sample again.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import accuracy, recorded, rivals, trainers

PREDICTED = recorded.MEASURED.parent / "predicted" / "t4.json"
QUANTITIES = {
    "allocated": "peak allocated",
    "reserved": "peak reserved",
    "process": "peak of the process",
    "resident": "resident before the step",
    "step": "the step's peak over that",
}
"""Bytes that are predicted, by what the documentation calls them."""
TOOLS = {
    "fitcheck": "fitcheck-llm",
    "accelerate": "accelerate estimate-memory",
    "DeepSpeed": "DeepSpeed's ZeRO-2 estimator",
}
T4_BYTES = 14_912 * 2**20
"""What PyTorch says that the recorded card has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One recorded step.

    Attributes:
        measured: bytes by quantity, as recorded.
        predicted: bytes by quantity, ours.
        others: the process's bytes, by other tool.
    """

    quantized: bool
    measured: Mapping[str, float]
    predicted: Mapping[str, int]
    others: Mapping[str, int]

    def error(self, quantity: str) -> float:
        """Ours over the measured, less one."""
        return self.predicted[quantity] / self.measured[quantity] - 1

    def process_bytes(self, tool: str) -> int:
        """What *tool* says that the process takes."""
        return self.others[tool] if tool else self.predicted["process"]

    def process_error(self, tool: str) -> float:
        """That over the measured, less one."""
        return self.process_bytes(tool) / self.measured["process"] - 1


def load() -> dict[str, Any]:
    """What was predicted, by the file of the recorded steps and their names."""
    found: dict[str, Any] = json.loads(PREDICTED.read_text(encoding="utf-8"))
    return found


def predictions(row: accuracy.Row) -> dict[str, int]:
    """Of *row*, what the record keeps."""
    return {name: int(row.quantities[name].predicted) for name in QUANTITIES if name in row.quantities}


def record() -> None:
    """Trace every recorded step, and write what is predicted of it."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    kept: dict[str, Any] = {
        "command": "python -m benchmarks.comparison --record",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    for path in (recorded.RECORDS, recorded.HELD_OUT):
        kept[path.stem] = {row.name: predictions(row) for row in accuracy.rows(path=path)}
    PREDICTED.parent.mkdir(exist_ok=True)
    PREDICTED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@cache
def steps(path: Path = recorded.RECORDS) -> tuple[Step, ...]:
    """Every step recorded in *path*, beside what was predicted of it."""
    predicted = load()[path.stem]
    return tuple(
        Step(
            quantized=recorded.is_quantized(run),
            measured=accuracy.measured(run),
            predicted=predicted[run["id"]],
            others=rivals.predictions(run),
        )
        for run in recorded.runs(path)
    )


def tools_table() -> str:
    """Median and worst error of the process's memory, by tool; the range that the errors span; what is said to fit."""
    early, late = steps(), steps(recorded.HELD_OUT)
    plain, quantized = [s for s in early if not s.quantized], [s for s in early if s.quantized]
    groups = (plain, quantized, early, late)
    heads = (
        f"fp16, {len(plain)} rows",
        f"nf4, {len(quantized)} rows",
        f"all {len(early)}",
        f"later session, {len(late)} rows",
        f"lowest and highest of {len(early) + len(late)}",
        f"said to fit, of {len(early) + len(late)} that ran",
    )
    rows = []
    for tool, title in {"": "ShallowFlow", **TOOLS}.items():
        errors = [step.process_error(tool) for step in (*early, *late)]
        fitting = sum(step.process_bytes(tool) <= T4_BYTES for step in (*early, *late))
        cells = [accuracy.summary(step.process_error(tool) for step in group) for group in groups]
        rows.append((title, *cells, f"{_signed(min(errors))}, {_signed(max(errors))}", str(fitting)))
    return markdown(("error of the process's memory", *heads), rows)


def errors_table() -> str:
    """Median and worst error of every quantity of bytes, ours."""
    plain, quantized = ([s for s in steps() if s.quantized is wanted] for wanted in (False, True))
    heads = ("predicted over measured", f"fp16, {len(plain)} rows", f"nf4, {len(quantized)} rows", "all")
    rows = []
    for name, title in QUANTITIES.items():
        groups = ([s.error(name) for s in group if name in s.measured] for group in (plain, quantized, steps()))
        rows.append((title, *map(accuracy.summary, groups)))
    return markdown(heads, rows)


def trainers_table() -> str:
    """Our step beside other trainers' on a CPU: speed by the median of paired rounds, and allocated peaks."""
    heads = ("work", "tokens/s", "over Trainer", "over TRL", "peak MiB", "of Trainer's", "of TRL's")
    others = [name for name in trainers.TRAINERS if name != "shallowflow"]
    rows = []
    for row in trainers.load()["rows"]:
        ours = row["trainers"]["shallowflow"]
        rows.append(
            (
                row["work"]["name"],
                f"{row['tokens_per_step'] / statistics.median(ours['step_seconds']):.0f}",
                *(f"{statistics.median(trainers.speedups(row, other)):.2f}" for other in others),
                f"{ours['peak_allocated_bytes'] / 2**20:.0f}",
                *(f"{trainers.memory_ratio(row, other):.2f}" for other in others),
            )
        )
    return markdown(heads, rows)


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in map(list, (heads, *rows)))
    return "\n".join((head, "|" + "---|" * (head.count(" | ") + 1), *body))


def _signed(error: float) -> str:
    digits = 1 if abs(error) < 1 else 0
    return f"{100 * error:+.{digits}f} %"


def main() -> None:
    """Predict anew, if asked; print the tables."""
    warnings.simplefilter("ignore")
    if "--record" in sys.argv[1:]:
        record()
    print(tools_table(), errors_table(), trainers_table(), sep="\n\n")


if __name__ == "__main__":
    main()
