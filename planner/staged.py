"""A model cut into pipeline stages as a search problem: what each layer takes, and each stage beside its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from . import communication, costs, latency, schedule
from . import problem as posing
from .chain import Chain, Choice, Group
from .communication import Link
from .problem import Problem
from .staged_cell import EXCHANGES, StagedCell
from .staged_price import usual_price
from .strategies import Cell, Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """One cell, with the model cut into so many stages.

    Attributes:
        num_parts: of each stage; see ``schedule``.
        groups: layers that are alike, as a Chain has them, the optimizer's state among what is resident.
        fixed_bytes: of each stage, outside its layers and messages.
        head_high_bytes, head_change_bytes, device_picoseconds, host_picoseconds: of the loss, on the last stage.
        update_high_bytes, update_picoseconds: of the update for each layer, with waiting for other replicas.
        message_bytes, message_picoseconds: of what goes from one stage to the next in a micro-batch.
    """

    cell: Cell
    num_stages: Positive
    num_parts: Positive = 1
    groups: tuple[Group, ...]
    fixed_bytes: tuple[int, ...]
    head_high_bytes: int
    head_change_bytes: int
    device_picoseconds: int
    host_picoseconds: int
    update_high_bytes: int
    update_picoseconds: int
    message_bytes: int
    message_picoseconds: int

    def told(self, table: int) -> StagedCell:
        """What a plan carries of it, beside its groups, which are its *table*."""
        names = (name for name in StagedCell.__dataclass_fields__ if name != "table")
        return StagedCell(table=table, **{name: getattr(self, name) for name in names})

    def layers(self) -> list[tuple[Choice, ...]]:
        """For each layer what it may be given."""
        return [group.choices for group in self.groups for _ in range(group.num_layers)]

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return sum(group.num_layers for group in self.groups)

    @property
    def num_micro_batches(self) -> int:
        """Of a step of one replica."""
        return self.cell.gradient_accumulation_steps

    def order(self) -> list[int]:
        """The layer at each place."""
        return schedule.order(self.num_layers, self.num_stages, self.num_parts)

    def kinds(self) -> list[int]:
        """For each layer the number of its group."""
        return [number for number, group in enumerate(self.groups) for _ in range(group.num_layers)]

    def outside_bytes(self, stage: int) -> int:
        """What a *stage* holds beside its layers: what stays, and messages."""
        return self.told(0).outside_bytes(stage)

    def at_once(self, choices: Sequence[Choice], stage: int, part: int) -> tuple[Choice, ...]:
        """*choices* where activations of as many micro-batches are held at once as a *part* of a *stage* has in flight.

        Those of the others stay all along, or, of interleaved stages, go with one's own: when an earlier part begins
        its backward passes, all of a later one may be through.
        """
        told = self.told(0)
        others, most = told.in_flight(stage)[part] - 1, told.most_in_flight(stage)[part]
        found: list[Choice] = []
        for choice in choices:
            held: dict[str, Any] = {"host_bytes": choice.host_bytes * most}
            saved = others * (choice.forward_change_bytes + choice.release_bytes)
            if self.num_parts == 1:
                held["resident_bytes"] = choice.resident_bytes + saved
            else:
                held["forward_change_bytes"] = choice.forward_change_bytes + saved
                held["backward_change_bytes"] = choice.backward_change_bytes - saved
            found.append(replace(choice, **held))
        return tuple(found)

    def chain(self, stage: int, places: range, weight: int) -> Chain:
        """A *stage* of the layers at these *places* as a chain whose micro-batch counts *weight* times."""
        is_last = stage == self.num_stages - 1
        kinds, order = self.kinds(), self.order()
        part_of = schedule.parts(self.num_layers, self.num_stages, self.num_parts)
        groups = tuple(
            Group(num_layers=len(list(alike)), choices=self.at_once(self.groups[kind].choices, stage, part))
            for (kind, part), alike in groupby((kinds[order[place]], part_of[place]) for place in places)
        )
        waiting = EXCHANGES * self.num_parts * self.message_picoseconds
        return Chain(
            groups=groups,
            gradient_accumulation_steps=weight,
            fixed_bytes=self.outside_bytes(stage),
            head_high_bytes=self.head_high_bytes if is_last else 0,
            head_change_bytes=self.head_change_bytes if is_last else 0,
            update_high_bytes=self.update_high_bytes * len(places),
            device_picoseconds=waiting + (self.device_picoseconds if is_last else 0),
            host_picoseconds=waiting + (self.host_picoseconds if is_last else 0),
            update_picoseconds=0,
        )


def stagings(problem: Problem, cells: Sequence[Cell], num_stages: int, width: int, link: Link) -> list[Staging]:
    """*cells* with the model cut into *num_stages*, between which vectors of *width* go over *link*; see ``priced``."""
    alike = replace(problem, weighed=())
    groups: dict[int, tuple[Group, ...]] = {}
    for cell in cells:
        if cell.micro_batch_size not in groups:
            groups[cell.micro_batch_size] = posing.groups_of(alike, cell)
    return [_staging(alike, cell, num_stages, width, link, groups[cell.micro_batch_size]) for cell in cells]


def priced(problem: Problem, stagings: Sequence[Staging], num_parts: int) -> list[Staging]:
    """*stagings* of a *problem* with stages of so many parts, and what coarser weights are held to be worth."""
    made = [replace(one, num_parts=num_parts) for one in stagings]
    if not made:
        return made
    return repriced(made, usual_price(problem.workload.objective, [(one.told(0), one.layers()) for one in made]))


def repriced(stagings: Sequence[Staging], price: int) -> list[Staging]:
    """*stagings* with *price* for a unit of harm."""
    known: dict[int, tuple[Group, ...]] = {}  # many have the same groups
    for one in stagings:
        if id(one.groups) not in known:
            known[id(one.groups)] = posing.priced(one.groups, price)
    return [replace(one, groups=known[id(one.groups)]) for one in stagings]


def harm_price(stagings: Sequence[Staging]) -> int:
    """What a unit of harm costs in *stagings*; 0 where nothing harms."""
    return posing.harm_price(group for one in stagings for group in one.groups)


def _staging(
    problem: Problem, cell: Cell, num_stages: int, width: int, link: Link, groups: tuple[Group, ...]
) -> Staging:
    size, rank, gpu = cell.micro_batch_size, cell.rank or 0, problem.gpu
    accumulates = cell.gradient_accumulation_steps > 1
    layers = posing.each_layer(problem, cell.optimizer)
    head = costs.with_update(problem.heads[cell.loss_chunks], layers[0])
    curve = costs.curves(head, size, rank, accumulates=accumulates)
    device, host = latency.profile_seconds(head, size, rank, gpu)
    state = max(costs.state_bytes(profile, rank) for profile in layers)
    gradients = max(costs.gradient_bytes(profile, 1, rank) for profile in layers)
    waiting = communication.all_reduce_seconds(gradients, problem.workload.num_gpus // num_stages, link)
    message = size * problem.workload.sequence_length * width * DTYPE_BYTES[gpu.compute_dtype]
    return Staging(
        cell=cell,
        num_stages=num_stages,
        groups=tuple(_with_state(groups, state)),
        fixed_bytes=tuple(_fixed(problem, layers[0], cell, num_stages)),
        head_high_bytes=curve["head"].high,
        head_change_bytes=curve["head"].change,
        device_picoseconds=posing.picoseconds(device["head"]),
        host_picoseconds=posing.picoseconds(host["head"]),
        update_high_bytes=curve["update"].high // costs.PROFILED_LAYERS,
        update_picoseconds=posing.picoseconds(max(device["update"], host["update"]) / costs.PROFILED_LAYERS + waiting),
        message_bytes=message,
        message_picoseconds=posing.picoseconds(communication.send_seconds(message, link)),
    )


DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _with_state(groups: Sequence[Group], state: int) -> Iterator[Group]:
    for group in groups:
        choices = tuple(replace(choice, resident_bytes=choice.resident_bytes + state) for choice in group.choices)
        yield replace(group, choices=choices)


def _fixed(problem: Problem, profile: costs.StepProfile, cell: Cell, num_stages: int) -> Iterator[int]:
    """What each stage holds outside its layers: the table of embeddings on the first, the head's on the last.

    They are the largest things there; where they are one, each of the two stages has a copy.
    """
    size, rank = cell.micro_batch_size, cell.rank or 0
    outside = costs.outside_bytes(profile, size, rank)
    workspaces = int(min(profile.workspaces.sum() for profile in problem.profiles.values()))
    table = int(profile.fixed[:, 0].max())
    copies = int((profile.fixed[:, 0] == table).sum())
    for stage in range(num_stages):
        ends = (stage == 0) + (stage == num_stages - 1)
        yield outside + workspaces + (min(ends, 2) - copies) * table
