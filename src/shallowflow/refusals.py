"""Why nothing fits, and which changes were computed to fit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from shallowflow.planner import allowed, problem, single, words
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.remedies import MOST_REMEDIES, Change, Infeasible, Remedy, changes
from shallowflow.planner.solver import Solution
from shallowflow.planner.strategies import Cell
from shallowflow.profiles.load import gpu_names, load_gpu, load_instances
from shallowflow.profiles.specs import GpuSpec
from shallowflow.session import RequestError, Session
from shallowflow.staging import Staged
from shallowflow.workloads import check, deadline_hours, part_counts, space, stage_counts

PlanOf = Callable[[Session, problem.Problem, Workload, Solution, tuple[str, ...]], Plan]
"""Makes a solution of a problem a plan, with notes."""


def infeasible(
    session: Session,
    posed: problem.Problem,
    considered: tuple[Cell, ...],
    workload: Workload,
    plan_of: PlanOf,
    *,
    with_remedies: bool = True,
) -> Infeasible:
    """The refusal of *workload*, with remedies that each fit when traced whole."""
    if posed.host_bytes is not None and workload.activations == "offload":
        without = replace(posed, host_bytes=None)
        solution = session.solve(without, considered, 0)
        if solution is not None:
            return _too_much_sent(session, workload, posed.host_bytes, solution)
    for loosened, refusal in _beyond_memory(workload, posed.workload):
        without = replace(posed, workload=loosened)
        solution = session.solve(without, considered, 0)
        if solution is not None:
            return refusal(plan_of(session, without, workload, solution, ()))
    peak = smallest_process_bytes(session, workload)
    return _too_large(session, workload, peak, _remedies(session, workload, peak) if with_remedies else [])


def infeasible_in_stages(
    session: Session, workload: Workload, best_of: Callable[[Workload], Plan], *, with_remedies: bool = True
) -> Infeasible:
    """The refusal of *workload* where the model may be cut, with remedies that each fit when traced whole.

    *best_of* plans a workload, or raises Infeasible.
    """
    timed = replace(workload, deadline_hours=deadline_hours(workload, session.gpu))
    for loosened, refusal in _beyond_memory(workload, timed):
        with contextlib.suppress(Infeasible):
            return refusal(best_of(loosened))
    peak = smallest_process_bytes(session, workload)
    return _too_large(session, workload, peak, _remedies(session, workload, peak) if with_remedies else [])


def _remedies(session: Session, workload: Workload, peak: int) -> list[Remedy]:
    """What was found to fit where *workload*, whose leanest configuration takes *peak* bytes, does not."""
    gpu = session.gpu
    remedies: list[Remedy] = []
    if workload.max_process_bytes is not None:
        option = f"--max-process-gib {math.ceil(peak / 2**30 * 100) / 100:g}"
        roomy = replace(workload, max_process_bytes=math.ceil(peak / 2**30 * 100) * 2**30 // 100)
        remedies += _first_that_fits(session, (Change(option, roomy, gpu),))
    spare = _spare(workload, gpu, peak)
    if spare is not None and 0 <= spare < (workload.headroom or 0):
        lower = Change(f"--headroom {spare:g}", replace(workload, headroom=spare), gpu)
        remedies += _first_that_fits(session, (lower,))
    for group in changes(workload, gpu, [load_gpu(name) for name in gpu_names()], _more_gpus(session, workload)):
        remedies += _first_that_fits(session, group)
        if len(remedies) >= MOST_REMEDIES:
            break
    return remedies


def _spare(workload: Workload, gpu: GpuSpec, peak: int) -> float | None:
    """The headroom that *peak* would leave, where one is asked for."""
    return None if workload.headroom is None else math.floor((1 - peak / gpu.memory_bytes) * 1000) / 1000


def _too_large(session: Session, workload: Workload, peak: int, remedies: list[Remedy]) -> Infeasible:
    """The refusal where even the leanest configuration, with *peak* bytes, is too large."""
    gpu = session.gpu
    if workload.max_process_bytes is not None and workload.max_process_bytes < gpu.memory_bytes:
        return Infeasible(peak, workload.max_process_bytes, remedies)
    spare = _spare(workload, gpu, peak)
    if spare is not None and spare >= 0:
        reason = (
            f"no plan fits in {words.gib(gpu.memory_bytes)} with {workload.headroom:.1%} of it left free: "
            f"the smallest needs {words.gib(peak)}."
        )
        return Infeasible(peak, gpu.memory_bytes, remedies, reason, is_memory=True)
    headroom = allowed.HEADROOM if workload.headroom is None else workload.headroom
    needed = math.ceil(peak / (1 - headroom))  # the memory of which headroom leaves the peak
    return Infeasible(needed, gpu.memory_bytes, remedies)


def _more_gpus(session: Session, workload: Workload) -> tuple[int, ...]:
    """Twice as many GPUs and so on, as far as a shipped machine has them and the batch divides over them."""
    if workload.sharding == "none" and workload.num_stages in (None, 1):  # with which each needs what it needs
        return ()
    most = max((instance.num_gpus for instance in load_instances(session.gpu.name)), default=1)
    doubled = [workload.num_gpus * 2**power for power in range(1, most.bit_length())]
    return tuple(n for n in doubled if n <= most and workload.global_batch_size % n == 0)


def _too_much_sent(session: Session, workload: Workload, host_bytes: int, solution: Solution) -> Infeasible:
    """The refusal where the device's memory would do, and the host's does not."""
    reason = (
        f"no plan fits in {host_bytes / 2**30:.2f} GiB of host memory for offloaded activations, "
        "half of the smallest machine's with this GPU."
    )
    free = Change("the same without --fix activations=offload", replace(workload, activations=None), session.gpu)
    peak = solution.best.prediction.peak_process_bytes
    return Infeasible(peak, session.gpu.memory_bytes, _first_that_fits(session, (free,)), reason)


def _beyond_memory(workload: Workload, timed: Workload) -> Iterator[tuple[Workload, Callable[[Plan], Infeasible]]]:
    """A *workload*, *timed* by its deadline and budget, without some of its limits, and what to say if that fits."""
    hours, error = timed.deadline_hours, timed.max_weight_error
    timeless = replace(timed, deadline_hours=None, budget_usd=None)
    limit = "" if hours is None else words.duration(hours * 3600)

    def refusal(plan: Plan, reason: str, *options: str) -> Infeasible:
        peak = plan.prediction.peak_process_bytes
        return Infeasible(peak, plan.memory_bytes, [Remedy(option=" ".join(options), peak_process_bytes=peak)], reason)

    def too_slow(plan: Plan) -> Infeasible:
        takes = words.duration(plan.wall.total_seconds)
        reason = f"no plan ends within {limit}: the best without that limit takes {takes}."
        return refusal(plan, reason, *_longer(workload, plan))

    def too_coarse(plan: Plan) -> Infeasible:
        reason = f"no plan keeps the weight error within {error:g}: the finest that fits has {plan.weight_error:.4f}."
        return refusal(plan, reason, _coarser(plan))

    def too_much(plan: Plan) -> Infeasible:
        reason = (
            f"no plan ends within {limit}, and none keeps the weight error within {error:g}: the best without these "
            f"limits takes {words.duration(plan.wall.total_seconds)} and has {plan.weight_error:.4f}."
        )
        return refusal(plan, reason, *_longer(workload, plan), _coarser(plan))

    if hours is not None:
        yield timeless, too_slow
    if error is not None:
        yield replace(timed, max_weight_error=None, objective="quality"), too_coarse
    if hours is not None and error is not None:
        yield replace(timeless, max_weight_error=None), too_much


def _longer(workload: Workload, plan: Plan) -> list[str]:
    """The options of *workload*'s deadline and budget that *plan* does not keep, as it would."""
    hours = plan.wall.total_seconds / 3600
    usd = plan.offers[0].on_demand_usd if plan.offers else math.inf
    found: list[str] = []
    if workload.deadline_hours is not None and hours > workload.deadline_hours:
        found.append(f"--deadline-hours {math.ceil(hours * 100) / 100:g}")
    if workload.budget_usd is not None and usd < math.inf and (usd > workload.budget_usd or not found):
        found.append(f"--budget-usd {math.ceil(usd * 100) / 100:g}")
    return found


