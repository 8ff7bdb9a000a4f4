"""In which order micro-batches go through the stages of a model, what that holds at once, and how long it takes.

Plain 1F1B has one part of the model on each GPU. Interleaved 1F1B (Narayanan et al., 2021) has several, each of as many
layers: the first part of every stage in order, then the second of every stage, and so on. A micro-batch goes round as
many times, and the GPUs wait that many times less for the first to arrive and the last to leave.

A place is where a layer stands when stages come one after the other, each with all of its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

MOST_PARTS = 16
"""Of a stage. More would shorten by little what is then short, and each needs messages."""


def parts_per_stage(num_layers: int, num_stages: int, num_micro_batches: int) -> tuple[int, ...]:
    """Into how many parts each stage may be divided: all have as many layers, and micro-batches come in full rounds."""
    each, rest = divmod(num_layers, num_stages)
    if rest or num_stages == 1 or not num_micro_batches or num_micro_batches % num_stages:
        return (1,)
    return tuple(parts for parts in range(1, min(each, MOST_PARTS) + 1) if each % parts == 0)


def order(num_layers: int, num_stages: int, num_parts: int) -> list[int]:
    """The layer at each place."""
    if num_parts == 1:
        return list(range(num_layers))
    each = num_layers // (num_stages * num_parts)
    return [
        (part * num_stages + stage) * each + number
        for stage in range(num_stages)
        for part in range(num_parts)
        for number in range(each)
    ]


def parts(num_layers: int, num_stages: int, num_parts: int) -> list[int]:
    """The part of its stage that the layer at each place is in."""
    each = num_layers // (num_stages * num_parts)
    return [place // each % num_parts if num_parts > 1 else 0 for place in range(num_layers)]


def in_flight(num_stages: int, num_parts: int, num_micro_batches: int, stage: int) -> tuple[int, ...]:
    """Of each part of a *stage*, the micro-batches whose activations it holds when the first backward pass begins.

    In the order of PyTorch's Schedule1F1B and ScheduleInterleaved1F1B. A *stage* never holds more of them together, and
    never fewer of a part and of those before it when the first backward pass of that part begins.
    """
    if num_parts == 1:
        return (min(num_stages - stage, num_micro_batches),)
    return _held(num_stages, num_parts, num_micro_batches, stage)[0]


def most_in_flight(num_stages: int, num_parts: int, num_micro_batches: int, stage: int) -> tuple[int, ...]:
    """The most of each part at any time; see ``in_flight``."""
    if num_parts == 1:
        return in_flight(num_stages, num_parts, num_micro_batches, stage)
    return _held(num_stages, num_parts, num_micro_batches, stage)[1]


@functools.cache
def _held(
    num_stages: int, num_parts: int, num_micro_batches: int, stage: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is in flight of each part when the first backward pass begins, and the most of each."""
    every = num_parts * num_micro_batches
    ahead = min((num_parts - 1) * num_stages + 2 * (num_stages - 1 - stage) + 1, every)
    held, most, first = [0] * num_parts, [0] * num_parts, tuple[int, ...]()
    for number in range(every):
        held[number // num_stages % num_parts] += 1
        most = [max(pair) for pair in zip(most, held, strict=True)]
        if number + 1 >= ahead:
            first = first or tuple(held)
            held[num_parts - 1 - (number + 1 - ahead) // num_stages % num_parts] -= 1
    return first, tuple(most)


def messages(num_stages: int, num_parts: int, num_micro_batches: int, stage: int) -> int:
    """That a *stage* holds at once: what each forward pass in flight received, and those on their way.

    Those are the next that is received and the gradient that was sent last; and where stages come after, the gradient
    that was received last, and what was sent last before the first backward pass. Of interleaved stages those that are
    held for certain when the first backward pass begins: what was sent last, and the gradient that it begins with.
    """
    held = in_flight(num_stages, num_parts, num_micro_batches, stage)
    received = sum(held) - (held[0] if stage == 0 else 0)
    is_first, is_last = stage == 0, stage == num_stages - 1
    if num_parts > 1:
        return received + (1 if is_last else 2)
    return received + (0 if is_first else 1) + (0 if is_last else 2)


def step_picoseconds(busy: Sequence[int], num_micro_batches: int, num_parts: int) -> int:
    """Of a step whose stages are *busy* so long with a micro-batch: the slowest with all, the others with a part."""
    slowest = max(busy)
    return sum(one // num_parts for one in busy) + num_micro_batches * slowest - slowest // num_parts
