"""What one process computes of each micro-batch, and which messages it exchanges with its neighbours for that.

PyTorch's own stage has a buffer for every micro-batch of a step, all of one shape, for as long as it lives. Here each
is made for its micro-batch, which may be shorter than others, and goes once the backward pass is through with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from .step import MicroBatch, Trainee, not_asking_for_documents

if TYPE_CHECKING:
    from .pipeline import Line


class Stage(PipelineStage):
    """What one process computes of each micro-batch in one of its parts, and what it tells its neighbours.

    Where something fails here, zeros go on in its place, so that no neighbour waits for ever: all hear of it at the
    next vote.
    """

    def __init__(self, pipe: Line, trainee: Trainee, part: int) -> None:
        like = torch.empty(0, dtype=pipe.dtype, device=pipe.device)
        share = pipe.share
        number, of = share.number + part * share.of, share.of * len(share.parts)
        super().__init__(
            trainee.model,
            number,
            of,
            pipe.device,
            input_args=() if number == 0 else like.requires_grad_(),
            output_args=like if number == of - 1 else like.detach().requires_grad_(),
            group=pipe.ranks.line,
        )
        self.pipe, self.trainee, self.part = pipe, trainee, part
        self.batches: Sequence[MicroBatch] = ()
        self.num_targets = 1
        self.losses: list[torch.Tensor] = []

    def begin(self, batches: Sequence[MicroBatch], num_targets: int) -> None:
        """Be given the micro-batches of a step."""
        self.batches, self.num_targets = batches, num_targets
        self.losses = []

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
        return [dist.P2POp(way, tensor, group=self.group, group_peer=(self.stage_index + to) % self.pipe.share.of)]

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
            made = self.pipe.computed(self.trainee, batch, self.part, *args)
        return made / self.num_targets if self.is_last else made

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """One forward pass."""
        self._present = fwd_chunk_id
        if self.pipe.trouble is None:
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
        if self.pipe.trouble is None:
            try:
                super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            except RuntimeError as error:
                self._fail(error)
        if self.pipe.trouble is not None:
            self.fwd_cache.pop(bwd_chunk_id, None)
            self.bwd_cache[bwd_chunk_id] = (None if self.is_first else self._room(bwd_chunk_id).zero_(),)
        for info in (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]):
            info.buffer = None
        if loss is not None:
            loss.detach_()  # which the schedule holds to the end of the step, and with it what it was computed from

    def _fail(self, error: RuntimeError) -> None:
        """Keep what failed, which PyTorch tells in other words, and nothing that it holds on to."""
        cause = error.__cause__
        trouble = cause if isinstance(cause, Exception) else error
        trouble.__traceback__ = trouble.__context__ = None
        self.pipe.fail(trouble)


class Unheard(Stage):
    """A stage whose neighbours are taken to say what they would."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Any = None) -> torch.Tensor:
        return torch.ones(1, dtype=torch.int32)
