"""What every cut of a model into stages takes at least, by a plan's own tables; nothing that a search found is used.

Whatever stage is the slowest, a step takes its micro-batch's time as often as there are micro-batches and every other
stage's once, or that of one of its parts where stages are interleaved. So for each stage and stretch of layers let
``once`` and ``often`` be no more than the time and penalties of one micro-batch, and of that many. A cut takes at least
the sum of its stages' ``once`` and the largest rise from there to ``often``. Both follow from prices of memory:
whatever each layer gets, what its stage takes is at least the sum of its layers' cheapest choices, each at its seconds
and its priced bytes, less the price of the stage's room, and of what it may send to the host (Lagrange's bound). The
least over all cuts is a shortest path.

Memory is looked at when all layers are through their forward pass, and when the one whose backward pass needs the most
begins it: those behind it may have let go of what they saved for this micro-batch, and of nothing else. How much that
one needs is gone through in a few cases. Of interleaved stages the second is left out: later parts may be through with
all of theirs by then. All is whole numbers; prices are rounded to shares of a picosecond, and any price gives a bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from . import schedule
from .chain import Choice
from .cuts import FAR, Cut, Ints, best_cut
from .hull import hull_prices
from .needs import Unproven
from .proof import Proof
from .staged_cell import SIDES, StagedCell
from .staged_tables import layers_of

MOST_CASES = 3
"""Of how much the backward pass that needs the most needs."""
FINEST = 2**20
"""Parts of a picosecond in which prices are counted, where numbers of 64 bits have room for it."""
MOST = 2**60
"""No sum may be larger, and no step longer, in bytes and picoseconds: thirteen days."""
LARGE = MOST // 2**14
"""For one of at most ten thousand layers, what none takes."""

Masks = Sequence[npt.NDArray[np.bool_]]


def bound(proof: Proof, staged: StagedCell) -> int | None:
    """What every cut of a cell within the budget scores at least; None if none is."""
    layers = layers_of(proof, staged)
    if not layers or staged.num_stages != len(staged.fixed_bytes):
        raise Unproven("a cell does not say what each of its stages holds")
    found = Bounds(staged, layers, proof.host_bytes).cut([proof.budget_bytes] * staged.num_stages)
    return None if found is None else found.total


def least_of(proof: Proof, cells: Sequence[StagedCell]) -> int | None:
    """The least of the bounds of *cells*; None if nothing fits in any. What is no less at a glance is passed over."""
    glances = [at_a_glance(staged, layers_of(proof, staged)) for staged in cells]
    least: int | None = None
    for number in sorted(range(len(cells)), key=glances.__getitem__):
        if least is not None and glances[number] >= least:
            break
        found = bound(proof, cells[number])
        if found is not None and (least is None or found < least):
            least = found
    return least


def at_a_glance(staged: StagedCell, layers: Sequence[Sequence[Choice]]) -> int:
    """What any cut of *layers* takes at least, whatever memory there is: as if they were shared out evenly."""
    stages, side = staged.num_stages, "device_picoseconds"
    busy = sum(min(choice.device_picoseconds for choice in choices) for choices in layers)
    busy += sum(staged.outside_picoseconds(stage, side) for stage in range(stages))
    update = staged.update_picoseconds * -(-len(layers) // stages)
    parts, even = staged.num_parts, busy // stages
    rounded = 0 if parts == 1 else stages  # each stage's part of a picosecond may be lost
    return busy // parts - rounded + staged.num_micro_batches * even - even // parts + update


@dataclass(frozen=True, slots=True)
class _Moment:
    """What is allocated at some time: each choice's part, of every kind of layer, and what is left for them."""

    needs: Sequence[Ints]
    room: int


