"""Copies beside the computing: ordered where they must be, in the order of need, and none beyond their layer."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shallowflow.planner.layer_cost import sent_to_host
from shallowflow.planner.profiler import operators
from shallowflow.planner.strategies import Strategy
from shallowflow.runtime import offload, transfers
from shallowflow.runtime.build import empty_model, transformers_config
from shallowflow.runtime.step import MicroBatch, Trainee, make_trainee
from shallowflow.runtime.transfers import Parcel, Streamed
from tests.planner import tiny as families
from tests.runtime import tiny
from tests.runtime.streams import Cuda, Stream

BATCHES = [tiny.random_batch([16, 9]), tiny.random_batch([12, 16], seed=1)]
FAMILIES = sorted(families.FAMILIES)


@dataclass(slots=True, eq=False)
class Watched(Streamed):
    """Copies over a stand-in for CUDA, in ordinary memory, of which all is written down.

    Attributes:
        made: sizes of the host buffers.
        numbers: parcels by when they were fetched.
        arrived: their numbers, in the order in which they were waited for.
    """

    cuda: Any = field(default_factory=Cuda)
    made: list[int] = field(default_factory=list)
    numbers: WeakKeyDictionary[Parcel, int] = field(default_factory=WeakKeyDictionary)
    num_fetched: int = 0
    arrived: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allocate = self._make

    def _make(self, num_bytes: int) -> torch.Tensor:
        self.made.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def fetch(self, parcel: Parcel, device: torch.device) -> None:
        """Note it."""
        self.numbers[parcel] = self.num_fetched
        self.num_fetched += 1
        super(Watched, self).fetch(parcel, device)

    def arrive(self, parcel: Parcel) -> None:
        """Note it."""
        self.arrived.append(self.numbers.get(parcel, -1))
        super(Watched, self).arrive(parcel)


def on(monkeypatch: pytest.MonkeyPatch, way: Streamed, family: str = "llama") -> Trainee:
    """A tiny model whose layers all offload over *way*."""
    monkeypatch.setattr(offload, "transfers_of", lambda _device: way)
    torch.manual_seed(0)
    chosen = tiny.configuration(activations="offload")
    model = empty_model(transformers_config({**families.FAMILIES[family]}, chosen.num_layers), "float32", "cpu")
    trainee = make_trainee(model, chosen, "float32", tiny.CPU)
    for parameter in trainee.parameters:
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return trainee


def back_and_forth(trainee: Trainee, batch: MicroBatch) -> None:
    """One micro-batch."""
    trainee.loss(batch).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_races(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two micro-batches no stream touches or frees what another may still be using, and copies did go beside."""
    way = Watched()
    trainee = on(monkeypatch, way, family)

    with way.cuda:
        for batch in BATCHES:
            back_and_forth(trainee, batch)
        gc.collect()

    assert way.cuda.races == []
    assert way.beside.clock["copying"] >= 2 * way.num_fetched > 2 * len(trainee.layers)


def nothing(*_arguments: object) -> None:
    """Wait for nothing."""


