"""Processes that hold a model's stages make of a run what one process makes, and end together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.conftest import Ask, asking

NOISE = 2e-6
"""Of a loss: norms and gradients are summed in another order."""
MEMORY = 0.015
"""Of a peak: a step is traced with fewer micro-batches than it has, whose tokens are there all along."""


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask the program of stages."""
    with asking("tests.runtime.in_stages") as asked:
        yield asked


def check_alike(runs: Any, shapes: list[list[int]]) -> None:
    """Assert that every process of every shape tells of the run that one process makes, and takes what was planned."""
    ((alone,), *others) = runs["runs"]
    predicted = runs["predicted"][1:]
    assert len(others) == len(shapes) == len(predicted)
    for (gpus, stages), every, peaks in zip(shapes, others, predicted, strict=True):
        assert len(every) == gpus and len(peaks) == stages
        for told in every:
            assert told["outcome"] == "completed" and told["tokens"] == alone["tokens"]
            assert told["losses"][0] == alone["losses"][0]  # the same weights, and the same adapter
            assert told["losses"] == pytest.approx(alone["losses"], rel=NOISE)
            assert told["evaluations"] == pytest.approx(alone["evaluations"], rel=NOISE)
            assert told["samples"] == alone["samples"]
            assert told["peaks"] == pytest.approx(peaks * (gpus // stages), rel=MEMORY)
        assert every[0]["peaks"][0] != every[0]["peaks"][1]  # and no stage what another
    assert all(furthest is not None and furthest < 1e-4 for furthest in runs["adapters"])


def test_stages_and_their_replicas_make_the_run_of_one_process(ask: Ask) -> None:
    """Two stages, four, and two of two: losses, evaluations, samples and the adapter, over micro-batches of all sizes.

    Each rank's measured peak is its own stage's predicted one.
    """
    shapes = [[2, 2], [4, 4], [4, 2]]
    check_alike(ask("alike", "fp16", shapes, {}), shapes)


@pytest.mark.parametrize(
    ("quantization", "asked"),
    [
        ("nf4", {"activations": "recompute", "loss_chunks": 4, "tied": False}),
        ("int8", {"activations": "save", "packing": True}),
    ],
)
def test_formats_policies_and_packing_are_no_exception(quantization: str, asked: dict[str, Any], ask: Ask) -> None:
    """Nor do quantized weights, layers computed again, a loss in parts, or several documents to a sequence matter."""
    check_alike(ask("alike", quantization, [[2, 2]], asked), [[2, 2]])


@pytest.mark.parametrize(
    ("quantization", "shapes", "asked"),
    [
        ("fp16", [[2, 2, 2], [4, 4, 2], [4, 2, 4]], {}),
        ("nf4", [[2, 2, 4]], {"activations": "recompute", "packing": True, "tied": False}),
        ("int8", [[2, 2, 2]], {"loss_chunks": 4, "activations": "recompute mlp"}),
    ],
)
def test_interleaved_stages_make_the_run_of_one_process(
    quantization: str, shapes: list[list[int]], asked: dict[str, Any], ask: Ask
) -> None:
    """With two parts of the model on each GPU, or four: the same losses, evaluations, samples and adapter."""
    runs = ask("alike", quantization, shapes, {**asked, "num_layers": 8})

    check_alike(runs, [shape[:2] for shape in shapes])


def test_a_run_moves_between_interleaved_stages_and_others(ask: Ask) -> None:
    """Whoever holds a layer, a checkpoint has it."""
    found = ask("moved", [[2, 2, 2, 2], [4, 4, 4, 2], [2, 2, 5], [1, 1, 6]], 8)

    assert found["moved"][0]["losses"] == pytest.approx(found["whole"][0]["losses"], rel=NOISE)


def test_every_way_to_store_and_save_a_layer_may_be_cut(ask: Ask) -> None:
    """Losses, norms and evaluations of all formats and policies, with other ones on the other stage."""
    for alone, *stages in ask("steps_of_every_kind"):
        for told in stages:
            assert told[0] == alone[0]
            assert told == pytest.approx(alone, rel=NOISE)


def test_a_run_moves_to_other_numbers_of_stages(ask: Ask) -> None:
    """In two stages, four, two twice, with weights that are shared, and whole it learns what it learns in one go."""
    found = ask("moved", [[2, 2, 1], [4, 4, 2], [4, 2, 3], [2, 0, 4], [2, 2, 5], [1, 1, 6]])

    assert found["moved"][0]["losses"] == pytest.approx(found["whole"][0]["losses"], rel=NOISE)
    assert found["moved"][0]["notes"] == ["on with 1 GPU, not as it began", "resumed after step 5"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_stage_ends_the_run_which_goes_on_from_its_checkpoint(rank: int, ask: Ask) -> None:
    """What was saved is of all stages; resumed, the run ends to the last bit as if nothing had happened."""
    told = ask("struck", rank, signal.SIGKILL, 3)

    assert told["first"][rank] == f"signal {int(signal.SIGKILL)}"
    assert told["first"][1 - rank].startswith("RunLost: another process of the run was lost after step 3; ")
    assert told["saved"] == ["step-00000001", "step-00000002"]
    assert [one["adapter"] for one in told["again"]] == [one["adapter"] for one in told["whole"]]
    assert told["again"][0]["losses"] == told["whole"][0]["losses"]


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_one_stage_that_is_interrupted_stops_all(rank: int, number: int, ask: Ask) -> None:
    """All stop after the same step, which is saved once with all stages."""
    told = ask("struck", rank, number, 3)

    assert [(one["outcome"], len(one["losses"])) for one in told["first"]] == [("interrupted", 3)] * 2
    assert told["saved"] == ["step-00000002", "step-00000003"]
    assert [one["adapter"] for one in told["again"]] == [one["adapter"] for one in told["whole"]]


@pytest.mark.parametrize(("rank", "where", "parts"), [(1, "forward", 1), (0, "backward", 1), (0, "forward", 2)])
def test_memory_that_one_stage_lacks_leaves_no_other_waiting(rank: int, where: str, parts: int, ask: Ask) -> None:
    """All go on together under an alternative, from the last whole step."""
    for told in ask("short_of_memory", rank, where, parts):
        assert told["outcome"] == "completed"
        assert told["fallbacks"] == [[3, 3, f"rank {rank}: CUDA out of memory."]]


def test_an_overflow_on_one_stage_skips_the_update_of_all(ask: Ask) -> None:
    """Loss scales and skipped updates are the same on every stage."""
    first, second = ask("overflowing")

    assert first == second
    (skipped, _, scale), (made, _, later) = first
    assert skipped and not made
    assert scale == later == 512
