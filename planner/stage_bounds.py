"""What every stretch of layers takes at least as every stage, if layers could be divided among strategies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .chain import Choice
from .cuts import FAR, Ints
from .staged import EXCHANGES, Staging, at_once

Floats = npt.NDArray[np.float64]
SIDES = ("device_picoseconds", "host_picoseconds")


def least(staging: Staging, memory_bytes: Sequence[int], weight: int, host_bytes: int | None = None) -> Ints:
    """*weight* micro-batches' time and the penalties, at least, of layers i up to j as stage s: (stages, i, j).

    Layers of one kind would best be divided between two strategies next to each other on the hull of bytes and time:
    the price of memory at which both are as good gives the bound (Lagrange's). What may be sent to the host has a price
    as well, at which nothing is gained by it. FAR where even the leanest do not fit.
    """
    found = np.full((staging.num_stages, staging.num_layers + 1, staging.num_layers + 1), FAR, dtype=np.int64)
    for stage in range(staging.num_stages):
        found[stage] = _of_stage(staging, stage, memory_bytes[stage], weight, host_bytes)
    return found


def _of_stage(staging: Staging, stage: int, memory_bytes: int, weight: int, host_bytes: int | None) -> Ints:
    is_last = stage == staging.num_stages - 1
    kinds = staging.kinds()
    choices = [at_once(group.choices, staging.in_flight(stage)) for group in staging.groups]
    room = memory_bytes - staging.outside_bytes(stage) - _moment(staging, stage, choices)
    needs = [np.array([after_forward(choice) for choice in each], dtype=np.float64) for each in choices]
    sent = [np.array([choice.host_bytes for choice in each], dtype=np.float64) for each in choices]
    fits = _fits(needs, sent, kinds, room, host_bytes)
    best = np.zeros(fits.shape)
    for side in SIDES:
        costs = [_cost(each, side, weight) for each in choices]
        prices = np.unique(np.concatenate([[0.0], *(_prices(*each) for each in zip(needs, costs, sent, strict=True))]))
        outside = getattr(staging, side) if is_last else 0
        outside = weight * (outside + EXCHANGES * staging.message_picoseconds)
        for price in prices:
            values = [cost + price * need for need, cost in zip(needs, costs, strict=True)]
            for host_price in _host_prices(values, sent, host_bytes):
                cheapest = [(value + host_price * host).min() for value, host in zip(values, sent, strict=True)]
                left = price * room + host_price * (host_bytes or 0)
                best = np.maximum(best, _spans(np.array(cheapest)[kinds]) - left + outside)
    first, after = np.indices(fits.shape)
    return np.where(fits & (first < after), np.floor(best), FAR).astype(np.int64)


def _fits(
    needs: Sequence[Floats], sent: Sequence[Floats], kinds: Sequence[int], room: float, host_bytes: int | None
) -> npt.NDArray[np.bool_]:
    """Whether the leanest choices for layers i up to j may fit, as many of them on the host as it has room for."""
    fits: npt.NDArray[np.bool_] = _spans(np.array([need.min() for need in needs])[kinds]) <= room
    staying = [need[host == 0] for need, host in zip(needs, sent, strict=True)]
    if host_bytes is None or not all(map(len, staying)):
        return fits
    least_of = [need.min() for need in staying]
    spared = [
        ((low - need[host > 0]) / host[host > 0]).max(initial=0.0)
        for low, need, host in zip(least_of, needs, sent, strict=True)
    ]
    return fits & (_spans(np.array(least_of)[kinds]) - max(spared) * host_bytes <= room)


def _prices(needs: Floats, costs: Floats, sent: Floats) -> list[float]:
    """What a byte costs along the hulls of all choices, and of those that send nothing to the host."""
    stays = sent == 0
    return hull_prices(needs, costs) + hull_prices(needs[stays], costs[stays])


def _host_prices(values: Sequence[Floats], sent: Sequence[Floats], host_bytes: int | None) -> list[float]:
    """None, and the least for a byte of the host at which nothing is gained by it."""
    staying = [value[host == 0] for value, host in zip(values, sent, strict=True)]
    if host_bytes is None or not all(map(len, staying)):
        return [0.0]
    gains = [
        ((stay.min() - value[host > 0]) / host[host > 0]).max(initial=0.0)
        for stay, value, host in zip(staying, values, sent, strict=True)
    ]
    return [0.0, max(gains)] if max(gains) > 0 else [0.0]


def _moment(staging: Staging, stage: int, choices: Sequence[Sequence[Choice]]) -> int:
    """What is allocated at least beyond the layers' shares, once all are through their forward pass."""
    back = min(choice.backward_high_bytes for each in choices for choice in each)
    if stage < staging.num_stages - 1:
        return back
    return max(staging.head_high_bytes, staging.head_change_bytes + back)


def after_forward(choice: Choice) -> int:
    """A layer's share of what is allocated once all are through their forward pass."""
    return choice.resident_bytes + choice.forward_change_bytes + choice.release_bytes


def _cost(choices: Sequence[Choice], side: str, weight: int) -> Floats:
    return np.array([weight * getattr(c, side) + c.penalty_picoseconds for c in choices], dtype=np.float64)


def _spans(values: Floats) -> Floats:
    """Sums of *values*, one a layer, over the layers from i up to j: (i, j)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    spans: Floats = sums[None, :] - sums[:, None]
    return spans


def hull_prices(needs: Floats, costs: Floats) -> list[float]:
    """What a byte costs along the lower hull of *costs* over *needs*: between each two choices next to each other."""
    order = np.lexsort((costs, needs))
    hull: list[int] = []
    for index in order.tolist():
        if hull and costs[index] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(needs, costs, hull[-2], index) >= _slope(needs, costs, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return [_slope(needs, costs, a, b) for a, b in itertools.pairwise(hull)]


def _slope(needs: Floats, costs: Floats, lean: int, fast: int) -> float:
    """What a byte saves from a lean choice to a fast one."""
    more = float(needs[fast] - needs[lean])
    return float(costs[lean] - costs[fast]) / more if more > 0 else np.inf
