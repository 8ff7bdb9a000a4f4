"""Whole choices near a point of the relaxation: rounded, repaired and improved by moving single layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .chain import Chain, Counts, Limits, Taken, taken
from .points import Floats
from .relaxation import Relaxation

MOST_MOVES = 40
"""Moves that are tried, the most promising first, before a choice is taken for the best near it."""

MOST_PAIRED = 600
"""Moves of which two together are looked at."""

NEARLY = 1e-8
"""Share of a score, or of a second, within which it is known where it was rounded."""

Moves = tuple[int, ...]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One way to choose, and what it takes."""

    counts: Counts
    taken: Taken


class Neighbours:
    """Whole choices of one chain, and the moves of one layer from a choice to another of its group."""

    def __init__(self, chain: Chain, limits: Limits, relaxation: Relaxation) -> None:
        self.chain, self.limits, self._relaxation = chain, limits, relaxation
        group = relaxation.group
        pairs = np.argwhere((group[:, None] == group[None, :]) & ~np.eye(len(group), dtype=bool))
        self._source, self._target = pairs[:, 0], pairs[:, 1]
        steps = chain.gradient_accumulation_steps
        penalty = self._changes("penalty_picoseconds")
        self._on_device = steps * self._changes("device_picoseconds") + penalty
        self._on_host = steps * self._changes("host_picoseconds") + penalty
        through = ("resident_bytes", "forward_change_bytes", "release_bytes")
        self._memory = np.sum([self._changes(name) for name in through], axis=0)
        self._device, self._host_time = self._values("device_picoseconds"), self._values("host_picoseconds")
        self._harm, self._host = self._changes("harm"), self._changes("host_bytes")

    def nearest(self, counts: Floats) -> tuple[Whole, Chosen]:
        """*counts* rounded: within each group the largest rests up, the others down."""
        whole = np.floor(counts + 1e-6).astype(np.int64)
        for number, group in enumerate(self.chain.groups):
            inside = np.flatnonzero(self._relaxation.group == number)
            left = group.num_layers - int(whole[inside].sum())
            whole[inside[np.argsort(whole[inside] - counts[inside], kind="stable")][:left]] += 1
        return whole, self._judged(whole)

    def best_of(self, ways: Whole, score_seconds: Floats) -> tuple[Chosen | None, int]:
        """The best of *ways* that is within the limits, where they come in the order of scores known nearly.

        The second of what is returned is how many were looked at.
        """
        best, enough = None, float("inf")
        looked_at = 0
        for counts, seconds in zip(ways, score_seconds.tolist(), strict=True):
            if seconds > enough:
                break
            looked_at += 1
            chosen = self._judged(counts)
            better = best is None or chosen.taken.score_picoseconds < best.taken.score_picoseconds
            if better and chosen.taken.within(self.limits):
                best, enough = chosen, min(enough, seconds + NEARLY * max(1.0, seconds))
        return best, looked_at

    def around(self, start: Floats) -> Iterator[Chosen]:
        """The choice nearest to *start*, repaired where it is not allowed, and better and better ones from there."""
        counts, chosen = self.nearest(start)
        if not chosen.taken.within(self.limits):
            repaired = self.repaired(counts, chosen)
            if repaired is None:
                return
            counts, chosen = repaired
        yield chosen
        yield from self.improved(counts, chosen)

    def repaired(self, counts: Whole, chosen: Chosen) -> tuple[Whole, Chosen] | None:
        """*counts* with layers moved, each time to where what is too much shrinks most per second, until all fits."""
        for _ in range(2 * int(counts.sum())):
            if chosen.taken.within(self.limits):
                return counts, chosen
            relief = self._relief(chosen.taken)
            able = (counts[self._source] > 0) & (relief > 0)
            if not np.any(able):
                return None
            costs = np.where(able, self._gains(counts) / np.where(able, relief, 1.0), np.inf)
            counts = self._moved(counts, int(np.argmin(costs)))
            chosen = self._judged(counts)
        return None

    def improved(self, counts: Whole, chosen: Chosen) -> Iterator[Chosen]:
        """Better and better choices, one layer moved at a time, or two where one alone gains nothing."""
        for _ in range(2 * int(counts.sum())):
            better = self._first_better(self._single(counts), counts, chosen)
            if better is None:
                better = self._first_better(self._pairs(counts, chosen.taken), counts, chosen)
            if better is None:
                return
            counts, chosen = better
            yield chosen

    def _first_better(self, moves: Iterable[Moves], counts: Whole, chosen: Chosen) -> tuple[Whole, Chosen] | None:
        for move in moves:
            other = counts
            for single in move:
                other = self._moved(other, single)
            if int(other.min()) < 0:
                continue
            judged = self._judged(other)
            better = judged.taken.score_picoseconds < chosen.taken.score_picoseconds
            if better and judged.taken.within(self.limits):
                return other, judged
        return None

    def _single(self, counts: Whole) -> list[Moves]:
        """Moves of one layer that gain, the most promising first."""
        gains = self._gains(counts)
        able = np.flatnonzero((counts[self._source] > 0) & (gains < 0))
        return [(move,) for move in able[np.argsort(gains[able], kind="stable")][:MOST_MOVES].tolist()]

    def _pairs(self, counts: Whole, found: Taken) -> list[Moves]:
        """Two moves that gain together and seem to find room, the most promising first."""
        able = np.flatnonzero(counts[self._source] > 0)
        if len(able) > MOST_PAIRED:
            return []
        gains, memory = self._gains(counts)[able], self._memory[able]
        room = self.limits.memory_bytes - found.peak_bytes
        both = gains[:, None] + gains[None, :]
        both[memory[:, None] + memory[None, :] > room] = 0.0
        both = np.triu(both)
        first, second = np.unravel_index(np.argsort(both, axis=None, kind="stable")[:MOST_MOVES], both.shape)
        return [
            (int(able[a]), int(able[b])) for a, b in zip(first.tolist(), second.tolist(), strict=True) if both[a, b] < 0
        ]

    def _changes(self, name: str) -> Floats:
        values = self._values(name)
        return np.asarray(values[self._target] - values[self._source])

    def _values(self, name: str) -> Floats:
        return np.array([getattr(column.value, name) for column in self._relaxation.columns], dtype=np.float64)

    def _judged(self, counts: Whole) -> Chosen:
        made = self._relaxation.as_counts(counts)
        return Chosen(made, taken(self.chain, made))

    def _moved(self, counts: Whole, move: int) -> Whole:
        moved = counts.copy()
        moved[self._source[move]] -= 1
        moved[self._target[move]] += 1
        return moved

    def _gains(self, counts: Whole) -> Floats:
        """By how much each move changes the score, as long as the same one of device and host is the bound."""
        device = self.chain.device_picoseconds + float(counts @ self._device)
        host = self.chain.host_picoseconds + float(counts @ self._host_time)
        return self._on_device if device >= host else self._on_host

    def _relief(self, found: Taken) -> Floats:
        """By how much each move shrinks what is too much, each limit's excess as a share of the limit."""
        limits = self.limits
        steps = self._on_device
        limited = (
            (found.peak_bytes, limits.memory_bytes, self._memory),
            (found.harm, limits.harm, self._harm),
            (found.host_bytes, limits.host_bytes, self._host),
            (found.step_picoseconds, limits.step_picoseconds, steps),
        )
        shares = [-changes / max(1, limit) for value, limit, changes in limited if limit is not None and value > limit]
        return np.asarray(np.sum(shares, axis=0))