OMISSIONS: dict[str, tuple[type, str, Callable[..., None]]] = {
    "a copy begins before its source is computed, or its target free": (Stream, "wait_stream", nothing),
    "what is sent is freed before it has left": (Streamed, "leave", nothing),
    "what comes back is used before it is there": (Stream, "wait_event", nothing),
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_every_wait_is_needed(omission: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of them something races, so that the test above would say so."""
    way = Watched()
    trainee = on(monkeypatch, way)
    monkeypatch.setattr(*OMISSIONS[omission])

    with way.cuda:
        back_and_forth(trainee, BATCHES[0])

    assert way.cuda.races


def test_only_cuda_has_a_stream_for_copies() -> None:
    """Elsewhere a copy is done when its call returns, and nothing is page-locked before there is something to send."""
    assert {type(transfers.transfers_of(torch.device(kind))) for kind in ("cpu", "meta")} == {transfers.Immediate}
    found = transfers.transfers_of(torch.device("cuda"))
    assert isinstance(found, Streamed) and found.cuda is torch.cuda and not found.buffers


@pytest.mark.parametrize("fetched", [False, True])
def test_what_is_never_used_is_waited_for(fetched: bool) -> None:
    """As after an error: what is on its way is freed only once it is there, and its host buffer is used again."""
    way = Watched()
    with way.cuda:
        sources = [torch.ones(64, dtype=torch.uint8) for _ in range(2)]
        parcel = way.send(sources[0])
        way.leave()
        if fetched:
            way.fetch(parcel, tiny.CPU)
        del parcel
        way.send(sources[1])
        way.leave()
        sources.clear()

    assert way.cuda.races == []
    assert way.made == [64]
    assert len(way.arrived) == fetched


def test_a_layer_ends_with_nothing_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a layer's forward pass the computing stream is behind every copy, and each layer has sent something."""
    way = Watched()
    trainee = on(monkeypatch, way)
    num_left: list[int] = []

    def check(*_arguments: object) -> None:
        assert way.cuda.computing.clock["copying"] == way.beside.clock["copying"]
        num_left.append(way.beside.clock["copying"])

    for layer in trainee.layers:
        layer.register_forward_hook(check)
    with way.cuda:
        trainee.loss(BATCHES[0])

    assert len(num_left) == len(trainee.layers) == len(set(num_left))


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_come_back_in_the_order_of_need(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever something is computed, what has been waited for is what was fetched first; in the end it is all.

    So the prices let the n-th use wait for the n-th copy.
    """
    way = Watched()
    trainee = on(monkeypatch, way, family)
    loss = trainee.loss(BATCHES[0])

    class Check(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert operators.is_view(func) or set(way.arrived) == set(range(len(way.arrived)))
            return func(*args, **(kwargs or {}))

    with Check():  # type: ignore[no-untyped-call]
        loss.backward()

    assert len(way.arrived) == way.num_fetched > 0


def test_a_streamed_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are bit for bit those of saved activations, and host buffers are those of one micro-batch for ever."""
    way = Watched()
    monkeypatch.setattr(offload, "transfers_of", lambda _device: way)
    saving, sending = tiny.trainee(activations="save"), tiny.trainee(activations="offload")

    num_made = []
    for batch in BATCHES:
        back_and_forth(saving, batch)
        back_and_forth(sending, batch)
        num_made.append(len(way.made))

    assert num_made[0] == num_made[1] > 0
    theirs = [p.grad for p in saving.parameters]
    assert all(torch.equal(p.grad, other) for p, other in zip(sending.parameters, theirs, strict=True))  # type: ignore[arg-type]


def test_host_buffers_are_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer but the first, whose input needs no gradient, sends to host memory what the profile of one says."""
    profile = families.profiled("llama", "cpu", Strategy(weight_format="fp32", activations="offload"), 16)
    way = Watched()
    trainee = on(monkeypatch, way)

    sums: list[int] = []
    for layer in trainee.layers:
        layer.register_forward_hook(lambda *_: sums.append(sum(way.made)))

    trainee.loss(BATCHES[0])

    first, second, third = sums
    assert second - first == third - second == sent_to_host(profile, 2, 4) >= first


def test_page_locked_memory_is_unlocked_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just as many bytes are locked as are wanted, and unlocked once while they can still be read."""
    calls: Counter[tuple[str, int]] = Counter()

    def unpin(address: int) -> None:
        ctypes.string_at(address, 5000)
        calls["unpin", address] += 1

    monkeypatch.setattr(transfers, "pin_memory", lambda address, size: calls.update([("pin", address), ("size", size)]))
    monkeypatch.setattr(transfers, "unpin_memory", unpin)
    made = transfers.page_locked(5000)
    address = made.data_ptr()
    made.fill_(7)

    assert calls == {("pin", address): 1, ("size", 5000): 1}
    del made
    assert calls["unpin", address] == 1