def _coarser(plan: Plan) -> str:
    return f"--max-weight-error {math.ceil(plan.weight_error * 1e4) / 1e4:g}"


def _first_that_fits(session: Session, group: tuple[Change, ...]) -> list[Remedy]:
    for change in group:
        try:
            check(change.workload, session.model, change.gpu)
        except RequestError:
            continue
        session.progress(f"trying {change.option}")
        changed = replace(session, gpu=change.gpu, adapter=change.workload.adapter)
        if change.workload.activations == "offload" and not _can_be_planned(changed, change.workload):
            continue  # for the host's memory, of which the device's says nothing
        peak = smallest_process_bytes(changed, change.workload)
        if peak <= allowed.budget_bytes(change.gpu, change.workload) + change.gpu.context_bytes:
            return [Remedy(option=change.option, peak_process_bytes=peak)]
    return []


def _can_be_planned(session: Session, workload: Workload) -> bool:
    considered, rank = space(session, workload)
    return session.solve(session.problem(workload, considered, rank), considered, 0) is not None


def smallest_process_bytes(session: Session, workload: Workload) -> int:
    """The lowest process peak of all configurations as lean as may be, weights too large for the GPU included.

    Where the model may be cut and does not fit whole, that is in as many stages as may be.
    """
    counts = stage_counts(workload, session.model)
    found = [_smallest_whole(session, workload)] if 1 in counts else []
    fits = found and found[0] <= allowed.budget_bytes(session.gpu, workload) + session.gpu.context_bytes
    if max(counts) > 1 and not fits:
        parts = part_counts(workload, session.model, max(counts))
        found.append(Staged(session, workload, max(counts), parts).smallest_process_bytes())
    return min(found)


def _smallest_whole(session: Session, workload: Workload) -> int:
    """The lowest process peak of all configurations with one strategy and no stages."""
    least = replace(workload, max_weight_error=None, deadline_hours=None)
    considered, rank = space(session, least)
    smallest_batch = min(cell.micro_batch_size for cell in considered)
    most_chunks = max(cell.loss_chunks for cell in considered)
    considered = tuple(c for c in considered if (c.micro_batch_size, c.loss_chunks) == (smallest_batch, most_chunks))
    open_to_it = allowed.strategies(least, session.gpu)
    lean = [s for s in open_to_it if s.activations in ("recompute", "offload")] or list(open_to_it)
    bits = min(allowed.BYTES_PER_WEIGHT[s.weight_format] for s in lean)
    lean = [s for s in lean if allowed.BYTES_PER_WEIGHT[s.weight_format] == bits]
    posed = session.problem(least, considered, rank, only=lambda strategy: strategy in lean)
    configuration = single.smallest(posed, considered)
    assert configuration is not None
    return session.trace(configuration).peak_reserved_bytes + session.gpu.context_bytes
