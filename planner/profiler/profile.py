"""Trace a three-layer cut of a model and turn it into polynomials of micro-batch and rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from shallowflow.planner.costs import OP_KINDS, SEGMENTS, Ints, StepProfile

from . import kernels
from .kernels import Target
from .operators import OpCost
from .recording import recording
from .trace import RECOMPUTED, Recorder, Trace

CORNERS = ((2, 8), (3, 8), (2, 16), (3, 16))
"""(micro-batch, rank) of the traces from which a profile's coefficients follow.

Not one sequence: where the batch is 1, an expanded mask needs no copy, and the step is another.
"""
SIZES = (2, 3)
"""Micro-batches of the traces where there is no rank."""


class ResidentTensor(Protocol):
    """A tensor held between steps."""

    @property
    def category(self) -> str:
        """What it is: base weights, adapter, quantization constants."""

    @property
    def path(self) -> str:
        """Its path in the model."""

    @property
    def layer(self) -> int | None:
        """The number of its decoder layer, if it is in one."""

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor itself."""


class TraceableStep(Protocol):
    """What the profiler needs of a training step; the runtime's trainee with its batches is one."""

    @property
    def model(self) -> torch.nn.Module:
        """The model that learns."""

    @property
    def layers(self) -> Sequence[torch.nn.Module]:
        """Its decoder layers."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of what learns."""

    @property
    def attention(self) -> str:
        """The attention that the model took."""

    def resident_tensors(self) -> Sequence[ResidentTensor]:
        """Everything held between steps, but the optimizer's state."""

    def prime(self) -> None:
        """Create the optimizer's state."""

    def run(self, num_micro_batches: int | None = None) -> object:
        """One optimizer update over the first *num_micro_batches*; None for all."""

    def evaluate(self) -> object:
        """The loss of one micro-batch, without gradients."""


class Misaligned(RuntimeError):
    """Two traces of the same step differ in more than sizes, so no polynomial describes them."""


@dataclass(slots=True)
class _Corner:
    trace: Trace
    residents: list[tuple[int, int | None]]
    state: list[tuple[int, int | None]]
    gradients: list[int]
    outside_gradients: list[int]
    workspaces: list[int]
    start: int
    segments: list[int]
    passes: list[int]

    def events(self) -> list[int]:
        """Those of the profiled step."""
        return self.trace.events[self.start : self.start + len(self.segments)]


def profile_step(make: Callable[[int, int], TraceableStep], target: Target) -> StepProfile:
    """Profile the step that ``make(micro_batch_size, rank)`` builds with three layers and two micro-batches.

    Raises:
        Misaligned: the step does other things at another micro-batch or rank.
    """
    target = replace(target, affine=True, any_rank=True)
    corners = [_trace_corner(make(micro_batch, rank), target) for micro_batch, rank in CORNERS]
    return _profile(_aligned(corners), _coefficients, target)


def profile_full_step(make: Callable[[int], TraceableStep], target: Target) -> StepProfile:
    """The same of a step that ``make(micro_batch_size)`` builds, in which every weight learns.

    Raises:
        Misaligned: the step does other things at another micro-batch.
    """
    target = replace(target, affine=True)
    return _profile(_aligned([_trace_corner(make(size), target) for size in SIZES]), _linear, target)


def _aligned(corners: Sequence[_Corner]) -> Sequence[_Corner]:
    first = corners[0]
    for other in corners[1:]:
        if other.events() != first.events() or other.segments != first.segments:
            raise Misaligned("the step allocates in another order at another micro-batch size or rank")
    return corners


def profile_update(step: TraceableStep, target: Target) -> StepProfile:
    """The profile of a *step* with three layers and two micro-batches, which holds for its micro-batch and rank alone.

    What an optimizer does need not be a polynomial of the rank: some keep the state of small tensors in another way.
    """
    return _profile([_trace_corner(step, target)], _constant, target)


