"""The loss scale keeps within its bounds and counts what it lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.runtime.precision import GROWTH_INTERVAL, MAX_SCALE, LossScale

HISTORIES = st.lists(st.tuples(st.integers(0, 2 * GROWTH_INTERVAL), st.integers(0, 20)), max_size=6).map(
    lambda stretches: [flag for calm, bad in stretches for flag in [False] * calm + [True] * bad]
)


@given(history=HISTORIES)
def test_a_dynamic_scale_halves_at_once_and_doubles_after_calm(history: list[bool]) -> None:
    """An overflow halves the scale, only a whole interval without one doubles it, and it stays from 1 to its limit."""
    scale = LossScale.for_dtype("float16")
    calm = 0
    for overflowed in history:
        before = scale.value
        calm = 0 if overflowed else calm + 1

        scale.update(overflowed=overflowed)

        grows = calm > 0 and calm % GROWTH_INTERVAL == 0
        factor = 0.5 if overflowed else 2.0 if grows else 1.0
        assert scale.value == min(MAX_SCALE, max(1.0, before * factor))
    assert scale.num_skipped == sum(history)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@given(history=HISTORIES)
def test_a_dtype_with_the_range_of_fp32_needs_no_scale(dtype: str, history: list[bool]) -> None:
    """The scale stays 1 whatever happens, and what was skipped is still counted."""
    scale = LossScale.for_dtype(dtype)
    for overflowed in history:
        scale.update(overflowed=overflowed)

        assert scale.value == 1.0
    assert scale.num_skipped == sum(history)


def test_every_scale_is_a_power_of_two() -> None:
    """From its limit down to one, scaling loses no digit, because a float times a power of two is exact."""
    scale = LossScale.for_dtype("float16")
    reached = set()
    for overflowed in itertools.chain([False] * 8 * GROWTH_INTERVAL, [True] * 30):
        scale.update(overflowed=overflowed)
        reached.add(scale.value)

    assert all(value.hex().startswith("0x1.0000000000000p") for value in reached)
    assert (min(reached), max(reached)) == (1.0, MAX_SCALE)
