"""Questions about data: what ``meta`` answers adds up, and data answers for itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.profiler import kernels
from shallowflow.planner.profiler.recording import recording
from shallowflow.planner.profiler.trace import Recorder
from shallowflow.profiles import load_gpu

T4 = kernels.Target.of(load_gpu("t4"))
CPU = kernels.Target.of(load_gpu("cpu"))


def _loop(num_tokens: int, num_experts: int, chosen: int, spare: int) -> list[int]:
    """How many tokens each expert gets, found as transformers' models do."""
    scores = torch.empty(num_tokens, num_experts, device="meta")
    indices = torch.topk(scores, chosen).indices
    mask = torch.nn.functional.one_hot(indices, num_experts + spare).permute(2, 1, 0)
    counts = []
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        if expert[0] == num_experts + spare:
            continue
        counts.append(len(torch.where(mask[expert[0]])[1]))
    return counts


@given(st.integers(2, 200), st.integers(2, 16), st.integers(1, 16), st.integers(0, 1))
def test_experts_share_all_choices(num_tokens: int, num_experts: int, chosen: int, spare: int) -> None:
    """What the experts get adds up to what was chosen, and no two differ by more than one; a second layer's as well."""
    chosen = min(chosen, num_experts)
    with recording(Recorder(T4)):
        layers = [_loop(num_tokens, num_experts, chosen, spare) for _ in range(2)]

    for counts in layers:
        assert sum(counts) == num_tokens * chosen
        assert len(counts) == min(num_experts, num_tokens * chosen)
        assert max(counts) - min(counts) <= 1


def test_counts_that_leave_the_device_add_up() -> None:
    """A list of counts per expert, as of experts multiplied one after the other, adds up to what was chosen."""
    with recording(Recorder(T4)):
        indices = torch.topk(torch.empty(50, 8, device="meta"), 2).indices
        counts = torch.bincount(indices.flatten(), minlength=8).tolist()

    assert sum(counts) == 100 and max(counts) - min(counts) <= 1


def test_recordings_do_not_remember() -> None:
    """What one recording chose says nothing of a table of the same size in the next."""
    with recording(Recorder(T4)):
        torch.topk(torch.empty(50, 8, device="meta"), 2)
    with recording(Recorder(T4)):
        counts = torch.empty(8, dtype=torch.int64, device="meta").tolist()

    assert counts == 8 * [1]


def test_everything_is_true() -> None:
    """A mask of ones masks nothing, whether asked by ``all`` or by its sum, and selects all there is."""
    with recording(Recorder(T4)):
        mask = torch.ones(2, 5, dtype=torch.bool, device="meta")

        assert mask.all()
        assert mask.sum() == mask.numel()
        assert torch.empty(2, 5, 3, device="meta")[mask].shape == (10, 3)
        assert torch.masked_select(torch.empty(2, 5, device="meta"), mask).shape == (10,)
        assert not torch.isinf(torch.empty((), device="meta")).float().item()


REAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 2)[0],
    "mask": lambda x: x[x > 2],
    "masked_select": lambda x: torch.masked_select(x, x > 2),
    "unique": torch.unique,
    "bincount": torch.bincount,
    "one_hot": lambda x: torch.nn.functional.one_hot(x, 7),
    "eq": lambda x: x[2] == 6,
    "item": lambda x: torch.tensor(x[2].item()),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("target", [T4, CPU], ids=["T4", "CPU"])
def test_data_answers_for_itself(name: str, target: kernels.Target) -> None:
    """A tensor with data, such as a step keeps on the host, says while recorded what it says otherwise."""
    data = torch.tensor([3, 0, 6, 2, 3])
    expected = REAL[name](data)

    with recording(Recorder(target)):
        found = REAL[name](data)

    assert found.device.type == "cpu" and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("grow", "num_bytes"),
    [
        (lambda x, i: x.gather(0, i), 4096),
        (lambda x, i: x[i], 4096),
        (lambda x, i: x.index_select(0, i), 4096),
        (lambda x, i: x.topk(3).values, 4096),
    ],
    ids=["gather", "index", "index_select", "topk"],
)
def test_gradients_of_indexing_are_made_once(grow: Callable[..., torch.Tensor], num_bytes: int) -> None:
    """The zeros that a gradient is added to are the gradient, and there is no second tensor of that size."""
    recorder = Recorder(CPU)
    with recording(recorder):
        x = torch.empty(1024, device="meta", requires_grad=True)
        index = torch.empty(3, dtype=torch.int64, device="meta")
        out = grow(x, index)
        before = len(recorder.trace.sizes)
        out.sum().backward()

    assert recorder.trace.sizes[before:].count(num_bytes) == 1
