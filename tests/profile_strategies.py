"""Hypothesis strategies: profiles of layers, and what they add up to."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import strategies as st

from shallowflow.planner.costs import OP_KINDS, SEGMENTS, LayerRuns, StepProfile


def rows(*highest: int) -> st.SearchStrategy[list[int]]:
    """Coefficients of 1, micro-batch, rank and both, none negative, up to *highest*."""
    return st.tuples(*(st.integers(0, high) for high in highest)).map(list)


@st.composite
def step_profiles(draw: st.DrawFn, like: StepProfile | None = None) -> StepProfile:
    """Steps of three layers that hold something from their forward to their backward pass.

    Backward passes take something while they run; those of the first micro-batch leave gradients, which the update
    frees.
    """
    saved = {place: draw(rows(10**4, 10**6, 10**4, 10**3)) for place in ("embed", "first", "inner", "last", "head")}
    scratch = {place: draw(rows(10**6, 10**6, 10**4, 0)) for place in ("first", "inner", "last")}
    gradients, outside = (
        draw(st.lists(st.tuples(st.just(0), st.just(0), st.integers(1, 10**5), st.just(0)), max_size=most))
        for most in (3, 1)
    )
    if like is not None:
        gradients, outside = (
            [tuple(row) for row in rows.tolist()] for rows in (like.gradients, like.outside_gradients)
        )
    sizes: list[list[int]] = []
    events: list[tuple[int, str, int]] = []

    def make(row: list[int], segment: str, micro_batch: int) -> int:
        sizes.append(row)
        events.append((len(sizes), segment, micro_batch))
        return len(sizes)

    kept: list[int] = []
    for micro_batch in (0, 1):
        held = {place: make(row, place, micro_batch) for place, row in saved.items()}
        if not micro_batch:
            kept += [make(list(row), "head", 0) for row in outside]
        events.append((-held["head"], "head", micro_batch))
        for place in ("last", "inner", "first"):
            events.append((-make(scratch[place], f"{place}_back", micro_batch), f"{place}_back", micro_batch))
            if not micro_batch:
                kept += [make(list(row), f"{place}_back", 0) for row in gradients]
            events.append((-held[place], f"{place}_back", micro_batch))
        events.append((-held["embed"], "first_back", micro_batch))
    events += [(-number, "update", 1) for number in kept]

    costs = st.tuples(rows(*4 * [10**11]), rows(*4 * [10**9]))
    kinds, places = st.integers(0, len(OP_KINDS) - 1), st.integers(0, SEGMENTS.index("update"))
    operators = draw(st.lists(st.tuples(costs, kinds, places), max_size=4))
    messages = OP_KINDS.index("gather")  # whose latency is no GPU's own
    operators = [(([0, 0, 0, 0], b) if k == messages else (f, b), k, place) for (f, b), k, place in operators]
    operators.append((([0, 0, 0, 0], [0, 0, 0, 0]), 0, SEGMENTS.index("head")))  # no model does nothing
    return StepProfile(
        sizes=np.array(sizes),
        events=np.array([event for event, _, _ in events]),
        event_segment=np.array([SEGMENTS.index(segment) for _, segment, _ in events]),
        event_pass=np.array([micro_batch for _, _, micro_batch in events]),
        op_kind=np.array([kind for _, kind, _ in operators]),
        op_segment=np.array([place for _, _, place in operators]),
        op_flops=np.array([flops for (flops, _), _, _ in operators]),
        op_bytes=np.array([num_bytes for (_, num_bytes), _, _ in operators]) + 1,
        fixed=np.array([draw(rows(10**8, 0, 0, 0))]),
        workspaces=np.array(draw(rows(10**7, 10**7))),
        layer=np.array([draw(rows(10**7, 0, 10**5, 0))]),
        state=np.array([draw(rows(0, 0, 10**5, 0))]),
        shared_state=np.array([draw(rows(2000, 0, 0, 0))]),
        gradients=np.array(gradients, dtype=np.int64).reshape(-1, 4),
        outside_gradients=np.array(outside, dtype=np.int64).reshape(-1, 4),
        recomputed=np.array([draw(st.integers(0, 1)) for _ in sizes]),
        alignment_bytes=draw(st.sampled_from([1, 512])),
    )


@st.composite
def with_other_sizes(draw: st.DrawFn, like: StepProfile) -> StepProfile:
    """The same step with other layers: as much outside of them, the same adapters, and the same update of them."""
    other = draw(step_profiles(like))
    update = SEGMENTS.index("update")
    ours, theirs = like.op_segment == update, other.op_segment != update
    operators = {
        name: np.concatenate([getattr(other, name)[theirs], getattr(like, name)[ours]])
        for name in ("op_kind", "op_segment", "op_flops", "op_bytes")
    }
    return replace(
        other,
        **operators,
        fixed=like.fixed,
        workspaces=like.workspaces,
        state=like.state,
        shared_state=like.shared_state,
        gradients=like.gradients,
        outside_gradients=like.outside_gradients,
        alignment_bytes=like.alignment_bytes,
    )


@st.composite
def layer_runs(draw: st.DrawFn, num_layers: int) -> LayerRuns:
    """Layers all alike, or of two kinds."""
    split = draw(st.integers(1, num_layers))
    runs = [(draw(step_profiles()), split)]
    return runs if split == num_layers else [*runs, (draw(step_profiles()), num_layers - split)]


def same(first: StepProfile, second: StepProfile) -> bool:
    """Equal in every array."""
    return all(np.array_equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(StepProfile))
