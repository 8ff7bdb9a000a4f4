"""What a plan's tables say of each layer, where its model is cut into stages."""

from __future__ import annotations

from .chain import Choice
from .needs import Unproven
from .proof import NUMBERS, Proof, TableGroup
from .staged_cell import StagedCell


def layers_of(proof: Proof, staged: StagedCell) -> list[tuple[Choice, ...]]:
    """Each layer's choices; Unproven where the tables do not hold any."""
    if staged.table >= len(proof.tables):
        raise Unproven(f"there is no table {staged.table}")
    found: list[tuple[Choice, ...]] = []
    for group in proof.tables[staged.table]:
        found += [choices_of(proof, group)] * group.num_layers
    return found


def choices_of(proof: Proof, group: TableGroup) -> tuple[Choice, ...]:
    """What layers of a *group* may be given; Unproven where the table does not say."""
    rows = group.choices
    if not rows or any(len(row) != 1 + len(NUMBERS) or not 0 <= row[0] < len(proof.strategies) for row in rows):
        raise Unproven("a row of a table is not what a strategy takes")
    return tuple(Choice(strategy=proof.strategies[row[0]], **dict(zip(NUMBERS, row[1:], strict=True))) for row in rows)
