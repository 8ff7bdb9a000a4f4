"""Micro-batches through the stages of a model by torch.distributed.pipelining's 1F1B, each on a process of its own.

The schedule is PyTorch's. What is ours is where a stage's messages go: PyTorch's own stage has a buffer for every
micro-batch of a step, all of one shape, for as long as it lives. Here each is made for its micro-batch, which may be
shorter than others, and goes once the backward pass is through with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, schedules
from torch.distributed.pipelining import stage as stage_module

from .ranks import Ranks, noticing
from .stages import Share
from .step import MicroBatch, Trainee, not_asking_for_documents


class Stage(PipelineStage):
    """What one process computes of each micro-batch, and what it tells its neighbours.

    Where something fails here, zeros go on in its place, so that no neighbour waits for ever: all hear of it at the
    next vote.

    Attributes:
        trouble: what failed, if anything did.
    """

    def __init__(self, pipe: Line, trainee: Trainee, share: Share, group: Any) -> None:
        like = torch.empty(0, dtype=pipe.dtype, device=pipe.device)
        super().__init__(
            trainee.model,
            share.number,
            share.of,
            pipe.device,
            input_args=() if share.is_first else like.requires_grad_(),
            output_args=like if share.is_last else like.detach().requires_grad_(),
            group=group,
        )
        self.pipe, self.trainee = pipe, trainee
        self.batches: Sequence[MicroBatch] = ()
        self.num_targets = 1
        self.losses: list[torch.Tensor] = []
        self.trouble: Exception | None = None

    def begin(self, batches: Sequence[MicroBatch], num_targets: int) -> None:
        """Be given the micro-batches of a step."""
        self.batches, self.num_targets = batches, num_targets
        self.losses, self.trouble = [], None

    # Messages

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """What to receive before the forward pass."""
        if self.is_first:
            return []
        (info,) = self.args_recv_info[fwd_chunk_id]
        info.buffer = self._room(fwd_chunk_id)
        return self._message(dist.irecv, info.buffer, -1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """What to send after it."""
        if self.is_last:
            return []
        (output,), _ = self.fwd_cache[fwd_chunk_id]
        return self._message(dist.isend, output.detach().contiguous(), 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """What to receive before the backward pass."""
        if self.is_last:
            return []
        (info,) = self.grad_recv_info[bwd_chunk_id]
        info.buffer = self._room(bwd_chunk_id)
        return self._message(dist.irecv, info.buffer, 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """What to send after it."""
        gradients = self.bwd_cache.pop(bwd_chunk_id)
        if self.is_first:
            return []
        made = gradients[0]
        return self._message(dist.isend, self._room(bwd_chunk_id).zero_() if made is None else made.contiguous(), -1)

    def _message(self, way: Any, tensor: Any, to: int) -> list[Any]:
        if not self.pipe.ranks.talks:
            return [tensor]  # held as long as a message would be
        return [dist.P2POp(way, tensor, group=self.group, group_peer=self.stage_index + to)]

    def _room(self, number: int) -> torch.Tensor:
        """Memory for a message of micro-batch *number*; where there is none, that of all that has failed with it."""
        try:
            return self.pipe.buffer(self.batches[number])
        except torch.OutOfMemoryError as error:
            self._fail(error)
        return self.pipe.buffer(self.batches[number])

    # Passes

    def forward_maybe_with_nosync(self, *args: Any, **_kwargs: Any) -> torch.Tensor:
        """The loss of the present micro-batch on the last stage, on others what goes to the next."""
        batch = self.batches[self._present]
        if batch.seed is not None:
            torch.manual_seed(batch.seed)
        with not_asking_for_documents():
            made = self.pipe.computed(self.trainee, batch, *args)
        return made / self.num_targets if self.is_last else made

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """One forward pass."""
        self._present = fwd_chunk_id
        if self.trouble is None:
            try:
                made = super().forward_one_chunk(fwd_chunk_id, (), {}, save_forward_output=False)
            except RuntimeError as error:
                self._fail(error)
            else:
                self.losses += [made.detach()] if self.is_last else []
                return made
        zeros = torch.zeros((), device=self.device) if self.is_last else self._room(fwd_chunk_id).zero_()
        self.fwd_cache[fwd_chunk_id] = ((zeros,), [])
        return zeros

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """One backward pass."""
        if self.trouble is None:
            try:
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            except RuntimeError as error:
                self._fail(error)
        if self.trouble is not None:
            self.fwd_cache.pop(bwd_chunk_id, None)
            self.bwd_cache[bwd_chunk_id] = (None if self.is_first else self._room(bwd_chunk_id).zero_(),)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None
        if loss is not None:
            loss.detach_()  # which the schedule holds to the end of the step, and with it what it was computed from

    def _fail(self, error: RuntimeError) -> None:
        """Keep what failed, which PyTorch tells in other words, and nothing that it holds on to."""
        cause = error.__cause__
        self.trouble = cause if isinstance(cause, Exception) else error
        self.trouble.__traceback__ = self.trouble.__context__ = None
        self.fwd_cache.clear()


class _Unheard(Stage):
    """A stage whose neighbours are taken to say what they would."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)