def _profile(
    corners: Sequence[_Corner], rows: Callable[[Sequence[Sequence[int]]], Ints], target: Target
) -> StepProfile:
    """What *corners* have in common, and each size as *rows* of coefficients."""
    first = corners[0]
    sizes = rows([corner.trace.sizes for corner in corners])
    outside, shared = ([n for n, owner in held if owner is None] for held in (first.residents, first.state))
    layer, state = ([n for n, owner in held if owner == 1] for held in (first.residents, first.state))
    ops = [i for i, (position, _) in enumerate(first.trace.ops) if _pass_at(first, position) == 1]
    costs = [[corner.trace.ops[i][1] for i in ops] for corner in corners]
    return StepProfile(
        sizes=sizes,
        events=np.array(first.events(), dtype=np.int64),
        event_segment=np.array(first.segments, dtype=np.int64),
        event_pass=np.array(first.passes, dtype=np.int64),
        op_kind=np.array([OP_KINDS.index(op.kind) for op in costs[0]], dtype=np.int64),
        op_segment=np.array([_segment_of(first, *first.trace.ops[i]) for i in ops], dtype=np.int64),
        op_flops=rows([[op.flops for op in corner] for corner in costs]),
        op_bytes=rows([[op.num_bytes for op in corner] for corner in costs]),
        fixed=sizes[outside],
        workspaces=np.array(first.workspaces, dtype=np.int64),
        layer=sizes[layer],
        state=sizes[state],
        shared_state=sizes[shared],
        gradients=sizes[first.gradients],
        outside_gradients=sizes[first.outside_gradients],
        recomputed=np.array([stage == RECOMPUTED for stage in first.trace.stages], dtype=np.int64),
        alignment_bytes=target.alignment_bytes,
    )


def _coefficients(values: Sequence[Sequence[int]]) -> Ints:
    """Rows over (1, b, r, b*r) from values at the four corners; every size is affine in each of b and r."""
    low, more_batch, more_rank, high = (np.array(v, dtype=np.int64) for v in values)
    (batch, rank), (batch2, _), (_, rank2), _ = CORNERS
    wide, deep = batch2 - batch, rank2 - rank
    mixed, rest = np.divmod(high - more_batch - more_rank + low, wide * deep)
    per_batch, rest_batch = np.divmod(more_batch - low - mixed * wide * rank, wide)
    per_rank, rest_rank = np.divmod(more_rank - low - mixed * deep * batch, deep)
    if np.any(rest) or np.any(rest_batch) or np.any(rest_rank):
        raise Misaligned("a size is no polynomial of micro-batch and rank")
    constant = low - per_batch * batch - per_rank * rank - mixed * batch * rank
    rows: Ints = np.stack([constant, per_batch, per_rank, mixed], axis=1)
    return rows


def _linear(values: Sequence[Sequence[int]]) -> Ints:
    """Rows over (1, b, r, b*r) from values at the two SIZES; nothing depends on a rank."""
    low, high = (np.array(v, dtype=np.int64) for v in values)
    rows = np.zeros((len(low), 4), dtype=np.int64)
    rows[:, 1], rest = np.divmod(high - low, SIZES[1] - SIZES[0])
    if np.any(rest):
        raise Misaligned("a size is no polynomial of micro-batch")
    rows[:, 0] = low - SIZES[0] * rows[:, 1]
    return rows


def _constant(values: Sequence[Sequence[int]]) -> Ints:
    """Rows over (1, b, r, b*r) of what was traced once."""
    (found,) = values
    rows = np.zeros((len(found), 4), dtype=np.int64)
    rows[:, 0] = found
    return rows


def _trace_corner(step: TraceableStep, target: Target) -> _Corner:
    recorder = Recorder(target)
    residents: list[tuple[int, int | None]] = []
    for item in step.resident_tensors():
        number = recorder.follow(item.tensor, item.category)
        if number is not None:
            residents.append((number, item.layer))
    owner = {id(item.tensor): item.layer for item in step.resident_tensors()}
    for thread in ("main", "autograd"):
        recorder.reserve_workspaces(thread, kernels.all_workspaces(target))
    with recording(recorder):
        step.prime()
        state = _optimizer_state(step, recorder, owner)
        recorder.gradient_numbers.clear()  # of what was made up for the state, also where a step gives none
        recorder.phase = "forward"
        handles = mark_layers(step, recorder)
        start = len(recorder.trace.events)
        step.run()
        recorder.mark("end")
        for handle in handles:
            handle.remove()
    trace = recorder.trace
    workspaces = [
        trace.sizes[number] if name in recorder.needed_workspaces else 0
        for name, number in sorted(recorder.workspaces.items())
    ]
    held = {id(p): number for number, layer in enumerate(step.layers) for p in layer.parameters()}
    gradients, outside = (
        [number for parameter, number in recorder.gradient_numbers.items() if held.get(parameter) == layer]
        for layer in (1, None)
    )
    segments, passes = _label(trace, start, len(step.layers))
    own = list(dict(residents).items())
    return _Corner(trace, own, state, gradients, outside, workspaces, start, segments, passes)


