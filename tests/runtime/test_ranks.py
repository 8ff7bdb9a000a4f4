"""Processes that share a run make of it what one process makes, and end together."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shallowflow.runtime.ranks import Lost, Ranks
from shallowflow.runtime.step import Trainee
from tests.runtime import tiny
from tests.runtime.conftest import Ask

LOST = "RunLost: another process of the run was lost after step 3; what was learned is saved in "
NOISE = 2e-6
"""Of a loss: gradients are summed in another order."""


@pytest.fixture(scope="module")
def whole(ask: Ask) -> Any:
    """The run in one, two and four processes, undisturbed."""
    return ask("alike", "fp16", None, 2, 4)


def check_alike(runs: Any, noise: float = 0.0) -> None:
    """Assert that every process of every number of them tells of the run that one process makes.

    The first loss may differ by *noise*, all others, which are of other adapters, by that of sums.
    """
    (alone,) = runs["1"]
    for size in (size for size in ("2", "4") if size in runs):
        for told in runs[size]:
            assert {**told, "peaks": []} == {**runs[size][0], "peaks": []}  # the adapter to the last bit
            assert told["tokens"] == alone["tokens"]
            assert told["losses"][0] == pytest.approx(alone["losses"][0], rel=noise, abs=0)  # from the same adapter
            assert told["losses"] == pytest.approx(alone["losses"], rel=NOISE)
            assert told["evaluations"] == pytest.approx(alone["evaluations"], rel=NOISE)
            assert told["samples"] == alone["samples"]
            assert len(told["peaks"]) == int(size)
            assert told["peaks"] == pytest.approx([runs["predicted"][size]] * int(size), rel=0.02)


def test_several_processes_make_the_run_of_one(whole: Any) -> None:
    """Losses, evaluations, samples and tokens are those of one process; the adapter is one and the same in all."""
    check_alike(whole)


@pytest.mark.parametrize(("quantization", "activations"), [("nf4", "recompute"), ("int8", "save")])
def test_quantized_and_recomputed_layers_are_no_exception(quantization: str, activations: str, ask: Ask) -> None:
    """Nor do frozen weights in other formats, or layers that are computed again, change what processes share."""
    check_alike(ask("alike", quantization, activations, 2))


def test_every_weight_may_learn(ask: Ask) -> None:
    """Gradients of embeddings and head are shared like those of adapters."""
    check_alike(ask("alike", "full", None, 2))


def test_what_is_dropped_does_not_depend_on_the_process(ask: Ask) -> None:
    """A micro-batch draws the same random numbers wherever it is run."""
    dropped, whole = (ask("with_dropout", rate) for rate in (0.9, 0.0))

    assert dropped == pytest.approx([dropped[0]] * 3, rel=NOISE)
    assert abs(dropped[0] / whole[0] - 1) > 1e-4


def test_a_run_moves_to_other_numbers_of_processes(ask: Ask, whole: Any) -> None:
    """Begun in two, gone on with in four and ended in one, it learns what it learns in one go."""
    (told,) = ask("moved")

    assert told["losses"] == pytest.approx(whole["1"][0]["losses"], rel=NOISE)
    assert told["tokens"] == whole["1"][0]["tokens"]
    assert told["notes"] == ["on with 1 GPU, not as it began", "resumed after step 4"]


# Ends


def test_a_process_votes_for_a_sum_once_its_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds gradients up on a device knows that no other process was lost before it had its own."""
    happened: list[str] = []
    told = Trainee._told

    def read(self: Trainee, *args: Any) -> list[float]:
        happened.append("wait")
        return told(self, *args)

    def gather(found: list[Any], value: Any) -> None:
        found[:] = [value] * len(found)

    monkeypatch.setattr(Trainee, "_told", read)
    monkeypatch.setattr(dist, "all_reduce", lambda _sum, group: happened.append("sum"))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    trainee = tiny.trainee()
    trainee.ranks = Ranks(size=2, talks=True)
    trainee.before_micro_batch = lambda: happened.append("vote")

    trainee.step([tiny.random_batch([16, 16])])

    assert happened == ["vote", "wait", "vote", "sum", "wait"]


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (dist.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), torch.AcceleratorError),
        (RuntimeError("Connection closed by peer [127.0.0.1]:29500"), Lost),
    ],
)
def test_what_fails_here_is_no_other_processes_end(
    error: RuntimeError, meant: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and devices that fail under a sum are this process's own; only what else fails tells of another's end."""

    def fail(_sum: torch.Tensor, group: None) -> None:
        raise error

    monkeypatch.setattr(dist, "all_reduce", fail)

    with pytest.raises(meant) as caught:
        Ranks(size=2, talks=True).connect(tiny.CPU)

    assert caught.type is meant


def test_a_killed_process_costs_no_step(ask: Ask, whole: Any) -> None:
    """The first saves the last whole step when another is killed; resumed, the run ends as if nothing had happened."""
    told = ask("struck", 1, signal.SIGKILL, 3)

    assert told["first"][0].startswith(LOST) and told["first"][1] == f"signal {int(signal.SIGKILL)}"
    assert told["saved"] == ["step-00000003"]
    assert [one["adapter"] for one in told["again"]] == [whole["2"][0]["adapter"]] * 2


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_one_that_is_interrupted_stops_all(rank: int, number: int, ask: Ask, whole: Any) -> None:
    """Whichever process hears of it, all stop after the same step, which is saved once; resumed, nothing differs."""
    told = ask("struck", rank, number, 3)

    assert [(one["outcome"], len(one["losses"])) for one in told["first"]] == [("interrupted", 3)] * 2
    assert told["saved"] == ["step-00000003"]
    assert [one["adapter"] for one in told["again"]] == [whole["2"][0]["adapter"]] * 2


@pytest.mark.parametrize(
    ("rank", "where", "after", "kept"),
    [
        (1, "passes", 3, 3),
        (0, "passes", 3, 3),
        (1, "update", 3, 4),
        (0, "update", 3, 2),
        (1, "update", 1, 2),  # whose memory is measured
        (0, "update", 1, 0),
    ],
)
def test_memory_that_one_lacks_is_all_processes_affair(
    rank: int, where: str, after: int, kept: int, ask: Ask, whole: Any
) -> None:
    """All fall back together, from the last update that the first process made whole, and learn the same."""
    found = ask("short_of_memory", rank, where, after)

    for told in found:
        (_, went_on_at, reason), *others = told["fallbacks"]
        assert (went_on_at, reason, others) == (kept, f"rank {rank}: CUDA out of memory.", [])
        assert told["losses"] == pytest.approx(whole["1"][0]["losses"], rel=NOISE)
    assert found[0]["adapter"] == found[1]["adapter"]


def test_an_alternative_that_one_doubts_is_passed_over_by_all(ask: Ask, whole: Any) -> None:
    """All fall back to the same alternative, which is in each of them what it was planned to be."""
    first, second = ask("short_and_doubtful")

    assert first["notes"] == second["notes"]
    assert first["notes"][0].startswith("alternative ") and "is passed over: rank 1: it is another" in first["notes"][0]
    assert first["adapter"] == second["adapter"]
    assert first["losses"] == pytest.approx(whole["1"][0]["losses"], rel=NOISE)


@pytest.mark.parametrize(("rank", "where"), [(1, "model"), (0, "model"), (0, "answer")])
def test_memory_may_be_short_before_training(rank: int, where: str, ask: Ask, whole: Any) -> None:
    """No process waits for what one without memory for the model, or for an answer, does not send."""
    found = ask("short_before_training", rank, where)

    assert [told["fallbacks"] for told in found] == [[[0, 0, f"rank {rank}: CUDA out of memory."]]] * 2
    assert found[0]["losses"] == pytest.approx(whole["1"][0]["losses"], rel=NOISE)


@pytest.mark.parametrize(("asked", "short"), [(0, 1), (1, 0)])
def test_a_signal_to_one_outweighs_the_memory_that_another_lacks(asked: int, short: int, ask: Ask, whole: Any) -> None:
    """Where one is asked to stop as another gives up, all stop, none falls back, and no step is lost."""
    told = ask("asked_and_short", asked, short)

    assert [(one["outcome"], len(one["losses"])) for one in told["first"]] == [("interrupted", 3)] * 2
    assert [one["fallbacks"] for one in told["first"]] == [[]] * 2
    assert [one["adapter"] for one in told["again"]] == [whole["2"][0]["adapter"]] * 2


def test_an_overflow_of_one_skips_the_update_of_all(ask: Ask) -> None:
    """Loss scales and skipped updates are the same in every process, whoever overflowed."""
    first, second = ask("overflowing")

    assert first == second
    (skipped, _, scale), (made, _, later) = first
    assert skipped and not made
    assert scale == later == 512


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("other", "rank 1 was given another data than rank 0; give all the same"),
        ("num_steps", "rank 1 was given another --steps than rank 0; give all the same"),
        ("resume", "rank 1 was given another --resume than rank 0; give all the same"),
        ("version", "rank 1 was given another version of torch than rank 0; give all the same"),
        ("number", "the plan is for 4 GPUs and 2 processes were started; start it with sfplan train or torchrun "),
    ],
)
def test_processes_that_do_not_fit_are_told(what: str, told: str, ask: Ask) -> None:
    """All are refused in the same words, before anything is loaded."""
    first, second = ask("unlike", what)

    assert first == second
    assert first.startswith(f"RunError: {told}")


def test_what_one_process_lacks_is_told_by_all(ask: Ask) -> None:
    """The process that lacks its data says so, and the others say whose is missing."""
    first, second = ask("unlike", "missing")

    assert first.startswith("RunError: rank 1: ") and "missing.jsonl" in first
    assert second.startswith("DataError: ") and "missing.jsonl" in second
