"""The frontier of a request: plans for less and less memory, and for finer weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from shallowflow.planner.frontier import FrontierPoint, frontier, point
from shallowflow.planner.plan import Objective, Workload
from shallowflow.planner.problem import budget_bytes
from shallowflow.planner.remedies import Infeasible
from shallowflow.planning import make_plan
from shallowflow.profiles.load import load_gpu, load_model
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.refusals import smallest_process_bytes
from shallowflow.session import Progress, Session
from shallowflow.workloads import check, workload_of

NUM_MEMORIES = 6
OBJECTIVES: tuple[Objective, ...] = tuple(o for o in get_args(Objective) if o != "cost")


def trade_offs(
    model: str | Path, gpu: str = "t4", *, progress: Progress = lambda _message: None, **workload: Any
) -> tuple[FrontierPoint, ...]:
    """The frontier for fine-tuning *model* on *gpu*; arguments and errors are those of ``plan``."""
    return find_trade_offs(load_model(str(model)), load_gpu(gpu), workload_of(workload), progress=progress)


def find_trade_offs(
    model: ModelSpec, gpu: GpuSpec, workload: Workload, *, progress: Progress = lambda _message: None
) -> tuple[FrontierPoint, ...]:
    """Plans by every objective for NUM_MEMORIES amounts of memory, from the least that is enough to all there is.

    Raises:
        Infeasible: not even all memory is enough.
    """
    most = budget_bytes(gpu, workload) + gpu.context_bytes
    found: list[FrontierPoint] = []
    check(workload, model, gpu)
    session = Session(model, gpu, progress, workload.adapter, workload.target_modules)
    least = min(most, smallest_process_bytes(session, workload))
    for number in range(NUM_MEMORIES, 0, -1):
        memory = round(least * (most / least) ** ((number - 1) / (NUM_MEMORIES - 1)))
        for objective in OBJECTIVES:
            progress(f"{memory / 2**30:.2f} GiB by {objective}")
            work = replace(workload, max_process_bytes=memory, objective=objective)
            try:
                found.append(point(make_plan(model, gpu, work, progress=progress, num_alternatives=0)))
            except Infeasible:
                if not found:
                    raise
    return frontier(found)
