"""How long the solver takes to prove an optimum: made-up chains of up to 126 layers with 36 strategies each.

python -m benchmarks.solver
"""

from __future__ import annotations

import random
import statistics
import time
from itertools import product

from rich.console import Console
from rich.table import Table

from shallowflow.planner import branch, certificate
from shallowflow.planner.chain import Chain, Choice, Group, Limits
from shallowflow.planner.strategies import Strategy

DEPTHS = (32, 80, 126)
SEEDS = range(4)
SHARES = (0.2, 0.5, 0.8)
"""Of the way from the least memory to the most."""
MOST_NODES = 1_500
PROVED = 1e-9
"""A gap below which an optimum counts as proved."""
MIB = 2**20
STRATEGY = Strategy(weight_format="nf4", activations="save")
WEIGHTS = ((436, 1.0, 0), (230, 1.06, 81_000), (140, 1.15, 8_281_000))
"""Of fp16, int8 and nf4: MiB of an 8B model's layer, its time over fp16's, its harm."""
NUM_POLICIES = 12
"""From saving everything to recomputing all of it."""
HARM_SHARE = 0.4
"""Of nf4 throughout, as the second limit of chains whose layers all differ."""


def choice(chance: random.Random, weights: tuple[int, float, int], policy: int, scale: float) -> Choice:
    """One strategy: the less it saves, the longer its backward pass."""
    resident, slower, harm = weights
    recomputed = policy / (NUM_POLICIES - 1)
    saved = round((620 * (1 - recomputed) ** 1.3 + 4) * (1 + 0.05 * chance.random())) * MIB
    seconds = scale * slower * (0.3 + 0.035 * recomputed**0.8) * (1 + 0.02 * chance.random())
    return Choice(
        strategy=STRATEGY,
        resident_bytes=resident * MIB,
        forward_high_bytes=saved + 60 * MIB,
        forward_change_bytes=saved,
        release_bytes=0,
        backward_high_bytes=max(0, 740 * MIB - saved),
        backward_change_bytes=-saved,
        device_picoseconds=int(seconds * 1e12),
        host_picoseconds=2 * 10**10,
        penalty_picoseconds=100 * harm,
        harm=harm,
    )


def group(chance: random.Random, num_layers: int, scale: float = 1.0) -> Group:
    """Layers with 36 strategies."""
    made = (choice(chance, weights, policy, scale) for weights, policy in product(WEIGHTS, range(NUM_POLICIES)))
    return Group(num_layers=num_layers, choices=tuple(made))


def instance(groups: tuple[Group, ...], share: float, harm: int | None = None) -> tuple[Chain, Limits]:
    """A chain of *groups* with a *share* of the memory that it might use."""
    chain = Chain(
        groups=groups,
        gradient_accumulation_steps=8,
        fixed_bytes=1024 * MIB,
        head_high_bytes=400 * MIB,
        head_change_bytes=8 * MIB,
        update_high_bytes=50 * MIB,
        device_picoseconds=2 * 10**11,
        host_picoseconds=10**10,
        update_picoseconds=5 * 10**10,
    )
    held = [[c.resident_bytes + c.forward_change_bytes for c in g.choices] for g in groups]
    least = sum(g.num_layers * min(h) for g, h in zip(groups, held, strict=True)) + 2048 * MIB
    most = sum(g.num_layers * max(h) for g, h in zip(groups, held, strict=True)) + 2048 * MIB
    return chain, Limits(memory_bytes=int(least + share * (most - least)), harm=harm)


def alike(num_layers: int, seed: int, share: float) -> tuple[Chain, Limits]:
    """Layers that are all alike, but for the first and the last."""
    chance = random.Random(seed)
    inner = group(chance, num_layers - 2)
    first, last = (Group(num_layers=1, choices=inner.choices) for _ in range(2))
    return instance((first, inner, last), share)


def different(num_layers: int, seed: int) -> tuple[Chain, Limits]:
    """Layers none of which is like another, within memory and within harm."""
    chance = random.Random(seed)
    groups = tuple(group(chance, 1, 0.7 + 0.6 * chance.random()) for _ in range(num_layers))
    return instance(groups, 0.5, int(HARM_SHARE * WEIGHTS[-1][2] * num_layers))


def row(posed: list[tuple[Chain, Limits]]) -> list[str]:
    """Median and worst milliseconds, how many are proved in 50, parts, and the largest gap that certificates leave."""
    times, gaps, parts = [], [], []
    for chain, limits in posed:
        began = time.perf_counter()
        found = branch.solve(chain, limits, most_nodes=MOST_NODES)
        times.append(1000 * (time.perf_counter() - began))
        shown = certificate.lower_bound(chain, limits, found.tree)
        assert found.best is not None and shown is not None
        gaps.append(max(0.0, 1 - shown / found.best.taken.score_picoseconds))
        parts.append(len(found.tree.nodes))
    quick = sum(t < 50 and gap < PROVED for t, gap in zip(times, gaps, strict=True))
    return [
        f"{statistics.median(times):.0f}",
        f"{max(times):.0f}",
        f"{quick} of {len(times)}",
        f"{statistics.median(parts):.0f}",
        f"{max(gaps):.0e}",
    ]


def main() -> None:
    """Print a line for every kind of chain."""
    table = Table(box=None)
    for name in ("chain, 36 strategies", "median ms", "worst", "proved in 50 ms", "parts", "largest gap"):
        table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
    for depth in DEPTHS:
        posed = [alike(depth, seed, share) for seed in SEEDS for share in SHARES]
        table.add_row(f"{depth} layers alike", *row(posed))
    table.add_row("126 layers, all different, two limits", *row([different(126, seed) for seed in SEEDS]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
