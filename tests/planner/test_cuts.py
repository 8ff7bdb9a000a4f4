"""A chain is cut into stages where it is best, whatever its stretches take."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.cuts import FAR, Cut, Ints, best_cut


@st.composite
def stretches(draw: st.DrawFn) -> tuple[Ints, Ints]:
    """What stretches of up to six layers take as one of up to four stages, in one of up to three ways, or cannot be."""
    stages, ways, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape = (stages, ways, layers + 1, layers + 1)
    values = st.integers(0, 30)
    made = [
        np.array(draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))).reshape(shape)
        for _ in range(3)
    ]
    first, after = np.indices(shape[2:])
    none = (made[2] < 8) | (first >= after)
    return np.where(none, FAR, made[0]), np.where(none, FAR, made[1])


def by_enumeration(rising: Ints, adding: Ints) -> int | None:
    """The least over all cuts and ways, each looked at."""
    stages, ways, places, _ = rising.shape
    totals: list[int] = []
    for inner in itertools.combinations(range(1, places - 1), stages - 1):
        spans = list(itertools.pairwise((0, *inner, places - 1)))
        for chosen in itertools.product(range(ways), repeat=stages):
            picked = [(s, way, i, j) for (s, (i, j)), way in zip(enumerate(spans), chosen, strict=True)]
            if all(adding[at] < FAR for at in picked):
                totals.append(int(max(rising[at] for at in picked) + sum(adding[at] for at in picked)))
    return min(totals, default=None)


@given(stretches())
def test_the_cut_is_the_best_there_is(taken: tuple[Ints, Ints]) -> None:
    """Exact, and none precisely where there is none."""
    found = best_cut(*taken)

    assert (found and found.total) == by_enumeration(*taken)
    if found is not None:
        check(found, *taken)


def check(found: Cut, rising: Ints, adding: Ints) -> None:
    """Assert that a cut takes what it says."""
    spans = itertools.pairwise((*found.starts, rising.shape[-1] - 1))
    picked = [(s, way, i, j) for (s, (i, j)), way in zip(enumerate(spans), found.ways, strict=True)]
    assert found.starts[0] == 0
    assert found.total == max(rising[at] for at in picked) + sum(adding[at] for at in picked)
