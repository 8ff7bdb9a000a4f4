"""What a byte is worth where choices differ in what they need and cost."""

from __future__ import annotations

import itertools

import numpy as np

from .cuts import Ints


def hull_prices(needs: Ints, costs: Ints) -> list[float]:
    """What a byte costs along the lower hull of *costs* over *needs*: between each two choices next to each other."""
    order = np.lexsort((costs, needs))
    hull: list[tuple[int, int]] = []
    for need, cost in zip(needs[order].tolist(), costs[order].tolist(), strict=True):
        if hull and cost >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (need, cost)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and need == hull[-1][0]:
            hull.pop()
        hull.append((need, cost))
    return [_slope(lean, fast) for lean, fast in itertools.pairwise(hull)]


def _slope(lean: tuple[int, int], fast: tuple[int, int]) -> float:
    """What a byte saves from a lean choice to a fast one."""
    more = fast[0] - lean[0]
    return (lean[1] - fast[1]) / more if more > 0 else float("inf")
