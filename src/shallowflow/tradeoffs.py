"""The frontier of a request: plans for less memory, for finer weights, for other sequence lengths, or for more GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from shallowflow.planner.allowed import budget_bytes
from shallowflow.planner.frontier import FrontierPoint, frontier, point
from shallowflow.planner.machines import fewest
from shallowflow.planner.plan import Objective, Workload
from shallowflow.planner.remedies import SMALLEST_SEQUENCE, Infeasible, of_length
from shallowflow.planning import make_plan
from shallowflow.profiles import model_facts
from shallowflow.profiles.load import load_gpu, load_instances, load_model
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.refusals import smallest_process_bytes
from shallowflow.session import Progress, RequestError, Session
from shallowflow.workloads import check, workload_of

Over = Literal["memory", "sequence_length", "gpus"]
NUM_MEMORIES = 6
SHARES = (0.25, 0.5, 1.0, 2.0)
"""Of the sequence length asked for, the lengths that are planned."""
OBJECTIVES: tuple[Objective, ...] = tuple(o for o in get_args(Objective) if o != "cost")


def trade_offs(
    model: str | Path,
    gpu: str = "t4",
    *,
    over: Over = "memory",
    progress: Progress = lambda _message: None,
    **workload: Any,
) -> tuple[FrontierPoint, ...]:
    """The frontier for fine-tuning *model* on *gpu*, or the best plans at several lengths or for several GPUs.

    Args:
        over: ``memory`` for plans of which none beats another in memory, time and weight error; ``sequence_length``
            for one plan each of sequences of a quarter, half, once and twice the length asked for, as far as they fit;
            ``gpus`` for one plan each of 1, 2, 4 and so on of them, as far as one machine has them.

    Other arguments are those of ``plan``, but for data, whose size *workload* gives; errors are its own.
    """
    spec, device, asked = load_model(str(model)), load_gpu(gpu), workload_of(workload)
    if over == "sequence_length":
        works = {length: of_length(asked, length) for length in lengths(spec, asked.sequence_length)}
        return find_over_lengths(spec, device, works, progress=progress)
    if over == "gpus":
        return find_over_gpus(spec, device, asked, progress=progress)
    if over != "memory":
        raise RequestError(f"over is {over!r}; give one of {', '.join(get_args(Over))}")
    return find_trade_offs(spec, device, asked, progress=progress)


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
                found.append(_point(model, gpu, work, progress, last=not found))
            except Infeasible:
                if not found:
                    raise
    return frontier(found)


def lengths(model: ModelSpec, length: int) -> tuple[int, ...]:
    """SHARES of *length*, as far as the model was built for them and anyone would want them."""
    longest = model_facts.size(model.config, "max_position_embeddings") or max(length, int(max(SHARES) * length))
    found = {int(share * length) for share in SHARES}
    return tuple(sorted(n for n in found if n == length or SMALLEST_SEQUENCE <= n <= longest))


def find_over_lengths(
    model: ModelSpec, gpu: GpuSpec, works: Mapping[int, Workload], *, progress: Progress = lambda _message: None
) -> tuple[FrontierPoint, ...]:
    """The best plan for each of *works*, which are one at several sequence lengths; those that fit in no way have none.

    Raises:
        Infeasible: nothing fits at any length.
    """
    found: list[FrontierPoint] = []
    for length in sorted(works, reverse=True):
        work = works[length]
        check(work, model, gpu)
        session = Session(model, gpu, progress, work.adapter, work.target_modules)
        progress(f"{length:,} tokens")
        most = budget_bytes(gpu, work) + gpu.context_bytes
        if length > min(works) and smallest_process_bytes(session, work) > most:
            continue
        try:
            found.append(_point(model, gpu, work, progress, last=length == min(works) and not found))
        except Infeasible:
            if length == min(works) and not found:
                raise
    return tuple(reversed(found))


MOST_GPUS = 64
"""In several machines, if need be."""


def gpu_counts(gpu: GpuSpec, global_batch_size: int, micro_batch_size: int = 1) -> tuple[int, ...]:
    """Powers of two that divide a batch into whole micro-batches, up to MOST_GPUS; one where no machine is known."""
    most = MOST_GPUS if load_instances(gpu.name) else 1
    return tuple(
        n
        for n in (2**power for power in range(most.bit_length()))
        if n <= most and global_batch_size % (n * micro_batch_size) == 0
    )


def find_over_gpus(
    model: ModelSpec, gpu: GpuSpec, workload: Workload, *, progress: Progress = lambda _message: None
) -> tuple[FrontierPoint, ...]:
    """The best plan for each of *gpu_counts*; those for which nothing fits have none.

    Raises:
        Infeasible: nothing fits on any number of them.
        RequestError: the workload asks for several already.
    """
    if workload.num_gpus > 1:
        raise RequestError(
            f"{workload.num_gpus} GPUs are asked for, and a plan over several numbers of them; ask for one"
        )
    found: list[FrontierPoint] = []
    counts = gpu_counts(gpu, workload.global_batch_size, workload.micro_batch_size or 1) or (1,)
    for count in counts:
        progress(f"{count} GPUs")
        try:
            work = replace(workload, num_gpus=count, num_machines=fewest(load_instances(gpu.name), count))
            found.append(_point(model, gpu, work, progress, last=count == counts[-1] and not found))
        except Infeasible:
            if count == counts[-1] and not found:
                raise
    return tuple(found)


def _point(model: ModelSpec, gpu: GpuSpec, work: Workload, progress: Progress, *, last: bool) -> FrontierPoint:
    """The best plan's. Only if it is the *last* that could be is its refusal shown, and worked out in full."""
    return point(make_plan(model, gpu, work, progress=progress, num_alternatives=0, with_remedies=last))
