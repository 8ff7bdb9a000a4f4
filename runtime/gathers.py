"""The bytes that processes have parts of, gathered beside the computing: by NCCL on GPUs, by gloo on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks, noticing

Work = Any
"""What torch.distributed gives to wait for."""

_library = torch.library.Library("shallowflow", "FRAGMENT")  # operators of their own, so that a trace sees the gathers
_library.define("gather(Tensor part, Tensor(a!) whole) -> ()")
_library.define("spread(Tensor(a!) part, int num_processes) -> ()")
_library.define("gathered(Tensor whole) -> ()")
_library.impl("gather", lambda _part, _whole: None, "Meta")
_library.impl("spread", lambda _part, _num_processes: None, "Meta")
_library.impl("gathered", lambda _whole: None, "Meta")


def begin(part: torch.Tensor, whole: torch.Tensor, ranks: Ranks) -> Sequence[Work]:
    """Begin to fill *whole* with the parts of all processes, in their order; *part* is this one's.

    On a GPU the computing goes on meanwhile; NCCL starts once all that was issued before is done, so *whole* may be
    memory that was in use until then. Processes that do not talk are taken to have the same part.

    Raises:
        Lost: a process has ended.
    """
    if whole.is_meta:
        torch.ops.shallowflow.gather(part, whole)
        return ()
    if not ranks.talks:
        whole.view(ranks.size, -1).copy_(part.expand(ranks.size, -1))
        return ()
    with noticing():
        if whole.is_cuda:
            return (_all_gather(whole, part, async_op=True),)
        return _exchanged(part, whole.split(part.numel()), ranks)


def begin_one(part: torch.Tensor, received: torch.Tensor, source: int, ranks: Ranks) -> Sequence[Work]:
    """Begin to fill *received* with the part of the process *source* alone; else as ``begin``."""
    if received.is_meta:
        torch.ops.shallowflow.spread(received, ranks.size)
        return ()
    if source == ranks.rank or not ranks.talks:
        received.copy_(part)
    if not ranks.talks:
        return ()
    with noticing():
        if received.is_cuda:
            return (dist.broadcast(received, src=source, async_op=True),)
        if source != ranks.rank:
            return (dist.irecv(received, source),)
        return [dist.isend(part, rank) for rank in range(ranks.size) if rank != source]


def _exchanged(part: torch.Tensor, parts: Sequence[torch.Tensor], ranks: Ranks) -> list[Work]:
    """Send *part* to every other process and receive theirs.

    gloo's own all-gather makes a second whole, and its threads hold on to tensors for a while after they are done.
    """
    parts[ranks.rank].copy_(part)
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    return [dist.isend(part, rank) for rank in others] + [dist.irecv(parts[rank], rank) for rank in others]


_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def end(whole: torch.Tensor, works: Sequence[Work]) -> None:
    """Let the computing wait until *whole* is filled.

    Raises:
        Lost: a process has ended.
    """
    if whole.is_meta:
        torch.ops.shallowflow.gathered(whole)
    with noticing():
        for work in works:
            work.wait()
