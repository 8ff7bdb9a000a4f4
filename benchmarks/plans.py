"""Mixed plans against what else there is: greedy, one strategy, PyTorch's knapsack, and a program layer by layer.

python -m benchmarks.plans [MODEL ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import highspy
import numpy as np
from rich.console import Console
from rich.table import Table

from shallowflow.planner import branch, certificate, problem
from shallowflow.planner.chain import Chain, Choice, Counts, Limits, Taken, taken
from shallowflow.planner.plan import Workload
from shallowflow.planner.problem import Problem
from shallowflow.planner.strategies import Cell
from shallowflow.profiles.load import load_gpu, load_model
from shallowflow.session import Session
from shallowflow.workloads import space

MODELS = ("Llama-3.2-1B", "Qwen2.5-1.5B", "Llama-3.2-3B", "Qwen2.5-7B", "Llama-3.1-8B")
LENGTHS = (1024, 2048)
SHARES = (0.25, 0.5, 0.75)
"""Of the way from the least that a chain needs to what its fastest choice takes."""
MILP_SECONDS = 10.0
MIB = 2**20


@dataclass(frozen=True)
class Instance:
    """One chain and its limit."""

    name: str
    chain: Chain
    limits: Limits


def posed(model: str, length: int) -> tuple[Problem, tuple[Cell, ...]]:
    """The search problem of *model* on a T4."""
    session = Session(load_model(model), load_gpu("t4"), lambda said: print(said, file=sys.stderr))
    work = Workload(sequence_length=length)
    cells, rank = space(session, work)
    return session.problem(work, cells, rank), cells


def instances(model: str, length: int) -> list[Instance]:
    """Three limits for one micro-batch of one sequence, its loss in chunks."""
    made, cells = posed(model, length)
    cell = next(c for c in cells if c.micro_batch_size == 1 and c.loss_chunks == max(x.loss_chunks for x in cells))
    chain = problem.chains(made, cells)[cell]
    least, most = leanest(chain).peak_bytes, taken(chain, fastest(chain)).peak_bytes
    return [
        Instance(f"{model} 1x{length} {share:.0%}", chain, Limits(memory_bytes=int(least + share * (most - least))))
        for share in SHARES
    ]


def uniform(chain: Chain) -> list[Taken]:
    """What each strategy takes for all layers."""
    number = range(len(chain.groups[0].choices))
    return [
        taken(chain, tuple(tuple(g.num_layers * (i == j) for j in range(len(g.choices))) for g in chain.groups))
        for i in number
    ]


def leanest(chain: Chain) -> Taken:
    """The single strategy that needs the least."""
    return min(uniform(chain), key=lambda found: found.peak_bytes)


def fastest(chain: Chain) -> Counts:
    """Every layer's best score, whatever it needs."""
    best = [min(range(len(g.choices)), key=lambda i: score(chain, g.choices[i])) for g in chain.groups]
    return tuple(
        tuple(g.num_layers * (i == b) for i in range(len(g.choices))) for g, b in zip(chain.groups, best, strict=True)
    )


def score(chain: Chain, choice: Choice) -> int:
    """What a layer adds to the score where the device is the bound."""
    return chain.gradient_accumulation_steps * choice.device_picoseconds + choice.penalty_picoseconds


def held(choice: Choice) -> int:
    """What a layer holds from its forward to its backward pass."""
    return choice.resident_bytes + choice.forward_change_bytes + choice.release_bytes


def best_uniform(at: Instance) -> Taken | None:
    """The best single strategy for all layers."""
    fitting = [found for found in uniform(at.chain) if found.within(at.limits)]
    return min(fitting, key=lambda found: found.score_picoseconds, default=None)


def greedy(at: Instance) -> Taken | None:
    """From the fastest on, always the move that costs the fewest seconds per byte, until it fits."""
    counts = [list(count) for count in fastest(at.chain)]
    for _ in range(10_000):
        found = taken(at.chain, tuple(map(tuple, counts)))
        if found.within(at.limits):
            return found
        moves = [
            ((score(at.chain, g.choices[j]) - score(at.chain, g.choices[i])) / saved, n, i, j)
            for n, g in enumerate(at.chain.groups)
            for i, j in product(range(len(g.choices)), repeat=2)
            if counts[n][i] and (saved := held(g.choices[i]) - held(g.choices[j])) > 0
        ]
        if not moves:
            return None
        _, n, i, j = min(moves)
        counts[n][i] -= 1
        counts[n][j] += 1
    return None


def torch_knapsack(at: Instance) -> Taken | None:
    """PyTorch's dynamic program: which layers to save, within what the others leave; once per weight format."""
    from torch._functorch._activation_checkpointing.knapsack import dp_knapsack

    found = [knapsack_of(at, weights, dp_knapsack) for weights in formats(at.chain)]
    return min((f for f in found if f is not None), key=lambda f: f.score_picoseconds, default=None)


def formats(chain: Chain) -> list[tuple[str, bool]]:
    """Weight formats, with double quantization or without."""
    return sorted({(c.strategy.weight_format, c.strategy.double_quantization) for c in chain.groups[0].choices})


