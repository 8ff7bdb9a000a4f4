"""What coarser weights are held to be worth in plans in stages: the usual price of a unit of harm."""

from __future__ import annotations

from collections.abc import Sequence

from . import quality, schedule
from .chain import Choice
from .plan import Objective
from .problem import COARSEST
from .staged_cell import StagedCell

Layers = Sequence[Sequence[Choice]]
"""For each layer what it may be given."""


def usual_price(objective: Objective, cells: Sequence[tuple[StagedCell, Layers]]) -> int:
    """Picoseconds for a unit of harm in these *cells*: all layers at their coarsest cost WORTH of the fastest step."""
    if not cells:
        return 0
    fastest = min(_fastest_picoseconds(staged, layers) for staged, layers in cells)
    num_layers = len(cells[0][1])
    return int(quality.WORTH[objective] * fastest / (num_layers * quality.harm(COARSEST)))


def _fastest_picoseconds(staged: StagedCell, layers: Layers) -> int:
    """No step is faster: each layer's fastest strategy, as if layers could be divided into equal stages."""
    busy = staged.device_picoseconds + sum(min(choice.device_picoseconds for choice in choices) for choices in layers)
    even = busy // staged.num_stages
    return schedule.step_picoseconds([even] * staged.num_stages, staged.num_micro_batches, staged.num_parts)
