"""Micro-batches through the stages of a model by torch.distributed.pipelining's 1F1B, each on a process of its own.

The schedule is PyTorch's, plain or interleaved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, schedules
from torch.distributed.pipelining import stage as stage_module

from .interleaved import Interleaved
from .passes import Stage, Unheard
from .ranks import Ranks, noticing
from .stages import Places, Share, alone, without_others
from .step import MicroBatch, Trainee


@dataclass(slots=True)
class Line:
    """The stages of one replica as this process sees them.

    Attributes:
        width, dtype, device: of what goes from one stage to the next: a vector for every token.
        stages: of each part of the share, one.
        schedule: PyTorch's, made at the first step for as many micro-batches as all have.
        trouble: what failed in this step, if anything did.
        unseen: messages held at the peak of a step that has more micro-batches than are traced of it.
    """

    ranks: Ranks
    share: Share
    width: int
    dtype: torch.dtype
    device: torch.device
    stages: list[Stage] = field(default_factory=list)
    schedule: Any = None
    trouble: Exception | None = None
    unseen: int = 0
    _places: list[Places] = field(default_factory=list)

    def fail(self, trouble: Exception) -> None:
        """Keep what failed, and nothing of what was computed for passes that will not be."""
        self.trouble = trouble
        for stage in self.stages:
            stage.fwd_cache.clear()

    def fewest(self, num_micro_batches: int) -> int:
        """What a step needs to show *num_micro_batches* with another behind; of interleaved stages, full rounds."""
        rounds = -(-num_micro_batches // self.share.of)
        return num_micro_batches + 1 if len(self.share.parts) == 1 else rounds * self.share.of

    def buffer(self, batch: MicroBatch) -> torch.Tensor:
        """Memory for what goes between stages of a micro-batch."""
        return torch.empty((*batch.input_ids.shape, self.width), dtype=self.dtype, device=self.device)

    def passes(self, trainee: Trainee, micro_batches: Sequence[MicroBatch], num_targets: int) -> list[torch.Tensor]:
        """Forward and backward over every micro-batch; the losses on the last stage.

        Raises:
            Lost: a neighbour has ended.
            OutOfMemoryError, RuntimeError: what failed here, once all are through with the step's passes.
        """
        with contextlib.nullcontext() if self.ranks.talks else _unconnected(self.share):
            self._prepare(trainee, len(micro_batches))
            self.trouble = None
            for stage in self.stages:
                stage.begin(micro_batches, num_targets)
            _held = [self.buffer(micro_batches[0]) for _ in range(self.unseen)]
            target = torch.arange(len(micro_batches))
            with noticing():
                self.schedule.step(target=target, return_outputs=False)
        losses, trouble = self.stages[-1].losses, self.trouble
        for stage in self.stages:
            stage.clear_runtime_states()
            stage.begin((), 1)
        self.trouble = None
        if trouble is not None:
            raise trouble
        return losses

    def _prepare(self, trainee: Trainee, num_micro_batches: int) -> None:
        """PyTorch's schedule for so many micro-batches, over the parts of this process."""
        if self.stages and self.schedule._n_microbatches == num_micro_batches:
            return
        make = Stage if self.ranks.talks else Unheard
        self.stages = [make(self, trainee, part) for part in range(len(self.share.parts))]

        def scaled(loss: torch.Tensor, _number: torch.Tensor) -> torch.Tensor:
            return loss * trainee.loss_scale.value

        if len(self.stages) > 1:
            self.schedule = Interleaved([*self.stages], num_micro_batches, scaled, scale_grads=False)
            return
        most = num_micro_batches if self.ranks.talks else max(num_micro_batches, self.share.of)
        self.schedule = Schedule1F1B(self.stages[0], most, scaled, scale_grads=False)
        self.schedule._n_microbatches = num_micro_batches  # of fewer than stages, a part of a step is traced

    def is_last(self, part: int) -> bool:
        """Whether the head comes after this *part*."""
        return self.share.is_last and part == len(self.share.parts) - 1

    def computed(
        self, trainee: Trainee, batch: MicroBatch, part: int, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What a *part* makes of what the one before made: its summed loss the last one."""
        with alone(self._others(trainee)[part]):
            return self._through(trainee, batch, part, hidden)

    def _others(self, trainee: Trainee) -> list[Places]:
        """Of each part what stands for the others meanwhile."""
        if not self._places:
            self._places = [without_others(trainee.model, self.share, n) for n in range(len(self.share.parts))]
        return self._places

    def _through(self, trainee: Trainee, batch: MicroBatch, part: int, hidden: torch.Tensor | None) -> torch.Tensor:
        if self.is_last(part):
            return trainee.after(batch, hidden)
        base: Any = trainee.model.get_base_model()  # type: ignore[operator]
        taken = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
        if batch.position_ids is not None:
            taken["position_ids"] = batch.position_ids
        made: torch.Tensor = base.get_decoder()(**taken, use_cache=False).last_hidden_state
        return made

    def forward(
        self,
        trainee: Trainee,
        batches: Sequence[MicroBatch],
        last: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Forward over no more micro-batches than stages; see ``Pipe.forward``.

        Raises:
            Lost: a neighbour has ended.
        """
        if len(batches) > self.share.of:
            raise ValueError(f"{len(batches)} micro-batches go through {self.share.of} stages at once")
        found: list[torch.Tensor] = []
        sent = _Sent(self)
        for part in range(len(self.share.parts)):
            arriving = [] if part == 0 and self.share.is_first else _arriving(self, batches)
            for number, batch in enumerate(batches):
                hidden = arriving[number]() if arriving else None
                with alone(self._others(trainee)[part]):
                    if last is not None and self.is_last(part) and hidden is not None:
                        made = last(hidden)
                    else:
                        made = self._through(trainee, batch, part, hidden)
                if self.is_last(part):
                    found.append(made)
                else:
                    sent.send(made.contiguous())
        sent.wait()
        return found or [torch.zeros((), device=self.device) for _ in batches]


def _arriving(line: Line, batches: Sequence[MicroBatch]) -> list[Callable[[], torch.Tensor]]:
    """What waits for each message of an evaluation.

    Where those go round they are all asked for before anything is sent on: of two stages each is before and after the
    other, and NCCL's messages between two processes must be in one order on both sides.
    """
    share, ranks = line.share, line.ranks
    source = (share.number - 1) % share.of

    def now(batch: MicroBatch) -> torch.Tensor:
        hidden = line.buffer(batch)
        if ranks.talks:
            with noticing():
                dist.recv(hidden, group=ranks.line, group_src=source)
        return hidden

    def later(hidden: torch.Tensor, work: Any) -> torch.Tensor:
        if work is not None:
            with noticing():
                work.wait()
        return hidden

    if len(share.parts) == 1:
        return [functools.partial(now, batch) for batch in batches]
    found: list[Callable[[], torch.Tensor]] = []
    for batch in batches:
        hidden = line.buffer(batch)
        with noticing():
            work = dist.irecv(hidden, group=ranks.line, group_src=source) if ranks.talks else None
        found.append(functools.partial(later, hidden, work))
    return found


@dataclass(slots=True)
class _Sent:
    """What goes to the next stage in an evaluation.

    Where that goes round, a stage goes on while its last message is on its way, or all would wait in a ring.
    """

    line: Line
    tensor: torch.Tensor | None = None
    work: Any = None

    def send(self, made: torch.Tensor) -> None:
        """Send this, once what was sent before has arrived."""
        line = self.line
        self.wait()
        self.tensor = made if len(line.share.parts) > 1 else None
        if not line.ranks.talks:
            return
        to = (line.share.number + 1) % line.share.of
        with noticing():
            if self.tensor is None:
                dist.send(made, group=line.ranks.line, group_dst=to)
            else:
                self.work = dist.isend(made, group=line.ranks.line, group_dst=to)

    def wait(self) -> None:
        """Until it has arrived."""
        if self.work is not None:
            with noticing():
                self.work.wait()
        self.work = self.tensor = None


def connected(trainee: Trainee, share: Share | None, ranks: Ranks, compute_dtype: torch.dtype) -> Trainee:
    """*trainee* among the processes *ranks*, with its way to the neighbours of its *share*."""
    trainee.ranks = ranks
    if share is not None:
        device = next(iter(trainee.parameters)).device
        config: Any = trainee.model.config
        trainee.pipe = Line(ranks, share, int(config.get_text_config().hidden_size), compute_dtype, device)
    return trainee


@dataclass(slots=True)
class _Unsent:
    """Messages that go nowhere, held for as long as gloo's are by the work that sends them."""

    tensors: list[Any]

    def wait(self) -> None:
        """Nothing is on its way."""


def _unsent(messages: list[Any], desc: str | None = None) -> list[_Unsent]:
    return [_Unsent([message]) for message in messages]


@contextlib.contextmanager
def _unconnected(share: Share) -> Iterator[None]:
    """Let PyTorch's stages and schedules run where no other process is, and none is told anything."""
    theirs, levels = cast(Any, stage_module), cast(Any, dist).DebugLevel
    alone = SimpleNamespace(
        get_rank=lambda _group=None: share.number,
        get_world_size=lambda _group=None: share.of,
        get_debug_level=lambda: levels.OFF,
        DebugLevel=levels,
    )
    before = theirs.dist, schedules._batch_p2p
    theirs.dist, schedules._batch_p2p = alone, _unsent  # type: ignore[assignment]
    try:
        yield
    finally:
        theirs.dist, schedules._batch_p2p = before