def knapsack_of(at: Instance, weights: tuple[str, bool], solve: Callable[..., object]) -> Taken | None:
    """The largest budget for saved activations whose choice fits, found by halving."""
    layers = [
        {
            c.strategy.activations: (i, c)
            for i, c in enumerate(g.choices)
            if (c.strategy.weight_format, c.strategy.double_quantization) == weights
        }
        for g in at.chain.groups
        for _ in range(g.num_layers)
    ]
    saves = [layer["save"][1] for layer in layers]
    again = [layer["recompute"][1] for layer in layers]
    gains = [held(s) - held(r) for s, r in zip(saves, again, strict=True)]
    times = [r.device_picoseconds / 1e12 - s.device_picoseconds / 1e12 for s, r in zip(saves, again, strict=True)]
    best: Taken | None = None
    low, high = 0.0, 1.0
    for _ in range(8):
        share = (low + high) / 2
        kept = set(solve([g / sum(gains) for g in gains], times, share)[1])  # type: ignore[index]
        found = taken(
            at.chain,
            counted(at.chain, [layers[n]["save" if n in kept else "recompute"][0] for n in range(len(layers))]),
        )
        if found.within(at.limits):
            best, low = found, share
        else:
            high = share
    return best


def counted(chain: Chain, picks: list[int]) -> Counts:
    """How often each choice is made in each group."""
    found: list[tuple[int, ...]] = []
    for group in chain.groups:
        mine, picks = picks[: group.num_layers], picks[group.num_layers :]
        found.append(tuple(mine.count(i) for i in range(len(group.choices))))
    return tuple(found)


def layer_by_layer(at: Instance) -> Taken | None:
    """A mixed-integer program with a variable for every layer and choice, as HiGHS leaves it after MILP_SECONDS."""
    chain = at.chain
    layers = [(g, group) for g, group in enumerate(chain.groups) for _ in range(group.num_layers)]
    columns = [(n, i, c) for n, (_, group) in enumerate(layers) for i, c in enumerate(group.choices)]
    model: Any = highspy.Highs()
    model.silent()
    model.setOptionValue("time_limit", MILP_SECONDS)
    count = len(columns)
    model.addVars(count, np.zeros(count), np.ones(count))
    numbers = np.arange(count, dtype=np.int32)
    model.changeColsCost(count, numbers, np.array([score(chain, c) / 1e12 for _, _, c in columns]))
    model.changeColsIntegrality(count, numbers, np.full(count, highspy.HighsVarType.kInteger))
    owner = np.array([n for n, _, _ in columns])
    for n in range(len(layers)):
        where = np.flatnonzero(owner == n).astype(np.int32)
        model.addRow(1.0, 1.0, len(where), where, np.ones(len(where)))
    resident, forward, back = (
        np.array([getattr(c, name) / MIB for _, _, c in columns])
        for name in ("resident_bytes", "forward_change_bytes", "backward_change_bytes")
    )
    through = np.array([held(c) / MIB for _, _, c in columns])
    highs = np.array([(c.forward_high_bytes / MIB, c.backward_high_bytes / MIB) for _, _, c in columns])
    room = (at.limits.memory_bytes - chain.fixed_bytes) / MIB

    def limit(values: np.ndarray, most: float) -> None:
        model.addRow(-highspy.kHighsInf, most, count, numbers, values)

    limit(through, room - chain.head_high_bytes / MIB)
    for n in range(len(layers)):
        limit(resident + forward * (owner < n) + highs[:, 0] * (owner == n), room)
        limit(through + back * (owner > n) + highs[:, 1] * (owner == n), room - chain.head_change_bytes / MIB)
    model.run()
    if model.getInfo().primal_solution_status != 2:
        return None
    values = np.array(model.getSolution().col_value)
    picks = [columns[int(np.flatnonzero(owner == n)[np.argmax(values[owner == n])])][1] for n in range(len(layers))]
    found = taken(chain, counted(chain, picks))
    return found if found.within(at.limits) else None


def ours(at: Instance) -> tuple[Taken | None, float]:
    """The solver's answer, and the gap that its proof leaves."""
    found = branch.solve(at.chain, at.limits, most_nodes=1500)
    shown = certificate.lower_bound(at.chain, at.limits, found.tree)
    if found.best is None or shown is None:
        return None, 0.0
    return found.best.taken, max(0.0, 1 - shown / found.best.taken.score_picoseconds)


OTHERS: dict[str, Callable[[Instance], Taken | None]] = {
    "greedy": greedy,
    "one strategy": best_uniform,
    "PyTorch knapsack": torch_knapsack,
    "layer by layer": layer_by_layer,
}


def main() -> None:
    """Print by how much more each scores than ours, and how long it takes."""
    table = Table()
    for name in ("instance", "ours s", "ms", "gap", *OTHERS):
        table.add_column(name, justify="left" if name == "instance" else "right", no_wrap=True)
    beaten = 0
    for model, length in product(sys.argv[1:] or MODELS, LENGTHS):
        for at in instances(model, length):
            began = time.perf_counter()
            best, gap = ours(at)
            row = [at.name, "-" if best is None else f"{best.step_picoseconds / 1e12:.2f}"]
            row += [f"{1000 * (time.perf_counter() - began):.0f}", f"{gap:.1e}"]
            for other in OTHERS.values():
                began = time.perf_counter()
                found = other(at)
                spent = 1000 * (time.perf_counter() - began)
                if found is None or best is None:
                    row.append(f"none, {spent:.0f} ms")
                    beaten += found is not None
                    continue
                more = found.score_picoseconds / best.score_picoseconds - 1
                beaten += more < -1e-7
                row.append(f"{more:+.2%}, {spent:.0f} ms")
            table.add_row(*row)
    Console(width=150).print(table)
    print(f"others that found better: {beaten}")


if __name__ == "__main__":
    main()
