"""The inner problem in whole numbers: a chain of layers, each to be given one strategy, and what a choice takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .strategies import Positive, Strategy

Counts = tuple[tuple[int, ...], ...]
"""For each group, how many of its layers get each of its choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one layer takes under one strategy; a change is of what is allocated, over that stretch of the step.

    Attributes:
        resident_bytes: from the start of a micro-batch to its end: weights, adapter, and gradients where earlier
            micro-batches left them.
        forward_high_bytes, backward_high_bytes: the most beyond what was allocated when the pass began.
        release_bytes: the change once all layers are through their forward pass.
        device_picoseconds, host_picoseconds: forward and backward pass, of the device and of the host that launches.
        penalty_picoseconds: what its coarser weights are held to be worth, in a step's time.
        harm: its squared relative weight error, in parts per thousand million.
        host_bytes: sent to host memory for the backward pass.
    """

    strategy: Strategy
    resident_bytes: int
    forward_high_bytes: int
    forward_change_bytes: int
    release_bytes: int
    backward_high_bytes: int
    backward_change_bytes: int
    device_picoseconds: int
    host_picoseconds: int
    penalty_picoseconds: int = 0
    harm: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Consecutive layers that are alike, and what each of them may be given.

    Attributes:
        harms: for each layer its own harm by each choice, where layers differ in that; a choice's is then a price.
        harm_beyond: what the layers' own harms sum to beyond those of their choices, at least, whatever is chosen.
    """

    num_layers: Positive
    choices: tuple[Choice, ...]
    harms: tuple[tuple[int, ...], ...] = ()
    harm_beyond: int = 0

    @classmethod
    def of(cls, choices: Sequence[Choice], harms: Sequence[Sequence[int]]) -> Group:
        """Layers that differ in their own *harms*.

        Of whatever each layer gets, its own harm less its choice's is no less than the least of such differences.
        """
        rows = tuple(tuple(row) for row in harms)
        beyond = sum(min(own - c.harm for own, c in zip(row, choices, strict=True)) for row in rows)
        return cls(num_layers=len(rows), choices=tuple(choices), harms=rows, harm_beyond=beyond)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """All layers in order, with what the step takes outside of them.

    Attributes:
        fixed_bytes: resident outside the layers, with gradients where earlier micro-batches left them, and what all
            strategies hold alike: the optimizer's state.
        head_high_bytes, head_change_bytes: of the loss, forward and backward, between the layers' passes.
        update_high_bytes: of the optimizer.
        device_picoseconds, host_picoseconds: of one micro-batch.
        update_picoseconds: of one step, with waiting for other GPUs.
        harm_price: what a unit of harm is held to be worth, in picoseconds of a step, where layers differ in it.
    """

    groups: tuple[Group, ...]
    gradient_accumulation_steps: Positive
    fixed_bytes: int
    head_high_bytes: int
    head_change_bytes: int
    update_high_bytes: int
    device_picoseconds: int
    host_picoseconds: int
    update_picoseconds: int
    harm_price: int = 0

    @property
    def harm_beyond(self) -> int:
        """What the harm of all layers is, at least, beyond the sum of their choices'."""
        return sum(group.harm_beyond for group in self.groups)

    @property
    def penalty_beyond_picoseconds(self) -> int:
        """What that is held to be worth."""
        return self.harm_price * self.harm_beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a choice may take; None is no limit.

    Attributes:
        memory_bytes: allocated on the device at most.
        step_picoseconds: without penalties.
    """

    memory_bytes: int
    harm: int | None = None
    host_bytes: int | None = None
    step_picoseconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a choice takes, summed layer by layer.

    Attributes:
        score_picoseconds: the step's time and its penalties: what is minimized.
    """

    peak_bytes: int
    step_picoseconds: int
    score_picoseconds: int
    harm: int
    host_bytes: int

    def within(self, limits: Limits) -> bool:
        """Whether it is allowed."""
        bounded = (
            (self.peak_bytes, limits.memory_bytes),
            (self.harm, limits.harm),
            (self.host_bytes, limits.host_bytes),
            (self.step_picoseconds, limits.step_picoseconds),
        )
        return all(limit is None or value <= limit for value, limit in bounded)


