"""What is shown of plans in stages that must keep a deadline, or lose no more than so much by coarse weights.

A bound knows of neither. But it holds at any price of harm, and where a limit binds another price than the score's
shows more. Let the tables have the price p, the score p0, and no cut score less than L by the tables. With a step of s
and a harm of h, a plan has ``s + p h >= L``, and its score is ``s + p0 h``. So where p is the higher, and h at most H,
the score is at least ``L - (p - p0) H``; where it is the lower, at least L, and with s at most S
``(p0 L - (p0 - p) S) / p`` (Lagrange's bound). Any p gives one.
"""

from __future__ import annotations

from . import staged_bound
from .needs import Unproven
from .proof import Proof
from .staged_tables import choices_of


def least_score(proof: Proof) -> int | None:
    """What every plan of *proof*'s cells within its limits scores at least; None if nothing fits in any.

    Raises:
        Unproven: its tables show nothing of that.
    """
    least = staged_bound.least_of(proof, proof.staged)
    if least is None or not proof.harm_price:
        return least
    price, usual = tables_price(proof), proof.harm_price
    if price > usual:
        if proof.harm is None:
            raise Unproven("the proof's tables price harm higher than its score does, and nothing limits it")
        return least - (price - usual) * proof.harm
    if not price or proof.step_picoseconds is None:
        return least
    return max(least, (usual * least - (usual - price) * proof.step_picoseconds) // price)


def tables_price(proof: Proof) -> int:
    """What a unit of harm costs in all tables; the score's where none harms.

    Raises:
        Unproven: there is no such price.
    """
    choices = [c for table in proof.tables for group in table for c in choices_of(proof, group)]
    price = next((choice.penalty_picoseconds // choice.harm for choice in choices if choice.harm), proof.harm_price)
    if price < 0 or any(choice.penalty_picoseconds != price * choice.harm for choice in choices):
        raise Unproven("a penalty in a table is not its harm at one price")
    return price