@dataclass(slots=True)
class Line:
    """The stages of one replica as this process sees them.

    Attributes:
        width, dtype, device: of what goes from one stage to the next: a vector for every token.
        schedule: PyTorch's, made at the first step for as many micro-batches as all have.
        unseen: messages held at the peak of a step that has more micro-batches than are traced of it.
    """

    ranks: Ranks
    share: Share
    width: int
    dtype: torch.dtype
    device: torch.device
    stage: Stage | None = None
    schedule: Any = None
    unseen: int = 0

    def buffer(self, batch: MicroBatch) -> torch.Tensor:
        """Memory for what goes between stages of a micro-batch."""
        return torch.empty((*batch.input_ids.shape, self.width), dtype=self.dtype, device=self.device)

    def passes(self, trainee: Trainee, micro_batches: Sequence[MicroBatch], num_targets: int) -> list[torch.Tensor]:
        """Forward and backward over every micro-batch; the losses on the last stage.

        Raises:
            Lost: a neighbour has ended.
            OutOfMemoryError, RuntimeError: what failed here, once all are through with the step's passes.
        """
        with contextlib.nullcontext() if self.ranks.talks else _unconnected():
            stage = self._prepared(trainee, len(micro_batches))
            stage.begin(micro_batches, num_targets)
            _held = [self.buffer(micro_batches[0]) for _ in range(self.unseen)]
            target = torch.arange(len(micro_batches))
            with noticing():
                self.schedule.step(target=target, return_outputs=False)
        losses, trouble = stage.losses, stage.trouble
        stage.clear_runtime_states()
        stage.begin((), 1)
        if trouble is not None:
            raise trouble
        return losses

    def _prepared(self, trainee: Trainee, num_micro_batches: int) -> Stage:
        """PyTorch's schedule for so many micro-batches, over the stage of this process."""
        if self.stage is not None and self.schedule._n_microbatches == num_micro_batches:
            return self.stage
        make = Stage if self.ranks.talks else _Unheard
        self.stage = make(self, trainee, self.share, self.ranks.line)

        def scaled(loss: torch.Tensor, _number: torch.Tensor) -> torch.Tensor:
            return loss * trainee.loss_scale.value

        most = num_micro_batches if self.ranks.talks else max(num_micro_batches, self.share.of)
        self.schedule = Schedule1F1B(self.stage, most, scaled, scale_grads=False)
        self.schedule._n_microbatches = num_micro_batches  # of fewer than stages, a part of a step is traced
        return self.stage

    def computed(self, trainee: Trainee, batch: MicroBatch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """What the stage makes of what the one before made: its summed loss on the last one."""
        if self.share.is_last:
            return trainee.after(batch, hidden)
        base: Any = trainee.model.get_base_model()  # type: ignore[operator]
        taken = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
        if batch.position_ids is not None:
            taken["position_ids"] = batch.position_ids
        made: torch.Tensor = base.get_decoder()(**taken, use_cache=False).last_hidden_state
        return made

    def forward(
        self, trainee: Trainee, batch: MicroBatch, last: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Forward over one micro-batch; on the last stage its summed loss, or what *last* makes; zero on others.

        Raises:
            Lost: a neighbour has ended.
        """
        hidden = None
        if not self.share.is_first:
            hidden = self.buffer(batch)
            if self.ranks.talks:
                with noticing():
                    dist.recv(hidden, group=self.ranks.line, group_src=self.share.number - 1)
        if last is not None and self.share.is_last and hidden is not None:
            return last(hidden)
        made = self.computed(trainee, batch, hidden)
        if self.share.is_last:
            return made
        if self.ranks.talks:
            with noticing():
                dist.send(made.contiguous(), group=self.ranks.line, group_dst=self.share.number + 1)
        return made.new_zeros((), dtype=torch.float32)


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
def _unconnected() -> Iterator[None]:
    """Let PyTorch's stages and schedules run where no other process is, and none is told anything."""
    theirs, levels = cast(Any, stage_module), cast(Any, dist).DebugLevel
    alone = SimpleNamespace(
        get_rank=lambda _group=None: 0,
        get_world_size=lambda _group=None: 1,
        get_debug_level=lambda: levels.OFF,
        DebugLevel=levels,
    )
    before = theirs.dist, schedules._batch_p2p
    theirs.dist, schedules._batch_p2p = alone, _unsent  # type: ignore[assignment]
    try:
        yield
    finally:
        theirs.dist, schedules._batch_p2p = before
