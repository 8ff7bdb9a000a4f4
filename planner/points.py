"""What the search knows of a part of a chain's choices: the best that layers which could be divided would do there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .certificate import Node
from .chain import Choice

Floats = npt.NDArray[np.float64]
SECOND = 1e12
"""Picoseconds in one."""
Bounds = Mapping[int, tuple[int, int]]
"""How often a column's choice is made, least and most, where that is bounded."""


@dataclass(frozen=True, slots=True)
class Column:
    """One choice that a group may make."""

    group: int
    choice: int
    value: Choice


@dataclass(frozen=True, slots=True)
class Priced:
    """A limit that has a price: what each column needs of it, how much there is, and seconds per unit."""

    needs: Floats
    limit: float
    price: float


@dataclass(frozen=True, slots=True)
class Point:
    """The best there is in a box if layers could be divided.

    Attributes:
        counts: of each column.
        reduced_seconds: what one more of each column costs; less than nothing if there are as many as there may be.
        node: the leaf that proves *score_seconds*, or that nothing here is within the limits.
        priced: the limits that have a price there.
    """

    score_seconds: float
    counts: Floats
    reduced_seconds: Floats
    node: Node
    priced: tuple[Priced, ...] = ()
