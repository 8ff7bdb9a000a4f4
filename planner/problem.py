"""The search problem: what each way to train that may be chosen is predicted to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from shallowflow.profiles.specs import GpuSpec

from . import allowed, communication, costs, latency, quality
from .arrangement import own_groups
from .chain import Chain, Choice, Group, Limits
from .costs import LayerRuns, StepProfile
from .layer_cost import sent_to_host
from .plan import Prediction, Workload
from .strategies import Cell, Configuration, Optimizer, Sharding, Strategy
from .weighed import LayerErrors

SECOND = 10**12
"""Picoseconds in one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, a device and a workload, with profiles of every strategy that is allowed.

    Attributes:
        kinds: for each layer, the first one that is like it.
        profiles: of layers of each kind under each strategy that their code allows.
        heads: by the parts that the loss is computed in, a profile of which only the loss is looked at.
        updates: of optimizers other than AdamW, and of that, too, where every weight learns, at one rank and for each
            kind of layer, a profile of which only the update and the optimizer's state are looked at.
        rank: the adapter's; None without one.
        host_bytes: of host memory that activations may be sent to.
        beside_seconds: what a run takes on the wall beside its steps, where a deadline is set.
        weighed: for each layer the errors of its own weights, where they were measured.
        link: between neighbouring GPUs; None for PCIe.
        sharded, sharded_heads: as *profiles* and *heads*, where the GPUs share the weights.
    """

    workload: Workload
    gpu: GpuSpec
    kinds: tuple[int, ...]
    profiles: Mapping[tuple[Strategy, int], StepProfile]
    heads: Mapping[int, StepProfile]
    rank: int | None
    host_bytes: int | None = None
    link: communication.Link | None = None
    beside_seconds: float = 0.0
    updates: Mapping[tuple[Optimizer, int | None, int], StepProfile] = field(default_factory=dict)
    weighed: tuple[LayerErrors, ...] = ()
    sharded: Mapping[tuple[Strategy, int], StepProfile] = field(default_factory=dict)
    sharded_heads: Mapping[int, StepProfile] = field(default_factory=dict)

    @property
    def strategies(self) -> set[Strategy]:
        """Those that a layer may be given."""
        return {strategy for strategy, _ in (*self.profiles, *self.sharded)}

    def under(self, sharding: Sharding) -> Problem:
        """The same with the profiles of *sharding*."""
        return self if sharding == "none" else replace(self, profiles=self.sharded, heads=self.sharded_heads)

    @property
    def between(self) -> communication.Link:
        """What joins neighbouring GPUs."""
        return self.link or communication.pcie(self.gpu.pcie_bytes_per_second)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.kinds)

    @property
    def budget_bytes(self) -> int:
        """What the allocator may reserve."""
        return allowed.budget_bytes(self.gpu, self.workload)

    @property
    def limits(self) -> Limits:
        """What a choice of strategies may take, before anything is known of fragmentation."""
        workload = self.workload
        harm, step = quality.most_harm(workload.max_weight_error, self.num_layers), None
        if workload.deadline_hours is not None:
            sequences = workload.sequences(packing=workload.packing is True)
            steps = -(-sequences // workload.global_batch_size)
            step = max(0, int((workload.deadline_hours * 3600 - self.beside_seconds) / steps * SECOND))
        return Limits(memory_bytes=self.budget_bytes, harm=harm, host_bytes=self.host_bytes, step_picoseconds=step)

    def runs(self, configuration: Configuration) -> LayerRuns:
        """The profiles of *configuration*'s layers in order, the last with the loss as it is configured."""
        pairs = zip(configuration.strategies(), self.kinds, strict=True)
        own = self.under(configuration.sharding)
        runs = [
            (self.updated(own.profiles[pair], configuration.optimizer, pair[1]), len(list(alike)))
            for pair, alike in groupby(pairs)
        ]
        last, count = runs[-1]
        runs[-1] = (costs.with_head(last, own.heads[configuration.loss_chunks]), count)
        return runs

    def updated(self, profile: StepProfile, optimizer: Optimizer, kind: int) -> StepProfile:
        """*profile*, which is of a layer of that *kind*, with *optimizer*."""
        if optimizer == "adamw" and self.workload.adapter != "full":
            return profile
        return costs.with_update(profile, self.updates[optimizer, self.rank, kind])


