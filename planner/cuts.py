"""Where to cut a chain of layers into stages: exact, given what each stretch of layers takes as each stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
FAR = 2**60
"""What a stretch takes that cannot be a stage."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The best stretches of layers as stages.

    Attributes:
        total: what is minimized.
        starts: the first layer of each stage.
        ways: which of its ways each stage takes.
    """

    total: int
    starts: tuple[int, ...]
    ways: tuple[int, ...]


def best_cut(rising: Ints, adding: Ints) -> Cut | None:
    """The cut whose largest *rising* and the sum of whose *adding* are least together; None if there is none.

    A pipeline waits for its slowest stage as often as there are micro-batches but one, and for every stage once.

    Both have the shape (stages, ways, layers + 1, layers + 1), with what stage s takes in way w that has the layers
    from i up to j; FAR is none. The least sum with no more than so much rising is a shortest path. It is looked for
    again with less than the last one's, until the sum and the least rise that any cut has are more than what is known.
    """
    flattest = _flattest(rising)
    best: Cut | None = None
    limit, is_first = flattest, True
    while limit < FAR:
        found = _least_sum(np.where((rising <= limit) & (adding < FAR), adding, FAR))
        if found is None or (best is not None and found.total + flattest >= best.total):
            break
        places = zip(found.starts, (*found.starts[1:], rising.shape[-1] - 1), strict=True)
        top = max(int(rising[s, way, i, j]) for (s, (i, j)), way in zip(enumerate(places), found.ways, strict=True))
        if best is None or found.total + top < best.total:
            best = Cut(found.total + top, found.starts, found.ways)
        limit, is_first = FAR - 1 if is_first else top - 1, False
    return best


def _flattest(rising: Ints) -> int:
    """The largest *rising* in the cut where it is the least; FAR where there is no cut."""
    num_places = rising.shape[-1]
    level = np.full(num_places, FAR, dtype=np.int64)
    level[0] = 0
    for least in rising.min(axis=1):
        level = np.maximum(level[:, None], least).min(axis=0)
    return int(level[-1])


def _least_sum(cost: Ints) -> Cut | None:
    """The cut whose *cost* is least in sum."""
    num_stages, _, num_places, _ = cost.shape
    way = cost.argmin(axis=1)
    least = cost.min(axis=1)
    level = np.full(num_places, FAR, dtype=np.int64)
    level[0] = 0
    came: list[Ints] = []
    for stage in range(num_stages):
        through = level[:, None] + least[stage]
        came.append(through.argmin(axis=0))
        level = np.minimum(through.min(axis=0), FAR)
    if level[-1] >= FAR:
        return None
    end, starts = num_places - 1, []
    for stage in range(num_stages - 1, -1, -1):
        starts.append(int(came[stage][end]))
        end = starts[-1]
    starts.reverse()
    ways = tuple(int(way[s, i, j]) for s, (i, j) in enumerate(zip(starts, (*starts[1:], num_places - 1), strict=True)))
    return Cut(int(level[-1]), tuple(starts), ways)