def backward_order(choices: Sequence[Choice], among: Iterable[int] | None = None) -> list[int]:
    """The order in which a group's backward pass meets its choices, or those *among* them, for the lowest peak.

    What frees comes first, the smallest transient ahead; what allocates follows, the largest excess ahead (jobs that
    raise and lower one level: Abdel-Wahab and Kameda, 1978). So layers that recompute come early in the model.
    """

    def urgency(index: int) -> tuple[int, int, int]:
        high, change = choices[index].backward_high_bytes, choices[index].backward_change_bytes
        return (0, high, index) if change <= 0 else (1, change - high, index)

    return sorted(range(len(choices)) if among is None else among, key=urgency)


def taken(chain: Chain, counts: Counts) -> Taken:
    """What *counts* take, with the layers of each group in the order of ``backward_order``.

    Of harm, and of the score so far as it depends on it, no more than any order of them takes.
    """
    backward = [
        [(group.choices[i], count[i]) for i in backward_order(group.choices, (i for i, n in enumerate(count) if n))]
        for group, count in zip(chain.groups, counts, strict=True)
    ]
    return taken_in_order(chain, [item for group in backward for item in reversed(group)])


def taken_in_order(chain: Chain, chosen: Sequence[tuple[Choice, int]]) -> Taken:
    """What the layers' choices take, which are *chosen* in this order, each so many times in a row."""
    level = chain.fixed_bytes + sum(n * choice.resident_bytes for choice, n in chosen)
    peak = level
    for choice, n in chosen:
        peak = max(peak, level + choice.forward_high_bytes + max(0, (n - 1) * choice.forward_change_bytes))
        level += n * choice.forward_change_bytes
    level += sum(n * choice.release_bytes for choice, n in chosen)
    peak = max(peak, level + chain.head_high_bytes)
    level += chain.head_change_bytes
    for choice, n in reversed(chosen):
        peak = max(peak, level + choice.backward_high_bytes + max(0, (n - 1) * choice.backward_change_bytes))
        level += n * choice.backward_change_bytes
    peak = max(peak, level + chain.update_high_bytes)
    device = chain.device_picoseconds + sum(n * choice.device_picoseconds for choice, n in chosen)
    host = chain.host_picoseconds + sum(n * choice.host_picoseconds for choice, n in chosen)
    step = chain.gradient_accumulation_steps * max(device, host) + chain.update_picoseconds
    return Taken(
        peak_bytes=peak,
        step_picoseconds=step,
        score_picoseconds=step
        + chain.penalty_beyond_picoseconds
        + sum(n * choice.penalty_picoseconds for choice, n in chosen),
        harm=chain.harm_beyond + sum(n * choice.harm for choice, n in chosen),
        host_bytes=sum(n * choice.host_bytes for choice, n in chosen),
    )


def dominated(choices: Sequence[Choice]) -> list[int | None]:
    """For each choice, one that is no worse wherever it stands and is itself dominated by none, or None.

    Put in its place, the other leaves every moment of the step at the same level or lower, and takes no more of
    anything else; of equal ones the first stays.
    """
    moments = np.array([_moments(choice) for choice in choices], dtype=np.int64)
    better = np.all(moments[:, None, :] <= moments[None, :, :], axis=2)
    number = np.arange(len(choices))
    beats = better & (~better.T | (number[:, None] < number[None, :]))  # of equal ones the first
    kept = ~np.any(beats, axis=0)
    first = np.argmax(beats & kept[:, None], axis=0)
    return [None if stays else int(by) for stays, by in zip(kept, first, strict=True)]


def no_worse(better: Choice, than: Choice) -> bool:
    """Whether *better* can stand wherever *than* does."""
    return all(ours <= theirs for ours, theirs in zip(_moments(better), _moments(than), strict=True))


def _moments(choice: Choice) -> tuple[int, ...]:
    """The layer's share of what is allocated, moment by moment, and its sums."""
    through = choice.resident_bytes + choice.forward_change_bytes
    released = through + choice.release_bytes
    return (
        choice.resident_bytes,
        choice.resident_bytes + choice.forward_high_bytes,
        through,
        released,
        released + choice.backward_high_bytes,
        released + choice.backward_change_bytes,
        choice.device_picoseconds,
        choice.host_picoseconds,
        choice.penalty_picoseconds,
        choice.harm,
        choice.host_bytes,
    )
