"""Whether documents are packed: two plans where both might be best, one where a bound tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from shallowflow.planner.packing import MASK_ALIGNMENT
from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.remedies import Infeasible
from shallowflow.planner.words import counted
from shallowflow.profiles import model_facts
from shallowflow.profiles.specs import ModelSpec

LEAST_PADDING_SHOWN = 0.02


def refusal(workload: Workload, model: ModelSpec) -> str | None:
    """What keeps documents from being packed; None if nothing does."""
    length = workload.sequence_length
    if length % MASK_ALIGNMENT:
        return f"a sequence of {length} tokens is no multiple of {MASK_ALIGNMENT}"
    return model_facts.why_not_packed(model.config, length)


class Best(Protocol):
    """Plans a workload that says whether documents are packed."""

    def __call__(self, workload: Workload, /, *, refused_in_full: bool = True) -> Plan:
        """Infeasible where nothing fits, with what would if it is *refused_in_full*."""


def decided(workload: Workload, model: ModelSpec, best: Best) -> Plan:
    """*best* of *workload* packed or not, whichever is wanted, or takes fewer hours on the wall.

    Raises:
        Infeasible: nothing fits.
    """
    if workload.packing is not None:
        return best(workload)
    plain, packed = replace(workload, packing=False), replace(workload, packing=True)
    if workload.num_packed_sequences is None:
        return _noted(best(plain), workload, _UNKNOWN)
    reason = refusal(workload, model)
    if reason is not None:
        padded = workload.padding_share(packing=False) >= LEAST_PADDING_SHOWN
        return _noted(best(plain), workload, f"Documents are not packed: {reason}." if padded else "")
    try:
        alone = best(plain)
    except Infeasible as error:
        if error.is_memory:  # packed steps need more memory; fewer of them may keep a deadline
            raise
        return _noted(best(packed), workload, "")
    return _faster(alone, workload, lambda: best(packed, refused_in_full=False))


def _faster(plain: Plan, workload: Workload, pack: Callable[[], Plan]) -> Plan:
    """*plain*, or what *pack* makes where that takes fewer hours.

    A packed step does all that another does, but for a few launches in which transformers finds positions, and makes
    and reads a mask besides: under the same limits none is faster than the best that is not packed. So where even at
    that one's speed the packed sequences would take as long, they are not planned.
    """
    num_steps = -(-workload.sequences(packing=True) // workload.global_batch_size)
    least = num_steps * plain.prediction.step_seconds
    if least >= plain.wall.training_seconds:
        padded = workload.padding_share(packing=False) >= LEAST_PADDING_SHOWN
        return _noted(plain, workload, _kept(plain, least, "at least ") if padded else "")
    try:
        packed = pack()
    except Infeasible:
        return _noted(plain, workload, "Packed documents fit in no way within these limits.")
    if packed.wall.total_seconds < plain.wall.total_seconds:
        return _noted(packed, workload, _gained(packed, plain))
    return _noted(plain, workload, _kept(plain, packed.wall.training_seconds))


_UNKNOWN = (
    "The work is given in tokens and its sequences are taken to be full, so that packing documents could only cost; "
    "--data tells their lengths."
)


def _noted(plan: Plan, workload: Workload, note: str) -> Plan:
    """*plan* for *workload* as it was asked for, with one more *note*."""
    return replace(plan, workload=workload, notes=(*plan.notes, *([note] if note else [])))


def _kept(plain: Plan, packed_seconds: float, qualified: str = "") -> str:
    work = plain.workload
    longer = packed_seconds / plain.wall.training_seconds - 1
    return (
        f"{work.padding_share(packing=False):.0%} of the positions are padding, most of which is trimmed off; packed, "
        f"the documents would fill {work.sequences(packing=True):,} of the {work.sequences(packing=False):,} sequences "
        f"and train {qualified}{longer:.0%} longer."
    )


def _gained(packed: Plan, plain: Plan) -> str:
    work = packed.workload
    longer = plain.wall.training_seconds / packed.wall.training_seconds - 1
    return (
        f"Packed, {work.padding_share(packing=True):.0%} of the positions are padding, not "
        f"{work.padding_share(packing=False):.0%}; one document to a sequence would take "
        f"{counted(plain.num_steps, 'step')}, not {packed.num_steps:,}, and {longer:.0%} longer."
    )
