"""One strategy for all layers: what it takes, which is best, and which needs the least memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import allowed
from . import problem as posing
from .chain import Chain, Group, Limits, Taken, taken
from .problem import Problem
from .strategies import Cell, Configuration, Strategy


def best(chain: Chain, limits: Limits) -> Chain | None:
    """*chain* with the one strategy that is best for all layers; None if there is none within *limits*."""
    fitting = [(needs.score_picoseconds, alone) for alone, needs in uniform(chain) if needs.within(limits)]
    return min(fitting, key=lambda item: item[0])[1] if fitting else None


def strategies(chain: Chain) -> list[Strategy]:
    """Those that any group of *chain* may be given."""
    return list(dict.fromkeys(choice.strategy for group in chain.groups for choice in group.choices))


def uniform(chain: Chain) -> Iterator[tuple[Chain, Taken]]:
    """For every strategy that all groups of *chain* have, the chain with no other, and what it takes."""
    for strategy in strategies(chain):
        alone = only(chain, {strategy})
        if alone is not None:
            yield alone, taken(alone, tuple((group.num_layers,) for group in alone.groups))


def only(chain: Chain, wanted: set[Strategy]) -> Chain | None:
    """*chain* with no choices but *wanted*; None if a group is left with none."""
    groups = [_only(group, wanted) for group in chain.groups]
    return replace(chain, groups=tuple(groups)) if all(group.choices for group in groups) else None


def _only(group: Group, wanted: set[Strategy]) -> Group:
    kept = [index for index, choice in enumerate(group.choices) if choice.strategy in wanted]
    choices = tuple(group.choices[index] for index in kept)
    if not (kept and group.harms):
        return replace(group, choices=choices)
    return Group.of(choices, [[row[index] for index in kept] for row in group.harms])


def best_seconds(chains: dict[Cell, Chain], limits: dict[Cell, Limits]) -> float | None:
    """The step of the best configuration with one strategy, held to the same limits as the plan."""
    fitting = [needs for cell, chain in chains.items() for _, needs in uniform(chain) if needs.within(limits[cell])]
    found = min(fitting, key=lambda needs: needs.score_picoseconds, default=None)
    return None if found is None else found.step_picoseconds / posing.SECOND


def smallest(problem: Problem, considered: tuple[Cell, ...]) -> Configuration | None:
    """The configuration with one strategy that needs the least memory; None without any.

    What exceeds the host's memory comes after all that does not.
    """
    host = float("inf") if problem.host_bytes is None else problem.host_bytes
    found = [
        (
            (needs.host_bytes > host, needs.peak_bytes),
            allowed.configured(problem.workload, cell, strategies(alone) * problem.num_layers),
        )
        for cell, chain in posing.chains(problem, considered).items()
        for alone, needs in uniform(chain)
    ]
    return min(found, key=lambda item: item[0])[1] if found else None