def _optimizer_state(
    step: TraceableStep, recorder: Recorder, owner: dict[int, int | None]
) -> list[tuple[int, int | None]]:
    """Each tensor of the optimizer's with its layer; one that several layers share is outside of them."""
    layers: dict[int, set[int | None]] = {}
    for parameter, state in step.optimizer.state.items():
        for value in state.values():
            number = recorder.follow(value, "optimizer") if isinstance(value, torch.Tensor) else None
            if number is not None:
                layers.setdefault(number, set()).add(owner.get(id(parameter)))
    return [(number, held.pop() if len(held) == 1 else None) for number, held in layers.items()]


def mark_layers(step: TraceableStep, recorder: Recorder) -> list[Any]:
    """Hooks that mark where each layer's forward and backward passes begin."""

    def entering(index: int) -> Callable[..., None]:
        return lambda *_: recorder.mark(f"forward {index}")

    def left(index: int) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _args: object, output: Any) -> None:
            if index == len(step.layers) - 1:
                recorder.mark("head")
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _gradient: recorder.mark(f"backward {index}"))

        return hook

    find_decoder = getattr(step.model, "get_decoder", None)  # a loss in chunks calls it, and not the whole model
    entry = find_decoder() if find_decoder else step.model
    handles: list[Any] = [entry.register_forward_pre_hook(lambda *_: recorder.mark("embed"))]
    for index, layer in enumerate(step.layers):
        handles += [layer.register_forward_pre_hook(entering(index)), layer.register_forward_hook(left(index))]
    return handles


def _label(trace: Trace, start: int, num_layers: int) -> tuple[list[int], list[int]]:
    """For each event from *start*: its segment, and whether it belongs to the first micro-batch."""
    names = {"embed": "embed", "head": "head", "end backward": "update"}
    places = ("first", *["inner"] * (num_layers - 2), "last")
    for index, place in enumerate(places):
        names[f"forward {index}"] = place
        names[f"backward {index}"] = f"{place}_back"
    bounds = [
        (_past_frees(trace, position) if label.startswith(("backward", "head")) else position, names[label])
        for position, label in trace.marks
        if position >= start and label in names
    ]
    segments = [SEGMENTS.index("embed")] * (len(trace.events) - start)
    passes = [0] * len(segments)
    micro_batch = -1
    for (position, name), end in zip(bounds, [p for p, _ in bounds[1:]] + [len(trace.events)], strict=True):
        micro_batch += name == "embed"
        for i in range(position - start, end - start):
            segments[i] = SEGMENTS.index(name)
            passes[i] = min(1, max(0, micro_batch))
    _release(trace.events[start:], segments)
    return segments, passes


def _release(events: Sequence[int], segments: list[int]) -> None:
    """Put frees in the head of what the embeddings made into a segment of their own."""
    embed, release, head = (SEGMENTS.index(name) for name in ("embed", "release", "head"))
    births = {event: segments[i] for i, event in enumerate(events) if event > 0}
    for i, event in enumerate(events):
        if event < 0 and segments[i] == head and births.get(-event) == embed:
            segments[i] = release


def _past_frees(trace: Trace, position: int) -> int:
    """Where the frees from *position* on end: a layer's gradient is out before its last node lets go of its tensors."""
    while position < len(trace.events) and trace.events[position] < 0:
        position += 1
    return position


def _event_at(corner: _Corner, position: int) -> int:
    return min(max(0, position - corner.start - 1), len(corner.segments) - 1)


def _segment_of(corner: _Corner, position: int, op: OpCost) -> int:
    """That of the event before *op*, or, if it is a copy to the host, which may be a layer's first act, of the next."""
    return corner.segments[_event_at(corner, position + (op.kind == "host"))]


def _pass_at(corner: _Corner, position: int) -> int:
    return -1 if position <= corner.start else corner.passes[_event_at(corner, position)]
