"""The order of passes through stages is PyTorch's, and a step takes no longer in it than is reckoned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import schedule
from shallowflow.planner.communication import bubble_share

SHAPES = [(p, v, m) for p in (2, 3, 4, 8) for v in (2, 3, 5) for m in (p, 2 * p, 3 * p)]


def orders(num_stages: int, num_parts: int, num_micro_batches: int) -> list[list[Any]]:
    """The passes of each stage, as PyTorch's interleaved schedule has them."""
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    made: Any = ScheduleInterleaved1F1B
    facts = SimpleNamespace(
        n_local_stages=num_parts,
        pp_group_size=num_stages,
        _n_microbatches=num_micro_batches,
        microbatches_per_round=num_micro_batches // (num_micro_batches // num_stages),
    )
    every = [made._calculate_single_rank_operations(facts, stage) for stage in range(num_stages)]
    return [[action for action in each if action is not None] for each in every]


def is_forward(action: Any) -> bool:
    """Whether an action of a schedule is a forward pass."""
    from torch.distributed.pipelining import schedules

    return bool(action.computation_type == schedules._ComputationType.FORWARD)


@pytest.mark.parametrize(("p", "v", "m"), SHAPES)
def test_what_is_in_flight_is_what_pytorchs_order_holds(p: int, v: int, m: int) -> None:
    """When the first backward pass begins, the most of each part, and never more together."""
    for stage, actions in enumerate(orders(p, v, m)):
        held, highest, most = [0] * v, [0] * v, 0
        begun: dict[int, list[int]] = {}
        for action in actions:
            part = action.stage_index // p
            if not is_forward(action):
                begun.setdefault(part, list(held))
            held[part] += 1 if is_forward(action) else -1
            most, highest = max(most, sum(held)), [max(pair) for pair in zip(highest, held, strict=True)]

        reckoned = schedule.in_flight(p, v, m, stage)
        assert reckoned == tuple(begun[v - 1])
        assert sum(reckoned) == most
        assert schedule.most_in_flight(p, v, m, stage) == tuple(highest)
        for part, there in begun.items():  # which is why a bound may count on them
            assert all(a >= b for a, b in zip(there[: part + 1], reckoned, strict=False))


def makespan(p: int, v: int, m: int, busy: list[int], forward_share: float) -> float:
    """When the last pass ends if each begins once its inputs are there and its stage is free."""
    order, done, free = orders(p, v, m), dict[tuple[bool, int, int], float](), [0.0] * p
    last = p * v - 1
    while any(order):
        for stage, actions in enumerate(order):
            while actions:
                ahead, part, number = is_forward(actions[0]), actions[0].stage_index, actions[0].microbatch_index
                needed = [(True, part - 1, number)] if ahead and part else []
                if not ahead:
                    needed = [(True, part, number)] + ([(False, part + 1, number)] if part < last else [])
                if any(one not in done for one in needed):
                    break
                taken = busy[stage] / v * (forward_share if ahead else 1 - forward_share)
                free[stage] = max([free[stage], *(done[one] for one in needed)]) + taken
                done[ahead, part, number] = free[stage]
                actions.pop(0)
    return max(free)


@pytest.mark.parametrize(("p", "v", "m"), SHAPES)
def test_equal_stages_take_what_is_reckoned(p: int, v: int, m: int) -> None:
    """To the last picosecond, whatever share of a micro-batch its forward pass is; the wait is the known bubble."""
    busy = [v * 360_000] * p
    reckoned = schedule.step_picoseconds(busy, m, v)

    assert reckoned == pytest.approx(makespan(p, v, m, busy, 0.25), rel=1e-12)
    assert 1 - m * busy[0] / reckoned == pytest.approx(bubble_share(p, m, v), rel=1e-12)


@given(st.sampled_from(SHAPES), st.data())
def test_unequal_stages_take_no_longer_than_is_reckoned(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """Stages that differ by up to a fifth take no more, and no less than if all were as fast as the fastest may be."""
    p, v, m = shape
    busy = [v * data.draw(st.integers(100_000, 120_000)) for _ in range(p)]
    reckoned = schedule.step_picoseconds(busy, m, v)

    assert reckoned / 1.2 * (1 - 1e-9) <= makespan(p, v, m, busy, 0.3) <= reckoned * (1 + 1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_each_layer_has_one_place(p: int, v: int, each: int) -> None:
    """Places are the layers, each once; those of a stage come together, its parts in order."""
    number = p * v * each
    order, parts = schedule.order(number, p, v), schedule.parts(number, p, v)

    assert sorted(order) == list(range(number))
    for place, layer in enumerate(order):
        stage = place // (v * each)
        assert v == 1 or (layer // each % p, layer // each // p) == (stage, parts[place])


def test_parts_are_equal_and_rounds_full() -> None:
    """80 layers in 8 stages have ten each; with micro-batches that do not come in eights there is one part."""
    assert schedule.parts_per_stage(80, 8, 16) == (1, 2, 5, 10)
    assert schedule.parts_per_stage(80, 8, 12) == (1,)
    assert schedule.parts_per_stage(28, 8, 16) == (1,)
    assert schedule.parts_per_stage(80, 1, 16) == (1,)
    assert schedule.parts_per_stage(80, 4, 16) == (1, 2, 4, 5, 10)
