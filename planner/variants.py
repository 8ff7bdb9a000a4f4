"""A plan's own strategies at other sequence lengths, micro-batches and ranks: what each would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from . import problem
from .plan import Bytes, Seconds
from .problem import Problem
from .strategies import Configuration, Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run a plan's strategies, its prediction composed from the layers' profiles.

    Attributes:
        rank: None where every weight learns.
        peak_process_bytes: without what the caching allocator holds beyond live tensors, which a whole trace tells.
    """

    sequence_length: Positive
    micro_batch_size: Positive
    rank: Positive | None
    peak_process_bytes: Bytes
    step_seconds: Seconds
    tokens_per_second: Seconds


def variants(
    posed: Mapping[int, Problem], chosen: Configuration, micro_batch_sizes: Sequence[int], ranks: Sequence[int | None]
) -> tuple[Variant, ...]:
    """Every combination of the lengths of *posed*, the *micro_batch_sizes* and the *ranks*, all else as *chosen*.

    Args:
        posed: by sequence length, the problem with profiles of all strategies that *chosen* has.
        micro_batch_sizes: that divide the sequences of one GPU's step.
    """
    return tuple(_variants(posed, chosen, micro_batch_sizes, ranks))


def _variants(
    posed: Mapping[int, Problem], chosen: Configuration, micro_batch_sizes: Sequence[int], ranks: Sequence[int | None]
) -> Iterator[Variant]:
    share = chosen.micro_batch_size * chosen.gradient_accumulation_steps
    for length, own in sorted(posed.items()):
        for size in micro_batch_sizes:
            for rank in ranks:
                changed = replace(
                    chosen,
                    sequence_length=length,
                    micro_batch_size=size,
                    gradient_accumulation_steps=share // size,
                    rank=rank,
                )
                found = problem.predict(replace(own, rank=rank), changed)
                yield Variant(
                    sequence_length=length,
                    micro_batch_size=size,
                    rank=rank,
                    peak_process_bytes=found.peak_process_bytes,
                    step_seconds=found.step_seconds,
                    tokens_per_second=found.tokens_per_second,
                )
