"""The search of each cell by itself, the best over several, and at which prices of harm they are searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .arrangement import prices, repriced
from .branch import BranchAndBound
from .chain import Chain, Limits, Taken
from .neighbours import Chosen
from .problem import SECOND
from .strategies import Cell

MOST_NODES = 1_500
"""Parts that one cell is divided into at most."""
FEW_NODES = 60
"""The same, for alternatives, which are to be good and need no proof."""
MOST_PRICINGS = 4
"""Times that the harms of layers that differ are priced anew, each time by what was best at the prices before."""


@dataclass(slots=True)
class CellSearch:
    """One cell: its chain, and how much of its memory is left after what traced steps were fragmented by."""

    cell: Cell
    chain: Chain
    limits: Limits
    search: BranchAndBound = field(init=False)
    first: BranchAndBound = field(init=False)
    cuts: int = 0

    def __post_init__(self) -> None:
        self.search = self.first = BranchAndBound(self.chain, self.limits)

    def cut(self, to_bytes: int) -> None:
        """Search it anew with so much memory."""
        self.cuts += 1
        self.tighten(replace(self.limits, memory_bytes=to_bytes))

    def too_harmful(self, found: Taken) -> bool:
        """Whether what was *found* harms more than it may, though its prices promised less; then less is looked for."""
        most, now = self.first.limits.harm, self.limits.harm
        if most is None or now is None or found.harm <= most:
            return False
        self.tighten(replace(self.limits, harm=now - (found.harm - most)))
        return True

    def tighten(self, limits: Limits) -> None:
        """Search it anew within other limits."""
        self.limits = limits
        self.search = BranchAndBound(self.chain, self.limits)


def best_of(cells: Sequence[CellSearch], most_nodes: int) -> tuple[CellSearch, Chosen] | None:
    """The best over all cells; one whose bound is no better than what is known is not looked into."""
    best: tuple[CellSearch, Chosen] | None = None
    least = float("inf")
    for at in sorted(cells, key=lambda at: at.search.bound_seconds):
        if at.search.bound_seconds >= least:
            continue
        chosen = at.search.search(least, most_nodes).best
        if chosen is not None:
            best, least = (at, chosen), chosen.taken.score_picoseconds / SECOND
    return best


def priced(chains: dict[Cell, Chain], limits: Limits) -> dict[Cell, Chain]:
    """*chains* whose layers differ in harm, at prices that what is best at them supports; nothing is traced."""
    found, looked_at = chains, chains
    told: object = None
    for _ in range(MOST_PRICINGS):
        best = best_of([CellSearch(cell, chain, limits) for cell, chain in looked_at.items()], FEW_NODES)
        if best is None:
            break
        at, chosen = best
        new = prices(at.chain, chosen.counts)
        if new == told:
            break
        told = new
        found = {cell: repriced(chain, new) for cell, chain in chains.items()}
        looked_at = {at.cell: found[at.cell]}
    return found


def proving(cells: Sequence[CellSearch], found: CellSearch, chosen: Chosen, limits: Limits) -> list[CellSearch]:
    """*cells* searched again at prices of harm that what was *chosen* in *found* supports, where its bound is tightest.

    Nothing is traced: cells keep the memory that they were cut to.
    """
    told = prices(found.chain, chosen.counts)
    again: list[CellSearch] = []
    for at in cells:
        one = CellSearch(at.cell, repriced(at.chain, told), limits)
        if at.cuts:
            one.cut(at.limits.memory_bytes)
        one.search.search(chosen.taken.score_picoseconds / SECOND, MOST_NODES)
        again.append(one)
    return again