def chains(problem: Problem, considered: tuple[Cell, ...], price: int | None = None) -> dict[Cell, Chain]:
    """The inner problem of every cell, with *price* for harm; None takes that of the fastest step there might be."""
    groups: dict[tuple[int, Sharding], tuple[Group, ...]] = {}
    found: dict[Cell, Chain] = {}
    for cell in considered:
        own, alike = problem.under(cell.sharding), (cell.micro_batch_size, cell.sharding)
        if alike not in groups:
            groups[alike] = groups_of(own, cell)
        found[cell] = _around(own, cell, groups[alike])
    if not found:
        return found
    if price is None:
        fastest = min(_fastest_picoseconds(chain) for chain in found.values())
        each = problem.weighed or [None] * problem.num_layers
        coarsest = sum(quality.harm(COARSEST, own) for own in each)
        price = int(quality.WORTH[problem.workload.objective] * fastest / max(1, coarsest))
    at_price = {alike: priced(made, price) for alike, made in groups.items()}
    told = price if problem.weighed else 0
    return {
        cell: replace(chain, groups=at_price[cell.micro_batch_size, cell.sharding], harm_price=told)
        for cell, chain in found.items()
    }


def harm_price(groups: Iterable[Group]) -> int:
    """Picoseconds that one unit of harm is held to be worth in *groups*; 0 where nothing harms."""
    choices = (choice for group in groups for choice in group.choices if choice.harm)
    return next((choice.penalty_picoseconds // choice.harm for choice in choices), 0)


COARSEST = Strategy(weight_format="nf4", activations="save", double_quantization=True)


def priced(groups: Sequence[Group], price: int) -> tuple[Group, ...]:
    """*groups* whose choices are held to be worse by their harm at a *price*."""
    return tuple(
        replace(g, choices=tuple(replace(c, penalty_picoseconds=price * c.harm) for c in g.choices)) for g in groups
    )


def _fastest_picoseconds(chain: Chain) -> int:
    """A step with each layer's fastest strategy."""
    device, host = chain.device_picoseconds, chain.host_picoseconds
    for group in chain.groups:
        device += group.num_layers * min(choice.device_picoseconds for choice in group.choices)
        host += group.num_layers * min(choice.host_picoseconds for choice in group.choices)
    return chain.gradient_accumulation_steps * max(device, host) + chain.update_picoseconds


def picoseconds(seconds: float) -> int:
    """*seconds* as a whole number."""
    return round(seconds * SECOND)


def groups_of(problem: Problem, cell: Cell) -> tuple[Group, ...]:
    """Layers that are alike and next to each other; the first and the last are apart, as they hold more."""
    made: dict[int, dict[str, tuple[Choice, ...]]] = {}
    for kind in dict.fromkeys(problem.kinds):
        places = [
            _choices(problem, cell, strategy, profile)
            for (strategy, of), profile in problem.profiles.items()
            if of == kind
        ]
        made[kind] = {place: tuple(choice[place] for choice in places) for place in ("first", "inner", "last")}
    first, *rest = problem.kinds
    groups = [Group(num_layers=1, choices=made[first]["first"])]
    for choices, alike in groupby(made[kind]["inner"] for kind in rest[:-1]):
        groups.append(Group(num_layers=len(list(alike)), choices=choices))
    if rest:
        groups.append(Group(num_layers=1, choices=made[rest[-1]]["last"]))
    return own_groups(groups, problem.weighed) if problem.weighed else tuple(groups)


def _choices(problem: Problem, cell: Cell, strategy: Strategy, profile: StepProfile) -> dict[str, Choice]:
    """What a layer takes under *strategy* as the model's first, as an inner and as its last."""
    size, rank = cell.micro_batch_size, cell.rank or 0
    accumulates = cell.gradient_accumulation_steps > 1
    curve = costs.curves(profile, size, rank, accumulates=accumulates)
    device, host = latency.profile_seconds(profile, size, rank, problem.gpu)
    resident = costs.resident_layer_bytes(profile, size, rank)
    if accumulates:
        resident += costs.gradient_bytes(profile, 1, rank)
    found: dict[str, Choice] = {}
    for place in ("first", "inner", "last"):
        ahead, back = curve[place], curve[f"{place}_back"]
        high, change, release = ahead.high, ahead.change, 0
        parts = [place, f"{place}_back"]
        if place == "first":
            embed = curve["embed"]
            high, change = max(embed.high, embed.change + high), embed.change + change
            release = curve["release"].change
            parts += ["embed", "release"]
        found[place] = Choice(
            strategy=strategy,
            resident_bytes=resident,
            forward_high_bytes=high,
            forward_change_bytes=change,
            release_bytes=release,
            backward_high_bytes=back.high,
            backward_change_bytes=back.change,
            device_picoseconds=picoseconds(sum(device[part] for part in parts)),
            host_picoseconds=picoseconds(sum(host[part] for part in parts)),
            harm=quality.harm(strategy),
            host_bytes=sent_to_host(profile, size, rank),
        )
    return found


def _around(problem: Problem, cell: Cell, groups: tuple[Group, ...]) -> Chain:
    """The chain of *groups* with what *cell* takes outside of the layers, the optimizer's state included.

    Workspaces are counted as if no layer needed one that another strategy does not: whoever traces the step whole
    finds what is missing.
    """
    size, rank, num_layers = cell.micro_batch_size, cell.rank or 0, problem.num_layers
    accumulates = cell.gradient_accumulation_steps > 1
    layers = each_layer(problem, cell.optimizer)
    head = costs.with_update(problem.heads[cell.loss_chunks], layers[0])
    curve = costs.curves(head, size, rank, accumulates=accumulates)
    device, host = latency.profile_seconds(head, size, rank, problem.gpu)
    workspaces = int(np.min([profile.workspaces for profile in problem.profiles.values()], axis=0).sum())
    states = sum(costs.state_bytes(profile, rank) for profile in layers)
    outside = costs.outside_gradient_bytes(layers[0], rank)
    gradients = costs.learned_bytes([(profile, 1) for profile in layers], rank)
    update = max(costs.update_seconds(device, num_layers), costs.update_seconds(host, num_layers))
    waiting = communication.all_reduce_seconds(gradients, problem.workload.num_gpus, problem.between)
    return Chain(
        groups=groups,
        gradient_accumulation_steps=cell.gradient_accumulation_steps,
        fixed_bytes=costs.outside_bytes(layers[0], size, rank) + states + workspaces + accumulates * outside,
        head_high_bytes=curve["head"].high,
        head_change_bytes=curve["head"].change,
        update_high_bytes=costs.update_curve(curve, num_layers).high,
        device_picoseconds=picoseconds(device["head"]),
        host_picoseconds=picoseconds(host["head"]),
        update_picoseconds=picoseconds(update + waiting),
    )


def each_layer(problem: Problem, optimizer: Optimizer) -> list[StepProfile]:
    """For each layer a profile with *optimizer*, whose state depends on no strategy."""
    any_of = {kind: profile for (_, kind), profile in problem.profiles.items()}
    updated = {kind: problem.updated(profile, optimizer, kind) for kind, profile in any_of.items()}
    return [updated[kind] for kind in problem.kinds]


def predict(problem: Problem, configuration: Configuration) -> Prediction:
    """The prediction for *configuration*, composed from its layers' profiles; nothing of a chain is used."""
    runs, gpu = problem.runs(configuration), problem.gpu
    micro_batch_size, rank = configuration.micro_batch_size, configuration.rank or 0
    num_gpus, accumulation = configuration.num_gpus, configuration.gradient_accumulation_steps
    footprint = costs.footprint(runs, micro_batch_size, rank, accumulates=accumulation > 1)
    gradient_bytes = costs.learned_bytes(runs, rank)
    allocated = footprint.peak_allocated_bytes
    compute = latency.step_seconds(runs, micro_batch_size, rank, gpu).step(accumulation)
    waiting = communication.all_reduce_seconds(gradient_bytes, num_gpus, problem.between)
    tokens = configuration.global_batch_size * configuration.sequence_length
    return Prediction(
        resident_bytes=footprint.resident_bytes,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=allocated,
        peak_process_bytes=allocated + gpu.context_bytes,
        step_seconds=compute + waiting,
        communication_seconds=waiting,
        tokens_per_second=tokens / (compute + waiting),
        traced=False,
    )
