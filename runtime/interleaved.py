"""PyTorch's interleaved 1F1B, whose messages go once they have arrived.

Which pass comes when, and which message, is ``ScheduleInterleaved1F1B``'s. PyTorch's own loop over that order waits for
what it sent at the end of a step, and holds until then every activation and every gradient that it sent.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.distributed.pipelining import ScheduleInterleaved1F1B, schedules

Kind = schedules._ComputationType


class Interleaved(ScheduleInterleaved1F1B):
    """The order of passes over this process' parts of the model, and the messages between."""

    def _step_microbatches(self, *inputs: Any, **named: Any) -> None:
        """Go through the order of this process.

        A message is waited for before the next of its kind is sent: the one that receives it has been told to by then,
        as the order has it, whatever comes later.
        """
        targets = inputs[2] if len(inputs) > 2 else named["target_mbs"]
        self._initialize_stages((), {}, targets[0])
        stages: dict[int, Any] = {stage.stage_index: stage for stage in self._stages}
        theirs: Any = self
        sent: dict[Any, list[Any]] = defaultdict(list)
        received: dict[tuple[Any, int, int], list[Any]] = {}
        for action in self.pipeline_order_with_comms[self.rank]:
            kind, index, number = action.computation_type, action.stage_index, action.microbatch_index
            if number is None:
                continue  # what stages whose weights are shared do before and after their passes
            stage = stages[index]
            if kind in (Kind.SEND_F, Kind.SEND_B):
                self._wait(sent.pop(kind, []))
                made = stage.get_fwd_send_ops(number) if kind == Kind.SEND_F else stage.get_bwd_send_ops(number)
                sent[kind] = schedules._batch_p2p(made)
            elif kind == Kind.RECV_F:
                received[Kind.FORWARD, index, number] = schedules._batch_p2p(stage.get_fwd_recv_ops(number))
            elif kind == Kind.RECV_B:
                received[Kind.FULL_BACKWARD, index, number] = schedules._batch_p2p(stage.get_bwd_recv_ops(number))
            elif kind == Kind.FORWARD:
                self._wait(received.pop((kind, index, number), []))
                output = stage.forward_one_chunk(number, (), {}, save_forward_output=False)
                theirs._maybe_compute_loss(stage, output, targets, number)
                del output
            elif kind == Kind.FULL_BACKWARD:
                self._wait(received.pop((kind, index, number), []))
                stage.backward_one_chunk(number, loss=theirs._maybe_get_loss(stage, number))
                if stage.is_first:
                    stage.get_bwd_send_ops(number)  # which forgets what was computed for nobody
        for works in sent.values():
            self._wait(works)
        theirs._update_losses(self._stages, None)

    def _wait(self, works: list[Any]) -> None:
        """Until these messages are through."""
        schedules._wait_batch_p2p(works)
