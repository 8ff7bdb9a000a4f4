"""Processes that share the frozen weights make of a run what one process makes that has them all."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.runtime.conftest import Ask
from tests.runtime.test_ranks import LOST, NOISE, check_alike


@pytest.fixture(scope="module")
def shared(ask: Ask) -> Any:
    """The run in one process, and in two that share the weights, undisturbed."""
    return ask("alike_sharded", "fp16", None, {}, 2)


def test_shared_weights_make_the_run_of_one(shared: Any) -> None:
    """Losses, evaluations, samples and tokens are those of one process, each process's peak the predicted one."""
    check_alike(shared)


@pytest.mark.parametrize(
    ("quantization", "activations", "changes", "size"),
    [
        ("fp16", "save", {"loss_chunks": 4}, 4),
        ("nf4", "save", {}, 4),
        ("nf4", "recompute", {"double_quantization": True}, 2),
        ("nf4", "recompute attention", {}, 2),
        ("int8", "save", {}, 2),
        ("int8", "recompute mlp", {"loss_chunks": 4}, 2),
        ("nf4", "recompute", {"adapter": "dora"}, 2),
        ("nf4", "save", {"target_modules": "attention"}, 2),
    ],
)
def test_every_format_and_policy_is_shared_alike(
    quantization: str, activations: str, changes: dict[str, Any], size: int, ask: Ask
) -> None:
    """So it is with quantized weights, of which each process has its part of bytes and constants, however computed."""
    noise = NOISE if "loss_chunks" in changes else 0.0  # a loss of parts of the head is summed in another order
    check_alike(ask("alike_sharded", quantization, activations, changes, size), noise)


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_is_that_of_fully_shard(size: int, ask: Ask) -> None:
    """PyTorch's FSDP2 has the same loss and gradients, where it can hold the weights: not quantized."""
    for theirs, ours in ask("beside_fsdp", size):
        assert len(ours) == len(theirs) > 20
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_run_moves_between_shared_and_whole_weights(ask: Ask, shared: Any) -> None:
    """What each process has of the weights is no part of a checkpoint."""
    (told,) = ask("moved_in_and_out")

    assert told["losses"] == pytest.approx(shared["1"][0]["losses"], rel=NOISE)
    assert told["notes"] == ["on with 1 GPU, not as it began", "resumed after step 5"]


def test_a_killed_process_costs_no_shared_step(ask: Ask, shared: Any) -> None:
    """Killed between steps, the run is saved after the last one, and resumed as if nothing had happened."""
    told = ask("struck", 1, signal.SIGKILL, 3, "weights")

    assert told["first"][0].startswith(LOST) and told["first"][1] == f"signal {int(signal.SIGKILL)}"
    assert told["saved"] == ["step-00000003"]
    assert [one["adapter"] for one in told["again"]] == [shared["2"][0]["adapter"]] * 2


@pytest.mark.parametrize(("rank", "kept"), [(0, "nothing was saved"), (1, "what was learned is saved in ")])
def test_one_killed_in_a_pass_is_missed_by_the_other(rank: int, kept: str, ask: Ask) -> None:
    """Who waits for its part hears that it is gone, and saves if it is the one that does."""
    told = ask("killed_in_a_pass", rank)

    assert told[rank] == f"signal {int(signal.SIGKILL)}"
    assert told[1 - rank].startswith(f"RunLost: another process of the run was lost after step 3; {kept}")


def test_memory_that_all_lack_is_fallen_back_from(ask: Ask, shared: Any) -> None:
    """Where all find none at the same place, all go on under the next alternative."""
    for told in ask("short_while_sharing", 0, 1):
        assert [one[2] for one in told["fallbacks"]] == ["rank 0: CUDA out of memory."]
        assert told["losses"] == pytest.approx(shared["1"][0]["losses"], rel=NOISE)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_one_lacks_in_a_shared_pass_ends_the_run(rank: int, ask: Ask) -> None:
    """The other waits for its part of a matrix, and can hear nothing but its end."""
    told = ask("short_while_sharing", rank)

    assert told[rank].startswith("RunFailed: out of memory (CUDA out of memory.) in a pass that other processes had")
    assert told[1 - rank].startswith("RunLost: another process of the run was lost after step 3; what was learned is")