class Bounds:
    """What stretches of *layers* take at least as stages of a cell, with so much of the host's memory for each.

    Raises:
        Unproven: numbers are beyond any step.
    """

    def __init__(self, staged: StagedCell, layers: Sequence[tuple[Choice, ...]], host_bytes: int | None) -> None:
        self.staged, self.num_layers = staged, len(layers)
        self.host_bytes = None if host_bytes is None else min(host_bytes, MOST)
        facts = (len(layers), staged.num_stages, staged.num_parts)
        if staged.num_parts > 1 and len(layers) % (staged.num_stages * staged.num_parts):
            raise Unproven(f"{len(layers)} layers are not divided evenly into the parts of stages")
        there = list(zip((layers[n] for n in schedule.order(*facts)), schedule.parts(*facts), strict=True))
        found = list(dict.fromkeys(there))
        self._kinds, self._part_of = [choices for choices, _ in found], [part for _, part in found]
        kind_of = np.array([found.index(one) for one in there])
        through = np.zeros((len(self._kinds), len(layers) + 1), dtype=np.int64)
        through[:, 1:] = np.cumsum(kind_of == np.arange(len(self._kinds))[:, None], axis=1)
        first, after = np.indices((len(layers) + 1, len(layers) + 1))
        self._is_stretch = first < after
        if staged.num_parts > 1:
            each = len(layers) // staged.num_stages
            self._is_stretch = np.logical_and(first % each == 0, after == first + each)
        spans = np.where(self._is_stretch, through[:, None, :] - through[:, :, None], 0)
        counts, place = np.unique(spans.reshape(len(self._kinds), -1), axis=1, return_inverse=True)
        self._counts, self._place = counts, place.reshape(spans.shape[1:])
        self._known: dict[tuple[int, int, int, int], Ints] = {}
        self._check()
        self._ends = [
            _of(kind, lambda c: c.backward_high_bytes + max(0, -c.backward_change_bytes)) for kind in self._kinds
        ]
        self._sent = [_of(kind, lambda c: c.host_bytes) for kind in self._kinds]

    def _check(self) -> None:
        staged = self.staged
        seconds = ("device_picoseconds", "host_picoseconds")
        held = ("resident_bytes", "forward_change_bytes", "release_bytes", "backward_change_bytes", "host_bytes")
        outside = (
            *(staged.device_picoseconds, staged.host_picoseconds, staged.message_picoseconds),
            staged.update_picoseconds,
        )
        longest = sum(self._largest(name) for name in seconds) + sum(map(abs, outside))
        every = self.num_layers + 2 * staged.num_parts * staged.num_stages
        worth = self._largest("penalty_picoseconds") * self.num_layers  # counted once, whatever the micro-batches
        if longest * staged.num_micro_batches * every + worth >= FAR // 2:
            raise Unproven("a cell takes longer than any step")
        beside = (*staged.fixed_bytes, staged.head_high_bytes, staged.head_change_bytes, staged.message_bytes)
        most = max(*map(self._largest, (*held, "backward_high_bytes")), *map(abs, beside))
        if most * staged.num_stages * staged.num_parts * max(self.num_layers, 8) * len(held) >= MOST:
            raise Unproven("a cell takes more memory than there is")

    def _largest(self, name: str) -> int:
        return max(abs(int(getattr(choice, name))) for kind in self._kinds for choice in kind)

    def cut(self, memory_bytes: Sequence[int]) -> Cut | None:
        """Where the bounds are least together, with so much memory for each stage, and what any cut scores at least."""
        stages, weight = range(self.staged.num_stages), self.staged.num_micro_batches
        if not self._may_fit(memory_bytes):
            return None
        once = np.array([self.once(stage, memory_bytes[stage]) for stage in stages])
        often = np.array([self.least(stage, memory_bytes[stage], weight) for stage in stages])
        return self.least_cut(once, often)

    def once(self, stage: int, memory_bytes: int) -> Ints:
        """The time of a part, for one micro-batch, and the penalties of the stage, at least; see ``least``."""
        return self.least(stage, memory_bytes, 1, self.staged.num_parts)

    def _may_fit(self, memory_bytes: Sequence[int]) -> bool:
        """Whether there is a cut none of whose stages is too large."""
        reached: npt.NDArray[np.bool_] = np.zeros(self.num_layers + 1, dtype=np.bool_)
        reached[0] = True
        for stage, memory in enumerate(memory_bytes):
            fits = np.zeros(self._counts.shape[1], dtype=np.bool_)
            for low, high in self._cases():
                allowed = [ends <= high for ends in self._ends]
                fits |= self._all_fit(self._moments(stage, memory, allowed, low), self._sent_by(stage, allowed))
            reached = np.any(reached[:, None] & self._is_stretch & fits[self._place], axis=0)
        return bool(reached[-1])

    def least_cut(self, once: Ints, often: Ints) -> Cut | None:
        """The cut where *once* and the largest rise to *often* are least together, with the update."""
        rising = np.where((once < FAR) & (often < FAR), np.maximum(often - once, 0), FAR)
        found = best_cut(rising[:, None], once[:, None])
        if found is None:
            return None
        update = self.staged.update_picoseconds * -(-self.num_layers // self.staged.num_stages)
        return Cut(found.total + update, found.starts, found.ways)

    def least(self, stage: int, memory_bytes: int, weight: int, parts: int = 1) -> Ints:
        """*weight* micro-batches' time and the penalties, at least, of places i up to j as a *stage*: (i, j).

        Of a stage in so many *parts* it is the time of one.
        """
        asked = (stage, memory_bytes, weight, parts)
        if asked not in self._known:
            least = np.full(self._counts.shape[1], FAR, dtype=np.int64)
            for low, high in self._cases():
                least = np.minimum(least, self._in_case(stage, memory_bytes, (weight, parts), low, high))
            self._known[asked] = np.where(self._is_stretch, least[self._place], FAR)
        return self._known[asked]

    def _cases(self) -> list[tuple[int, int]]:
        """What the backward pass that needs the most needs, at least and at most, cut where the widest gaps are."""
        ends = np.unique(np.concatenate(self._ends))
        widest = np.argsort(-np.diff(ends), kind="stable")[: MOST_CASES - 1] + 1
        places = [0, *sorted(widest.tolist()), len(ends)]
        return [(int(ends[a]), int(ends[b - 1])) for a, b in itertools.pairwise(places)]

    def _in_case(self, stage: int, memory_bytes: int, times: tuple[int, int], low: int, high: int) -> Ints:
        """``least`` by numbers of layers, if no backward pass needs more than *high*, and one needs *low*."""
        allowed = [ends <= high for ends in self._ends]
        moments = self._moments(stage, memory_bytes, allowed, low)
        sent = self._sent_by(stage, allowed)
        weight, parts = times
        found = np.full(self._counts.shape[1], -FAR, dtype=np.int64)
        for moment in moments:
            for side in SIDES:
                seconds, penalty = attrgetter(side), attrgetter("penalty_picoseconds")
                costs = [
                    (weight * _of(kind, seconds) // parts + _of(kind, penalty))[open_]
                    for kind, open_ in zip(self._kinds, allowed, strict=True)
                ]
                outside = weight * self.staged.outside_picoseconds(stage, side) // parts
                found = np.maximum(found, self._shown(moment, costs, sent) + outside)
        return np.where(self._all_fit(moments, sent), found, FAR)

    def _sent_by(self, stage: int, allowed: Masks) -> list[Ints]:
        in_flight = self._in_flight(stage)
        return [n * each[open_] for n, each, open_ in zip(in_flight, self._sent, allowed, strict=True)]

    def _in_flight(self, stage: int) -> list[int]:
        """Micro-batches of which a layer of each kind holds activations at once."""
        held = self.staged.in_flight(stage)
        return [held[part] for part in self._part_of]

    def _all_fit(self, moments: Sequence[_Moment], sent: Sequence[Ints]) -> npt.NDArray[np.bool_]:
        fits: npt.NDArray[np.bool_] = np.logical_and.reduce([self._fits(moment, sent) for moment in moments])
        return fits

    def _moments(self, stage: int, memory_bytes: int, allowed: Masks, low: int) -> list[_Moment]:
        staged, in_flight = self.staged, self._in_flight(stage)
        is_last = stage == staged.num_stages - 1
        room = min(memory_bytes, MOST) - staged.outside_bytes(stage)
        held = [
            (_of(kind, lambda c: c.resident_bytes) + n * _of(kind, _saved_bytes))[open_]
            for kind, n, open_ in zip(self._kinds, in_flight, allowed, strict=True)
        ]
        freed = [
            _of(kind, lambda c: min(0, c.backward_change_bytes))[open_]
            for kind, open_ in zip(self._kinds, allowed, strict=True)
        ]
        change = staged.head_change_bytes if is_last else 0
        back = min(
            c.backward_high_bytes
            for kind, open_ in zip(self._kinds, allowed, strict=True)
            for c, is_open in zip(kind, open_, strict=True)
            if is_open
        )
        through = max(staged.head_high_bytes, change + back) if is_last else back
        if staged.num_parts > 1:
            return [_Moment(held, room - through)]
        return [_Moment(held, room - through), _Moment(_sums(held, freed), room - change - low)]

    def _fits(self, moment: _Moment, sent: Sequence[Ints]) -> npt.NDArray[np.bool_]:
        """Whether the leanest choices may fit, as many of them on the host as it has room for."""
        least = np.array([need.min(initial=LARGE) for need in moment.needs])
        fits: npt.NDArray[np.bool_] = least @ self._counts <= moment.room
        if self.host_bytes is None:
            return fits
        fits &= np.array([host.min(initial=LARGE) for host in sent]) @ self._counts <= self.host_bytes
        staying = [need[host == 0] for need, host in zip(moment.needs, sent, strict=True)]
        if not all(map(len, staying)):
            return fits
        lows = [int(need.min()) for need in staying]
        spared = 0
        for low, need, host in zip(lows, moment.needs, sent, strict=True):
            pairs = zip(need[host > 0].tolist(), host[host > 0].tolist(), strict=True)
            spared = max([spared, *(-((n - low) * self.host_bytes // h) for n, h in pairs)])
        fits &= np.array(lows) @ self._counts - spared <= moment.room
        return fits

    def _shown(self, moment: _Moment, costs: Sequence[Ints], sent: Sequence[Ints]) -> Ints:
        """The most that prices of memory, and of the host's, show for each number of layers of each kind."""
        found = np.full(self._counts.shape[1], -FAR, dtype=np.int64)
        prices, parts = self._prices(moment, costs, sent)
        values = [
            parts[:, None] * cost + prices[:, None] * need for cost, need in zip(costs, moment.needs, strict=True)
        ]
        for host_prices in self._host_prices(values, sent):
            worth = [
                (value + host_prices[:, None] * host).min(axis=1, initial=MOST // 2 // self.num_layers)
                for value, host in zip(values, sent, strict=True)
            ]
            left = prices * moment.room + host_prices * (self.host_bytes or 0)
            rows = (np.array(worth).T @ self._counts - left[:, None]) // parts[:, None]
            found = np.maximum(found, rows.max(axis=0))
        return found

    def _prices(self, moment: _Moment, costs: Sequence[Ints], sent: Sequence[Ints]) -> tuple[Ints, Ints]:
        """Prices of a byte, in which parts of a picosecond; none, and those at which two choices are as good."""
        slopes: set[float] = set()
        for need, cost, host in zip(moment.needs, costs, sent, strict=True):
            slopes.update(hull_prices(need, cost), hull_prices(need[host == 0], cost[host == 0]))
        most_bytes = max(abs(moment.room), self.num_layers * max(int(abs(n).max(initial=0)) for n in moment.needs))
        most_cost = self.num_layers * max(int(abs(cost).max(initial=0)) for cost in costs)
        least_sent = min(int(host[host > 0].min(initial=MOST)) for host in sent)
        times = 2 + self._most_sent(sent) // (self.num_layers * least_sent)  # what the host's prices come to besides
        found = [(0, 1)]
        for slope in sorted(slopes):
            parts = min(FINEST, int(MOST // 4 / max(1.0, most_cost + slope * most_bytes) / times))
            if parts:
                found.append((round(slope * parts), parts))
        return np.array([price for price, _ in found], dtype=np.int64), np.array([n for _, n in found], dtype=np.int64)

    def _host_prices(self, values: Sequence[Ints], sent: Sequence[Ints]) -> list[Ints]:
        """None, and the least for a byte of the host at which nothing is gained by it."""
        none = np.zeros(len(values[0]), dtype=np.int64)
        if self.host_bytes is None or any((host == 0).sum() == 0 for host in sent):
            return [none]
        gains = none
        for value, host in zip(values, sent, strict=True):
            if (host > 0).any():
                stays = value[:, host == 0].min(axis=1)
                gains = np.maximum(gains, -((value[:, host > 0] - stays[:, None]) // host[host > 0]).min(axis=1))
        gains = np.where(gains < MOST // 2 // max(1, self._most_sent(sent)), gains, 0)
        return [none, gains] if gains.any() else [none]

    def _most_sent(self, sent: Sequence[Ints]) -> int:
        """To the host by all layers, or what it has room for."""
        return max(self.host_bytes or 0, self.num_layers * max(int(host.max(initial=0)) for host in sent))


def after_forward(choice: Choice) -> int:
    """A layer's share of what is allocated once all are through their forward pass, of what one micro-batch holds."""
    return choice.resident_bytes + _saved_bytes(choice)


def _saved_bytes(choice: Choice) -> int:
    return choice.forward_change_bytes + choice.release_bytes


def _sums(some: Sequence[Ints], others: Sequence[Ints]) -> list[Ints]:
    return [a + b for a, b in zip(some, others, strict=True)]


def _of(choices: Sequence[Choice], value: Callable[[Choice], int]) -> Ints:
    return np.array([value(choice) for choice in choices], dtype=np.int64)
