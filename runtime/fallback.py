"""When a device disagrees with a plan: which of its alternatives comes next."""

from __future__ import annotations

import gc
from collections.abc import Collection

import torch

from shallowflow.planner import words
from shallowflow.planner.plan import Candidate, Plan

from .meter import MeasuredPeak
from .record import FallbackRecord


class BeyondBudget(Exception):
    """A step that reserved more than was predicted, and more than the plan may."""


def is_short(error: RuntimeError) -> bool:
    """Whether *error* says that memory ran out: the allocator's own, a library's, the driver's, or a CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SHORT)


_SHORT = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "cudaErrorMemoryAllocation")
"""As CUDA and NCCL, cuBLAS, PyTorch's allocator for CPUs, and the locking of pages say it."""


def candidate(plan: Plan, alternative: int | None) -> Candidate:
    """The plan's own configuration with its prediction, or one of its alternatives."""
    if alternative is not None:
        return plan.alternatives[alternative]
    return Candidate(configuration=plan.configuration, prediction=plan.prediction, weight_error=plan.weight_error)


def following(plan: Plan, failed: Candidate, passed_over: Collection[int] = ()) -> int | None:
    """The best alternative that needs less memory than *failed* and goes on with its adapter and its data's order."""
    before = failed.configuration
    for number, other in enumerate(plan.alternatives):
        if number in passed_over:
            continue
        after = other.configuration
        same = (after.rank, after.alpha, after.sequence_length, after.global_batch_size, after.packing) == (
            before.rank,
            before.alpha,
            before.sequence_length,
            before.global_batch_size,
            before.packing,
        )
        if same and other.prediction.peak_reserved_bytes < failed.prediction.peak_reserved_bytes:
            return number
    return None


def check_budget(plan: Plan, failed: Candidate, peak: MeasuredPeak) -> None:
    """Give a configuration up that reserves more than predicted and than the plan's budget, where another is left.

    Raises:
        BeyondBudget: it does.
    """
    most = max(failed.prediction.peak_reserved_bytes, plan.budget_bytes)
    if peak.peak_reserved_bytes > most and following(plan, failed) is not None:
        reserved, predicted, allowed = (
            f"{number / 2**20:,.0f} MiB"
            for number in (peak.peak_reserved_bytes, failed.prediction.peak_reserved_bytes, plan.budget_bytes)
        )
        raise BeyondBudget(f"{reserved} reserved, {predicted} predicted and {allowed} allowed")


def told(record: FallbackRecord) -> str:
    """What a person reads of it."""
    configuration = record.configuration
    batch = f"{configuration.micro_batch_size} x {configuration.gradient_accumulation_steps}"
    return (
        f"memory fell short after step {record.step} ({record.reason}); "
        f"on with {words.summary(configuration)}, batch {batch}"
    )


def free_memory() -> None:
    """Give back what a dropped model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
