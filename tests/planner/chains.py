"""Small random chains, and the best choice by looking at all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from shallowflow.planner.chain import Chain, Choice, Counts, Group, Limits, Taken, taken
from tests.strategies import STRATEGIES

MIB = 2**20
GIGA = 10**9
MOST_HARM = 10**8
"""More than all layers of a chain lose together: a step that takes as much longer scores no less than nothing."""
sizes = st.integers(0, 400).map(lambda n: n * MIB)
times = st.integers(0, 1000).map(lambda n: n * GIGA)


@st.composite
def choices(draw: st.DrawFn, number: int) -> Choice:
    """What a layer may take; a backward pass frees what the forward pass saved, or leaves more than it found."""
    saved = draw(sizes)
    left = draw(st.sampled_from([-saved, -saved // 2, MIB, 40 * MIB]))
    return Choice(
        strategy=STRATEGIES[number],
        resident_bytes=draw(sizes) // 2,
        forward_high_bytes=saved + draw(sizes) // 4,
        forward_change_bytes=saved,
        release_bytes=-draw(st.sampled_from([0, 0, saved // 2])),
        backward_high_bytes=max(draw(sizes), left),
        backward_change_bytes=left,
        device_picoseconds=draw(times),
        host_picoseconds=draw(times),
        penalty_picoseconds=draw(st.sampled_from([0, 5 * GIGA, 50 * GIGA])),
        harm=draw(st.integers(0, 100)) * 10**5,
        host_bytes=draw(st.sampled_from([0, 10 * MIB, 50 * MIB])),
    )


@st.composite
def groups(draw: st.DrawFn, num_layers: int, number: int) -> Group:
    """Layers that all lose by a choice what it says, or each more or less than that."""
    made = tuple(draw(choices(i)) for i in range(number))
    if draw(st.booleans()):
        return Group(num_layers=num_layers, choices=made)
    own = st.integers(0, 100).map(lambda n: n * 10**5)
    return Group.of(made, [[draw(own) for _ in made] for _ in range(num_layers)])


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Groups of one layer and of several."""
    layers = draw(st.sampled_from([(1,), (3,), (5,), (1, 3), (1, 4, 1), (1, 1, 1), (1, 2, 2, 1)]))
    number = draw(st.integers(1, 4 if max(layers) < 4 else 3))
    harm_price = draw(st.sampled_from([0, 100, 10**5]))
    return Chain(
        groups=tuple(draw(groups(count, number)) for count in layers),
        gradient_accumulation_steps=draw(st.sampled_from([1, 4])),
        fixed_bytes=draw(sizes),
        head_high_bytes=draw(sizes),
        head_change_bytes=draw(sizes) // 8,
        update_high_bytes=draw(sizes),
        device_picoseconds=draw(times),
        host_picoseconds=draw(times),
        update_picoseconds=draw(times) + draw(st.sampled_from([0, 1])) * harm_price * MOST_HARM,
        harm_price=harm_price,
    )


def ways(chain: Chain) -> Iterator[tuple[Counts, Taken]]:
    """Every choice there is."""
    each = [list(_parts(group.num_layers, len(group.choices))) for group in chain.groups]
    for counts in itertools.product(*each):
        yield counts, taken(chain, counts)


def _parts(total: int, places: int) -> Iterator[tuple[int, ...]]:
    if places == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _parts(total - first, places - 1):
            yield (first, *rest)


@st.composite
def limited(draw: st.DrawFn) -> tuple[Chain, Limits]:
    """A chain and limits that some of its choices just meet, or just do not, or that none meets."""
    chain = draw(chains())
    every = [found for _, found in ways(chain)]
    found = [draw(st.sampled_from(every)) for _ in range(4)]
    slack = draw(st.sampled_from([-1, 0, MIB]))
    return chain, Limits(
        memory_bytes=max(0, found[0].peak_bytes + slack),
        harm=draw(st.none() | st.just(found[1].harm)),
        host_bytes=draw(st.none() | st.just(found[2].host_bytes)),
        step_picoseconds=draw(st.none() | st.just(found[3].step_picoseconds)),
    )


def best(chain: Chain, limits: Limits) -> Taken | None:
    """By enumeration."""
    allowed = (found for _, found in ways(chain) if found.within(limits))
    return min(allowed, key=lambda found: found.score_picoseconds, default=None)
