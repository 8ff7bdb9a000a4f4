"""What instances that may be interrupted do of a run: one session after another, each from the last safe checkpoint.

A session's age is cut into cells at every moment where something changes: a checkpoint becomes safe, the free hour is
over, the run could end. In each cell the chance of an interruption and its mean age are exact. A state is the work that
is safe; between states, what a run comes to is taken to be straight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .spot import Job

FREE_SECONDS = 3600.0
"""A Linux spot instance that AWS interrupts within its first hour is not billed (Amazon EC2 Spot's FAQ); later every
second is."""
NOTICE_SECONDS = 120.0
"""Between the notice and the interruption, as AWS states it; its guide calls notices best effort."""
MOST_STATES = 256
LEAST_STATES, STATES_PER_INTERVAL = 64, 4
"""Where a notice may save work between checkpoints."""
CELLS = 512
"""Into which what runs may come to is divided for its distribution."""
REACH = 6.0
"""Times the mean delay that are looked at first; doubled until the distribution has the mean that is known."""
MOST_DOUBLINGS = 6
LEAST_CHANCE = 1e-9
"""Of a session that brings the run any further, below which it is said never to end."""

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.intp]
Waves = npt.NDArray[np.complex128]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Interruptions of one kind, by cell: how likely, and how many states they leave safe, whole and rest."""

    chances: Floats
    whole: Whole
    rest: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """A session's ages in cells.

    Attributes:
        ends: of the cells.
        means: the expected age of an interruption within each cell.
        chances: of an interruption within each cell.
        streams: without a notice in time, and with one.
        finish: for each state, the age at which a session that began there ends the run.
    """

    ends: Floats
    means: Floats
    chances: Floats
    streams: tuple[Stream, Stream]
    finish: Floats


class Sessions:
    """All sessions of *job* with a checkpoint every *interval_steps*."""

    def __init__(self, job: Job, interval_steps: int) -> None:
        self.job = job
        self.interval = interval_steps * job.step_seconds
        self.period = self.interval + job.checkpoint_seconds
        work = job.num_steps * job.step_seconds
        parts = -(-job.num_steps // interval_steps)
        if job.saved_by_notice == 0 and parts <= MOST_STATES:
            self.unit, num_states = self.interval, parts
        else:
            pieces = min(MOST_STATES, max(LEAST_STATES, parts * STATES_PER_INTERVAL))
            self.unit, num_states = work / pieces, pieces + 1
        self.left = np.maximum(work - np.arange(num_states) * self.unit, 0.0)
        self.saves = np.maximum(np.ceil(self.left / self.interval - 1e-9) - 1, 0.0)

    @property
    def undisturbed_seconds(self) -> float:
        """On the wall, if nothing interrupts."""
        return float(self._finish(self.job.first_seconds)[0])

    def means(self) -> tuple[float, float, float, float]:
        """Expected seconds on the wall, billed, and of all instances, and interruptions; infinite without an end."""
        job = self.job
        if self._is_hopeless():
            return math.inf, math.inf, math.inf, math.inf
        resolution = self.period / 8 if job.saved_by_notice else np.inf
        found = np.zeros((len(self.left), 4))
        for state, ages in self._backwards(resolution):
            values = np.stack([self._wall(ages), self._billed(ages), ages.means, np.ones_like(ages.means)], axis=1)
            running = np.vstack([np.zeros(4), np.cumsum(ages.chances[:, None] * values, axis=0)])
            cells, end = _within(ages, state)
            lasting = np.exp(-job.interruptions_per_second * end)
            total = running[cells] + lasting * np.array([end, end, end, 0.0])
            again = 0.0
            for stream, most in zip(ages.streams, self._most(state), strict=True):
                for weights, targets in _moves(stream, cells, most):
                    again += float(weights[targets == 0].sum())
                    total = total + weights[targets > 0] @ found[state + targets[targets > 0]]
            found[state] = total / (1 - again)
        wall, billed, live, interruptions = (float(value) for value in found[0])
        return wall, billed, live, interruptions

    def quantiles(self, share: float) -> tuple[float, float]:
        """Seconds on the wall, and billed, that *share* of the runs do not exceed."""
        alone = self.undisturbed_seconds
        if np.exp(-self.job.interruptions_per_second * alone) >= share:
            return alone, alone  # more runs than that are not interrupted at all, and few come to less
        if self._is_hopeless():
            return math.inf, math.inf
        mean_wall, mean_billed, _, _ = self.means()
        wall = self._quantile(share, self._wall, mean_wall, mean_wall - alone)
        billed = self._quantile(share, self._billed, mean_billed, mean_wall - alone)
        return max(wall, alone), billed

    def _quantile(self, share: float, value: Callable[[Ages], Floats], mean: float, delay: float) -> float:
        """By the distribution on a grid, made wider until it has the *mean*; runs that nothing interrupts lie on it."""
        alone = self.undisturbed_seconds
        span = alone + REACH * delay
        for _ in range(MOST_DOUBLINGS):
            place = max(1, int(alone / span * CELLS))
            width = alone / place
            heights = self._distribution(value, width)
            if abs(float(heights @ np.arange(CELLS)) * width - mean) <= max(width, 0.002 * mean):
                below = np.cumsum(heights)
                first = min(int(np.searchsorted(below, share)), CELLS - 1)
                if first == place:
                    return alone
                before = float(below[first] - heights[first])
                return (first - 0.5 + (share - before) / float(heights[first])) * width
            span *= 2
        return math.inf

    def _distribution(self, value: Callable[[Ages], Floats], width: float) -> Floats:
        """The chances of coming to 0, 1, 2, ... times *width*, each value shared between its two neighbours."""
        frequencies = np.arange(CELLS // 2 + 1)
        roots = np.exp(-2j * np.pi * np.arange(CELLS) / CELLS)

        def waves(values: Floats) -> Waves:
            places = values / width
            low = np.floor(places).astype(np.intp)
            rest = (places - low)[:, None]
            turns = low[:, None] * frequencies[None, :] % CELLS
            found: Waves = roots[turns] * (1 - rest + rest * roots[frequencies][None, :])
            return found

        found = np.zeros((len(self.left), len(frequencies)), dtype=np.complex128)
        seen: Ages | None = None
        sums: list[list[tuple[int, Waves]]] = []
        for state, ages in self._backwards(width):
            if ages is not seen:
                seen, sums = ages, _sums(ages, waves(value(ages)))
            cells, end = _within(ages, state)
            total = np.exp(-self.job.interruptions_per_second * end) * waves(np.array([end]))[0]
            again = np.zeros(len(frequencies), dtype=np.complex128)
            for stream, parts, most in zip(ages.streams, sums, self._most(state), strict=True):
                bounds, floors = _bounds(stream, cells)
                for further, running in parts:
                    targets = np.minimum(floors + further, most)
                    weights = running[bounds[1:]] - running[bounds[:-1]]
                    again += weights[targets == 0].sum(axis=0)
                    moved = targets > 0
                    total += (weights[moved] * found[state + targets[moved]]).sum(axis=0)
            found[state] = total / (1 - again)
        heights: Floats = np.fft.irfft(found[0], CELLS)
        return heights

    def _is_hopeless(self) -> bool:
        """Whether hardly any session gets to where something is safe."""
        job = self.job
        least = self.left[0] + job.last_seconds
        if len(self.left) > 1:
            least = min(least, self.period + job.upload_seconds)
        if job.saved_by_notice:
            least = min(least, NOTICE_SECONDS + self.unit)
        setup = max(job.first_seconds, job.again_seconds)
        return bool(np.exp(-job.interruptions_per_second * (setup + least)) < LEAST_CHANCE)

    def _backwards(self, resolution: float) -> list[tuple[int, Ages]]:
        """Every state from the last to the first, with the ages of sessions that begin there."""
        first = self._ages(self.job.first_seconds, resolution)
        if len(self.left) == 1:
            return [(0, first)]
        again = self._ages(self.job.again_seconds, resolution)
        return [*((state, again) for state in range(len(self.left) - 1, 0, -1)), (0, first)]

    def _finish(self, setup: float) -> Floats:
        found: Floats = setup + self.left + self.saves * self.job.checkpoint_seconds + self.job.last_seconds
        return found

    def _wall(self, ages: Ages) -> Floats:
        return ages.means + self.job.waiting_seconds

    def _billed(self, ages: Ages) -> Floats:
        """What an interruption in each cell leaves to pay of its session, on the mean of its machines."""
        free = 1 / self.job.num_machines
        return np.where(ages.means < FREE_SECONDS, (1 - free) * ages.means, ages.means)

    def _most(self, state: int) -> tuple[int, int]:
        """How many states further an interruption can find the work: by checkpoints, and by a notice."""
        by_checkpoints = int(self.saves[state] * self.interval / self.unit + 1e-9)
        return by_checkpoints, len(self.left) - 1 - state

    def _ages(self, setup: float, resolution: float) -> Ages:
        """Of sessions that take *setup* seconds before they train, in cells no longer than *resolution*."""
        job, rate = self.job, self.job.interruptions_per_second
        finish = self._finish(setup)
        starts = setup + np.arange(int(self.saves[0]) + 2) * self.period
        marks = [starts + job.upload_seconds, finish, [0.0, FREE_SECONDS]]
        if job.saved_by_notice:
            marks += [starts + NOTICE_SECONDS, starts + NOTICE_SECONDS + self.interval]
        if np.isfinite(resolution):
            marks.append(np.arange(0.0, finish[0], resolution))
        edges = np.unique(np.concatenate([np.asarray(mark, dtype=np.float64) for mark in marks]))
        edges = edges[(edges >= 0) & (edges <= finish[0])]
        begins, ends = edges[:-1], edges[1:]
        lengths = ends - begins
        chances = np.exp(-rate * begins) * -np.expm1(-rate * lengths)
        short = rate * lengths < 1e-4
        with np.errstate(over="ignore"):
            exact = 1 / rate - lengths / np.expm1(np.where(short, 1.0, rate * lengths))
        means = begins + np.where(short, lengths / 2 - rate * lengths**2 / 12, exact)
        trained = (begins + ends) / 2 - setup
        safe = np.maximum(np.floor((trained - job.upload_seconds) / self.period), 0.0) * self.interval
        noticed = means - setup - NOTICE_SECONDS
        rounds = np.floor(noticed / self.period)
        kept = rounds * self.interval + np.minimum(noticed - rounds * self.period, self.interval)
        share = job.saved_by_notice
        return Ages(
            ends=ends,
            means=means,
            chances=chances,
            streams=(
                self._stream(chances * (1 - share), safe),
                self._stream(chances * share, np.maximum(kept, safe)),
            ),
            finish=finish,
        )

    def _stream(self, chances: Floats, safe_seconds: Floats) -> Stream:
        places = safe_seconds / self.unit
        whole = np.floor(places + 1e-9)
        return Stream(chances=chances, whole=whole.astype(np.intp), rest=np.maximum(places - whole, 0.0))


def _within(ages: Ages, state: int) -> tuple[int, float]:
    """How many cells lie before a session from *state* would end the run, and at what age it would."""
    end = float(ages.finish[state])
    return int(np.searchsorted(ages.ends, end, side="right")), end


def _bounds(stream: Stream, cells: int) -> tuple[Whole, Whole]:
    """Where among the first *cells* each whole number of states begins and ends, and those numbers."""
    if cells == 0:
        return np.array([0]), np.arange(0)
    floors = np.arange(int(stream.whole[cells - 1]) + 1)
    inner = np.searchsorted(stream.whole[:cells], floors[1:])
    return np.concatenate([[0], inner, [cells]]), floors


def _moves(stream: Stream, cells: int, most: int) -> list[tuple[Floats, Whole]]:
    """Chances that the work is found so many states further."""
    bounds, floors = _bounds(stream, cells)
    found = []
    for further, part in _parts(stream):
        sums = np.concatenate([[0.0], np.cumsum(part[:cells])])
        found.append((sums[bounds[1:]] - sums[bounds[:-1]], np.minimum(floors + further, most)))
    return found


def _parts(stream: Stream) -> list[tuple[int, Floats]]:
    """The chances of each cell that go to the state below what is safe, and to the one above; without those of none."""
    parts = [(0, stream.chances * (1 - stream.rest)), (1, stream.chances * stream.rest)]
    return [(further, part) for further, part in parts if part.any()]


def _sums(ages: Ages, shape: Waves) -> list[list[tuple[int, Waves]]]:
    """For both streams, the waves of all cells before each one, by how much further a part of the chances goes."""
    none = np.zeros((1, shape.shape[1]), dtype=np.complex128)
    return [
        [(further, np.vstack([none, np.cumsum(part[:, None] * shape, axis=0)])) for further, part in _parts(stream)]
        for stream in ages.streams
    ]
