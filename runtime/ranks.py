"""The processes that train together, and what they say to each other: gradients by NCCL on GPUs, all else by gloo."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

BUCKET_BYTES = 25 * 2**20
"""Of gradients that are sent at once, as DistributedDataParallel's: enough that a link's latency does not count."""

WELL, STOP, SHORT = range(3)
"""Votes: go on, end and save as for Ctrl-C, or give up for lack of memory."""


class Lost(RuntimeError):
    """Another of the processes has ended, or does not answer."""


class GivenUp(Exception):
    """Another of the processes has no memory left for this configuration."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of *size* processes that train together.

    Those that talk are joined by torch.distributed. Others are taken to be like this one in all they would say: a run
    alone, and a step of several that is traced.

    Those that hold the stages of one model have numbers next to each other, so that they are on one machine as far as
    may be: the first replica's stages come first.

    Attributes:
        local_rank: its number among those on its machine, and so that of its GPU.
        num_stages: into which the model is cut.
        line: those that hold the stages of this process's replica, and talk of activations.
        alike: those that hold the same stage, and talk of gradients; None for all.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    talks: bool = False
    num_stages: int = 1
    line: Any = None
    alike: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        """The number of its stage."""
        return self.rank % self.num_stages

    @property
    def num_replicas(self) -> int:
        """Of the model."""
        return self.size // self.num_stages

    def staged(self, num_stages: int) -> Ranks:
        """The same process where the model is cut into *num_stages*; all processes ask for this alike.

        Raises:
            Lost: a process has ended.
        """
        if num_stages == self.num_stages:
            return self
        if not self.talks:
            return replace(self, num_stages=num_stages)
        if num_stages == 1:
            return replace(self, num_stages=1, line=None, alike=None)
        with noticing():
            line, alike = _groups(self.size, num_stages)
        return replace(
            self, num_stages=num_stages, line=line[self.rank // num_stages], alike=alike[self.rank % num_stages]
        )

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Those of *parts* that are this replica's: of parts in order of size, as much as any other's."""
        return parts[self.rank // self.num_stages :: self.num_replicas]

    def gathered(self, value: T) -> list[T]:
        """What each process gives, in the order of ranks; the same for all of them.

        Raises:
            Lost: a process has ended.
        """
        found: list[Any] = [value] * self.size
        if self.talks:
            with noticing():
                dist.all_gather_object(found, value)
        return found

    def interleaved(self, values: Sequence[T]) -> list[T]:
        """What all have made of their shares of some parts, in the order of those parts; the last stages make it."""
        return self.merged(self.gathered(list(values)))

    def merged(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """What is gathered of each process's share of some parts, in the order of those parts."""
        made = shares[self.num_stages - 1 :: self.num_stages]
        return [share[i] for i in range(len(made[0])) for share in made if i < len(share)]

    def of_stages(self, value: T) -> list[T]:
        """What the processes of each stage of the first replica give, for the first process; empty for others.

        Raises:
            Lost: a process has ended.
        """
        if not self.talks:
            return [value] * self.num_stages
        found: list[Any] | None = [None] * self.size if self.leads else None
        with noticing():
            dist.gather_object(value if self.rank < self.num_stages else None, found)
        return (found or [])[: self.num_stages]

    def led(self, value: T) -> T:
        """The *value* of the first process."""
        found: list[Any] = [value if self.leads else None]
        if self.talks:
            with noticing():
                dist.broadcast_object_list(found, src=0)
        result: T = found[0] if self.talks else value
        return result

    def vote(self, wish: int, patience: datetime.timedelta | None = None) -> int:
        """The gravest wish of all; every process votes before each micro-batch, and before each update.

        Raises:
            GivenUp: another is short of memory.
            Lost: a process has ended, or has not voted within *patience*.
        """
        if not self.talks:
            return wish
        found = torch.tensor(wish)
        with noticing():
            vote = dist.all_reduce(found, op=dist.ReduceOp.MAX, async_op=True)
            vote.wait() if patience is None else vote.wait(patience)
        gravest = int(found)
        if gravest == SHORT != wish:
            raise GivenUp
        return gravest

    # Gradients

    def connect(self, device: torch.device) -> None:
        """Open the way that gradients take from *device*, which costs time and memory that no step is to pay.

        Raises:
            Lost: a process has ended.
        """
        if self.talks:
            with noticing():
                dist.all_reduce(torch.zeros(1, device=device), group=self.alike)

    def bucket(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What ``add_up`` needs besides *gradients*; None where there is one replica."""
        if self.num_replicas == 1:
            return None
        most = max(BUCKET_BYTES // gradients[0].itemsize, *(gradient.numel() for gradient in gradients))
        return gradients[0].new_empty(min(most, sum(gradient.numel() for gradient in gradients)))

    def add_up(self, gradients: Sequence[torch.Tensor], bucket: torch.Tensor | None) -> None:
        """Put the sum over all replicas in the place of each of the *gradients*, one full *bucket* after the other.

        Raises:
            Lost: a process has ended.
        """
        if bucket is None:
            return
        for chosen in _filling(gradients, bucket.numel()):
            counts = [gradient.numel() for gradient in chosen]
            flat = bucket[: sum(counts)]
            torch.cat([gradient.flatten() for gradient in chosen], out=flat)
            if self.talks:
                with noticing():
                    dist.all_reduce(flat, group=self.alike)
            torch._foreach_copy_([gradient.view(-1) for gradient in chosen], list(flat.split(counts)))


ALONE = Ranks()


@cache
def _groups(size: int, num_stages: int) -> tuple[list[Any], list[Any]]:
    """The groups of processes that are the stages of one replica, and of those that are one stage of every replica."""
    lines = [dist.new_group(list(range(first, first + num_stages))) for first in range(0, size, num_stages)]
    alike = [dist.new_group(list(range(stage, size, num_stages))) for stage in range(num_stages)]
    return lines, alike


def _filling(gradients: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """*gradients* in order, as many at once as have up to *most* elements."""
    chosen: list[torch.Tensor] = []
    for gradient in gradients:
        if sum(one.numel() for one in chosen) + gradient.numel() > most:
            yield chosen
            chosen = []
        chosen.append(gradient)
    yield chosen


@contextlib.contextmanager
def noticing() -> Iterator[None]:
    """Tell a lost process from this one's own errors: gloo and NCCL raise a RuntimeError of many words."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):  # as NCCL says it
            raise torch.OutOfMemoryError(str(error).strip().split("\n")[-1]) from error
        raise Lost("another process of the run was lost") from error
