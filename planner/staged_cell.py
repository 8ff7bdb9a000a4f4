"""What a plan carries of a cell where its model is cut into stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from . import schedule
from .bounds import Int, Meta
from .needs import Whole
from .strategies import MOST_LAYERS, Cell, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedCell:
    """What the bounds of *cell* follow from where the model is cut into stages; see Staging."""

    cell: Cell
    num_stages: Annotated[int, Meta(ge=2, le=MOST_LAYERS)]
    num_parts: Parts = 1
    table: Whole
    fixed_bytes: tuple[Int, ...]
    head_high_bytes: Int
    head_change_bytes: Int
    device_picoseconds: Int
    host_picoseconds: Int
    update_high_bytes: Int
    update_picoseconds: Int
    message_bytes: Int
    message_picoseconds: Int

    @property
    def num_micro_batches(self) -> int:
        """Of a step of one replica."""
        return self.cell.gradient_accumulation_steps

    def in_flight(self, stage: int) -> tuple[int, ...]:
        """Micro-batches of which each part of a *stage* holds activations at once."""
        return schedule.in_flight(self.num_stages, self.num_parts, self.num_micro_batches, stage)

    def most_in_flight(self, stage: int) -> tuple[int, ...]:
        """The most of each part at any time."""
        return schedule.most_in_flight(self.num_stages, self.num_parts, self.num_micro_batches, stage)

    def outside_bytes(self, stage: int) -> int:
        """What a *stage* holds beside its layers: what stays, and messages."""
        held = schedule.messages(self.num_stages, self.num_parts, self.num_micro_batches, stage)
        return self.fixed_bytes[stage] + held * self.message_bytes

    def outside_picoseconds(self, stage: int, side: str) -> int:
        """What a micro-batch of a *stage* takes beside its layers: its messages, and the loss on the last."""
        own: int = getattr(self, side) if stage == self.num_stages - 1 else 0
        return own + EXCHANGES * self.num_parts * self.message_picoseconds


EXCHANGES = 2
"""Times that a part of a stage waits for a neighbour in a micro-batch: activations go one way, gradients the other.

PyTorch's schedule puts a send and a receive together and goes on once both are done (Schedule1F1B). The interleaved one
does not wait for what it sends, which is not counted on here.
"""
SIDES = ("device_picoseconds", "host_picoseconds")
"""Either of which may be what a micro-batch waits for."""
