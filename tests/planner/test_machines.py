"""GPUs in one machine speak over PCIe, those of several over the slowest network that will do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner import communication, machines
from shallowflow.planner.plan import Workload
from shallowflow.planning import make_plan
from shallowflow.profiles import ModelSpec, load_gpu, load_instances
from shallowflow.session import RequestError
from tests.front.shell import sfplan
from tests.runtime import tiny

T4 = load_gpu("t4")
SHIPPED = tuple(load_instances("t4"))
TINY = ModelSpec(name="tiny", config=dict(tiny.CONFIG))
SMALL: dict[str, Any] = {
    "sequence_length": 64,
    "num_stages": 1,
    "activations": "save",
    "loss_chunks": 1,
    "quantization": "fp16",
}


@given(st.integers(1, 200))
def test_as_few_as_have_them(num_gpus: int) -> None:
    """The GPUs divide over them, one has no more than the largest there is, and fewer would not do."""
    found = machines.fewest(SHIPPED, num_gpus)
    most = max(instance.num_gpus for instance in SHIPPED)

    assert num_gpus % found == 0 and num_gpus // found <= most
    assert not any(num_gpus % n == 0 and num_gpus // n <= most for n in range(1, found))
    assert machines.fewest((), num_gpus) == 1


def test_the_link_is_the_slowest_on_the_way() -> None:
    """A network of 5 Gbit/s, which is slower than PCIe; one of 100 is not, and still takes its time to answer."""
    inside = communication.pcie(T4.pcie_bytes_per_second)
    alone = machines.link(T4, SHIPPED, 4, 1)
    ones, eights = machines.link(T4, SHIPPED, 4, 4), machines.link(T4, SHIPPED, 16, 2)

    assert alone == inside
    assert ones.bytes_per_second == 5e9 / 8
    assert eights.bytes_per_second == min(100e9 / 8, inside.bytes_per_second)
    assert ones.latency_seconds == eights.latency_seconds == communication.NETWORK_LATENCY_SECONDS
    assert machines.link(T4, (), 16, 2) == inside


def test_a_network_takes_longer_than_a_bus() -> None:
    """The same GPUs in more machines make a step no faster, by just what waiting for gradients takes longer."""
    work = Workload(**SMALL, global_batch_size=8, num_gpus=4, sharding="none")
    one, four = (make_plan(TINY, T4, replace(work, num_machines=n)) for n in (1, 4))
    longer = four.prediction.communication_seconds - one.prediction.communication_seconds

    assert longer > 0
    assert four.prediction.step_seconds - one.prediction.step_seconds == pytest.approx(longer)
    assert {offer.num_instances for offer in four.offers} == {4}
    assert {offer.instance for offer in one.offers} < {offer.instance for offer in four.offers}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_gpus": 4, "num_machines": 3}, "4 GPUs cannot be shared out over 3 machines; try --nodes 2"),
        ({"num_gpus": 16}, "no machine has 16 x NVIDIA T4, the largest 8; try --nodes 2"),
        (
            {"num_gpus": 4, "num_machines": 2, "sharding": "weights"},
            "--sharding weights is not planned over a network; leave it out, or try --nodes 1",
        ),
    ],
)
def test_machines_that_there_are_not(asked: dict[str, Any], said: str) -> None:
    """What cannot be is refused, with what would work."""
    with pytest.raises(RequestError) as refused:
        make_plan(TINY, T4, replace(Workload(**SMALL), **asked))

    assert str(refused.value) == said


def test_a_plan_says_its_machines(tmp_path: Path) -> None:
    """GPUs that no machine has are in as few as have them, without being asked."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny.CONFIG), encoding="utf-8")
    done = sfplan(
        config, "--gpu", "t4", "--gpus", 16, "--stages", 1, "--sequence-length", 64, "--fix", "loss_chunks=1",
        "--fix", "activations=save", "--quantization", "fp16",
    )  # fmt: skip

    assert done.code == 0
    assert "on 16 T4s in 2 machines" in done.output
    assert "2 x g4dn.metal" in done.output


def test_one_machine_is_the_default() -> None:
    """A workload that says nothing of machines is one of a single one."""
    assert replace(Workload(), num_gpus=8).gpus_per_machine == 8
