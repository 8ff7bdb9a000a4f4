"""Whether a proof holds for a plan, by the proof alone."""

from __future__ import annotations

from collections.abc import Sequence

from .needs import Unproven
from .open_ways import OpenWays
from .proof import OPTIMAL_GAP, Proof, bound, gap, limits, weigh
from .strategies import Cell, Configuration


def verify(proof: Proof, configuration: Configuration, expected: Sequence[Cell]) -> list[str]:
    """What is wrong with *proof* as one of *configuration*, in a space of the *expected* cells; nothing if it holds."""
    try:
        return _doubts(proof, configuration, expected)
    except Unproven as error:
        return [str(error)]


def _doubts(proof: Proof, configuration: Configuration, expected: Sequence[Cell]) -> list[str]:
    found = _strange(proof, configuration, expected)
    cut = {cell.cell for cell in proof.unfragmented}
    own, needs = weigh(proof, configuration)
    if needs.score_picoseconds < 1:
        raise Unproven(f"the plan scores {needs.score_picoseconds}, and every step takes time")
    found += [
        f"the plan's {name} is {value}, more than its limit of {limit}"
        for name, value, limit in needs.excess(limits(proof, own))
    ]
    if needs.score_picoseconds != proof.score_picoseconds:
        found.append(f"the plan scores {needs.score_picoseconds}, its proof says {proof.score_picoseconds}")
    if own.memory_bytes > proof.budget_bytes:
        found.append(f"the plan's cell has {own.memory_bytes} bytes, more than the budget of {proof.budget_bytes}")
    whole = [cell for cell in proof.cells if cell.cell not in cut]
    for cell in (*whole, *proof.unfragmented):
        if cell.memory_bytes < proof.budget_bytes:
            found.append(f"a cell was searched with {cell.memory_bytes} bytes, not the budget of {proof.budget_bytes}")
    opened = OpenWays()
    bounds = {cell.cell: bound(proof, cell, opened) for cell in proof.cells}
    before = [bound(proof, cell, opened) for cell in proof.unfragmented] + [bounds[cell.cell] for cell in whole]
    for name, claimed, shown in (
        ("gap", proof.gap, gap(needs.score_picoseconds, list(bounds.values()))),
        ("unfragmented_gap", proof.unfragmented_gap, gap(needs.score_picoseconds, before)),
    ):
        if shown > claimed + OPTIMAL_GAP / 1000:
            found.append(f"{name} is said to be {claimed:.2g} and shown to be {shown:.2g}")
    if proof.status == "optimal" and proof.gap > OPTIMAL_GAP:
        found.append(f"a plan that might be beaten by {proof.gap:.2g} is said to be optimal")
    return found


def _strange(proof: Proof, configuration: Configuration, expected: Sequence[Cell]) -> list[str]:
    """Cells that are missing; Unproven where there are others, or tables of another model."""
    found: list[str] = []
    spoken = {cell.cell for cell in proof.cells}
    missing, beyond = set(expected) - spoken, spoken - set(expected)
    if missing:
        found.append(f"{len(missing)} of {len(expected)} cells have no proof, such as {next(iter(missing))}")
    if beyond:
        raise Unproven(
            f"{len(beyond)} cells are not among those that the workload allows, such as {next(iter(beyond))}"
        )
    cut = {cell.cell for cell in proof.unfragmented}
    if len(spoken) < len(proof.cells) or len(cut) < len(proof.unfragmented) or not cut <= spoken:
        raise Unproven("the proof speaks of a cell twice, or of its memory before a cut that it does not speak of")
    if any(sum(group.num_layers for group in table) != configuration.num_layers for table in proof.tables):
        raise Unproven(f"the plan has {configuration.num_layers} layers, a table of its proof another number")
    return found
