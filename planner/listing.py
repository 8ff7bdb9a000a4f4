"""The whole choices that a point's prices leave open, listed: few, where its score is near the best choice's.

What scores less than so much may spend no more than the difference to the point's score: on columns that the prices
make dear, and on leaving room that has a price. Column by column, all counts are kept that this and the limits allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .certificate import SCALE
from .points import SECOND, Bounds, Floats, Point
from .relaxation import Relaxation

Whole = npt.NDArray[np.int64]
MOST_WAYS = 2_000
"""Ways of which there are few enough to look at each."""
TOLERANCE = 1e-9
"""Share of a limit by which it is widened, as these numbers are rounded: whoever lists looks at what is listed."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """A column whose count is chosen next.

    Attributes:
        most: how often it may be chosen.
        starts: layers of its group, where it is the first column of one; *ends*: whether it is the last.
        needs: what one layer takes of each limit.
        rest: what each layer takes at least that the group has left for its later columns.
        later: what all later groups take at least.
    """

    column: int
    most: float
    starts: int | None
    ends: bool
    needs: Floats
    rest: Floats
    later: Floats


@dataclass(frozen=True, slots=True)
class Listed:
    """Ways, the best first.

    Attributes:
        counts: of each column, a row a way.
        num_parts: parts of ways that were followed.
    """

    counts: Whole
    score_seconds: Floats
    num_parts: int


def ways_below(
    relaxation: Relaxation, point: Point, bounds: Bounds, below_seconds: float, most_parts: int
) -> Listed | None:
    """All ways within *bounds* that score less and keep the limits that *point* prices; None if there are too many."""
    lower, upper = relaxation.box(bounds)
    needs, limits = _rows(relaxation, point, below_seconds)
    room = limits - needs @ lower + TOLERANCE * np.maximum(1.0, np.abs(limits))
    places = [group.num_layers for group in relaxation.chain.groups]
    places = [n - round(float(lower[relaxation.group == number].sum())) for number, n in enumerate(places)]
    columns = _open_columns(relaxation.group, needs[0], room, places, upper - lower)
    if columns is None:
        return Listed(np.zeros((0, len(lower)), dtype=np.int64), np.zeros(0), 0)
    stages = _stages(columns, needs, places, upper - lower)
    found = _listed(stages, room, lower.astype(np.int64), most_parts)
    return None if found is None else replace(found, score_seconds=below_seconds - found.score_seconds)


def _rows(relaxation: Relaxation, point: Point, below_seconds: float) -> tuple[Floats, Floats]:
    """What columns need of, and what there is of: score and prices together, the score on either side, each limit."""
    chain, share = relaxation.chain, point.node.device_share / SCALE
    steps = chain.gradient_accumulation_steps
    sides = [steps * side + relaxation.penalty_seconds for side in (relaxation.device_seconds, relaxation.host_seconds)]
    outside = [chain.device_picoseconds / SECOND, chain.host_picoseconds / SECOND]
    below_seconds -= (chain.update_picoseconds + chain.penalty_beyond_picoseconds) / SECOND
    left = [below_seconds - steps * seconds for seconds in outside]
    needs = np.stack([share * sides[0] + (1 - share) * sides[1], *sides, *(p.needs for p in point.priced)])
    limits = np.array([share * left[0] + (1 - share) * left[1], *left, *(p.limit for p in point.priced)])
    prices = np.array([p.price for p in point.priced])
    needs[0] += prices @ needs[3:]
    limits[0] += prices @ limits[3:]
    return needs, limits


def _open_columns(
    group: npt.NDArray[np.int64], dear: Floats, room: Floats, places: Sequence[int], most: Floats
) -> list[list[int]] | None:
    """For each group the columns that may be used, the dearest first; None if no way is cheap enough.

    *dear* and the first *room* become what columns cost beyond their group's cheapest layers, and what is left for it;
    of columns that are used as often as they may be, that bound is priced.
    """
    found: list[list[int]] = []
    for number, left in enumerate(places):
        inside = np.flatnonzero((group == number) & (most > 0))
        inside = inside[np.argsort(-dear[inside], kind="stable")]
        enough = np.flatnonzero(np.cumsum(most[inside][::-1]) >= left)
        if left < 0 or (left > 0 and not len(enough)):
            return None
        found.append(inside.tolist() if left else [])
        if left:
            marginal = dear[inside[::-1][enough[0]]]
            room[0] += np.maximum(0.0, marginal - dear[inside]) @ most[inside] - left * marginal
            dear[inside] = np.maximum(0.0, dear[inside] - marginal)
    if room[0] < 0:
        return None
    return [[column for column in columns if dear[column] <= room[0]] for columns in found]


def _stages(columns: list[list[int]], needs: Floats, places: Sequence[int], most: Floats) -> list[_Stage]:
    """All columns, small groups first, whose last columns leave little to choose."""
    found: list[_Stage] = []
    later = np.zeros(len(needs))
    for number in sorted(range(len(places)), key=lambda number: -places[number]):
        inside = columns[number]
        least = np.minimum.accumulate(needs[:, inside[::-1]], axis=1)[:, ::-1]
        for at, column in reversed(list(enumerate(inside))):
            ends = at == len(inside) - 1
            rest = needs[:, column] if ends else least[:, at + 1]
            starts = places[number] if at == 0 else None
            found.append(_Stage(column, float(most[column]), starts, ends, needs[:, column], rest, later))
        later = later + places[number] * least[:, 0] if inside else later
    return found[::-1]


def _listed(stages: list[_Stage], room: Floats, lower: Whole, most_parts: int) -> Listed | None:
    """Each part of a way, a row of room and the layers that its group has left, with every count of the next column."""
    rooms, left = room[None, :], np.zeros(1, dtype=np.int64)
    chosen: list[tuple[Whole, Whole]] = []
    num_parts = 0
    for stage in stages:
        if stage.starts is not None:
            left = np.full(len(rooms), stage.starts, dtype=np.int64)
        least, greatest = _ranges(stage, rooms, left)
        number = np.maximum(0, greatest - least + 1)
        num_parts += int(number.sum())
        if num_parts > most_parts:
            return None
        parent = np.repeat(np.arange(len(rooms)), number)
        counts = least[parent] + np.arange(len(parent)) - (np.cumsum(number) - number)[parent]
        rooms, left = rooms[parent] - counts[:, None] * stage.needs, left[parent] - counts
        chosen.append((parent, counts))
    if len(rooms) > MOST_WAYS:
        return None
    below = np.minimum(rooms[:, 1], rooms[:, 2])
    best = np.argsort(-below, kind="stable")
    below = below[best]
    ways = np.tile(lower, (len(best), 1))
    for stage, (parent, counts) in zip(reversed(stages), reversed(chosen), strict=True):
        ways[:, stage.column] += counts[best]
        best = parent[best]
    return Listed(ways, below, num_parts)


def _ranges(stage: _Stage, rooms: Floats, left: Whole) -> tuple[Whole, Whole]:
    """How often a column may be chosen after each part of a way, least and most, if later ones take the least."""
    spare = rooms - stage.later - left[:, None] * stage.rest
    more = stage.needs - stage.rest
    greatest = np.minimum(left, stage.most)
    least = left.astype(np.float64) if stage.ends else np.zeros(len(left))
    raises, lowers = more > 0, more < 0
    if raises.any():
        greatest = np.minimum(greatest, np.floor((spare[:, raises] / more[raises]).min(axis=1)))
    if lowers.any():
        least = np.maximum(least, np.ceil((spare[:, lowers] / more[lowers]).max(axis=1)))
    level = ~(raises | lowers)
    greatest[(spare[:, level] < 0).any(axis=1)] = -1
    return np.minimum(least, left + 1).astype(np.int64), np.maximum(greatest, -1).astype(np.int64)
