"""Mixed plans on a T4: over models and lengths against the best single strategy, and over the memory there is.

python -m benchmarks.sweep [MODEL ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.verify import doubts
from shallowflow.planning import make_plan
from shallowflow.profiles.load import load_gpu, load_instances, load_model

MODELS = (
    "SmolLM2-135M",
    "SmolLM2-360M",
    "Qwen2.5-0.5B",
    "TinyLlama-1.1B-Chat-v1.0",
    "Llama-3.2-1B",
    "Qwen2.5-1.5B",
    "SmolLM2-1.7B",
    "Llama-3.2-3B",
    "Qwen2.5-7B",
    "Llama-3.1-8B",
)
LENGTHS = (512, 1024, 2048, 4096)
SWEPT = "Llama-3.1-8B"
MEMORIES = range(6, 16)
GIB = 2**30


def planned(model: str, workload: Workload) -> Plan | None:
    """The plan for a T4, None where nothing fits."""
    said = lambda text: print(f"{model}: {text}", file=sys.stderr)  # noqa: E731
    try:
        return make_plan(load_model(model), load_gpu("t4"), workload, progress=said, num_alternatives=0)
    except Infeasible:
        return None


def facts(plan: Plan) -> list[str]:
    """Seconds, against the best single strategy, proof, and how much of the budget is reserved."""
    best = plan.search.best_uniform_seconds
    single = "none fits" if best is None else f"{best / plan.prediction.step_seconds - 1:+.1%}"
    used = plan.prediction.peak_reserved_bytes / plan.budget_bytes
    return [
        f"{plan.prediction.step_seconds:.2f}",
        single,
        f"{plan.proof.gap:.1e}",
        f"{plan.proof.unfragmented_gap:.1%}",
        f"{used:.1%}",
        f"{plan.configuration.micro_batch_size} x {plan.configuration.gradient_accumulation_steps}",
        f"{plan.search.num_rejected}",
        "holds" if not doubts(plan, load_gpu("t4"), load_instances("t4")) else "DOES NOT HOLD",
    ]


COLUMNS = ("s/step", "one strategy", "gap", "unfragmented", "reserved", "batch", "cuts", "proof")


def table(title: str, rows: Sequence[tuple[str, Plan | None]]) -> Table:
    """One line a plan."""
    made = Table(title=title)
    made.add_column("", no_wrap=True)
    for name in COLUMNS:
        made.add_column(name, justify="right", no_wrap=True)
    for name, plan in rows:
        made.add_row(name, *(facts(plan) if plan else ["nothing fits"]))
    return made


def main() -> None:
    """Print both tables."""
    console = Console(width=130)
    rows: list[tuple[str, Plan | None]] = []
    for model in sys.argv[1:] or MODELS:
        for length in LENGTHS:
            longest = load_model(model).config.get("max_position_embeddings", length)
            if length <= longest:
                rows.append((f"{model} {length}", planned(model, Workload(sequence_length=length))))
    console.print(table("models and lengths", rows))
    swept = [
        (f"{SWEPT} {gib} GiB", planned(SWEPT, Workload(sequence_length=1024, max_process_bytes=gib * GIB)))
        for gib in MEMORIES
    ]
    console.print(table("memory", swept))
    seconds = [plan.prediction.step_seconds for _, plan in swept if plan]
    print("seconds never rise with memory:", seconds == sorted(seconds, reverse=True))


if __name__ == "__main__":
    main()
