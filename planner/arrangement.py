"""Which layers of a group get which of its strategies, where their weights differ, and prices that prove it the best.

The search counts how many layers of a group get each strategy, at one harm for each weight format. Let that harm be any
price p[f], and h[l, f] what layer l loses by format f. Whatever formats f(l) the layers get, their harms sum to
``sum p[f(l)] + sum (h[l, f(l)] - p[f(l)])``, and the second sum is at least that of each layer's least difference,
``Group.harm_beyond``. So the best by counts and prices, with that constant, bounds the best there is; and where every
layer has the format of its least difference, the bound is its harm itself. ``prices`` finds such p for given counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from . import quality
from .chain import Chain, Choice, Counts, Group, Limits, Taken, backward_order, taken_in_order
from .strategies import Strategy, WeightFormat
from .weighed import LayerErrors

Format = tuple[WeightFormat, bool]
"""A weight format, and whether its constants are quantized."""
Prices = tuple[Mapping[Format, int], ...]
"""For each layer the prices of formats in its group."""
Harms = Sequence[Sequence[int]]
Places = tuple[tuple[int, ...], ...]
"""For each group, the choice of each of its layers."""

FAR = 2**62
"""What moves of layers that there are not cost."""
MOST_SWAPS = 200
"""Swaps of two layers that are tried, the most telling first, before an order is taken for good."""


@dataclass(frozen=True, slots=True)
class Arranged:
    """Each layer's strategy, and what they take by the layers' own harms."""

    strategies: tuple[Strategy, ...]
    taken: Taken


def own_groups(groups: Sequence[Group], weighed: Sequence[LayerErrors]) -> tuple[Group, ...]:
    """*groups* whose layers lose what was *weighed*; each choice's harm is the mean of its group's layers."""
    found: list[Group] = []
    first = 0
    for group in groups:
        layers = weighed[first : first + group.num_layers]
        harms = [[quality.harm(choice.strategy, layer) for choice in group.choices] for layer in layers]
        means = [sum(column) // len(layers) for column in zip(*harms, strict=True)]
        choices = [replace(c, harm=mean) for c, mean in zip(group.choices, means, strict=True)]
        alone = replace(group, choices=tuple(choices))
        found.append(alone if group.num_layers == 1 else Group.of(choices, harms))
        first += group.num_layers
    return tuple(found)


def repriced(chain: Chain, prices: Prices) -> Chain:
    """*chain* with *prices* for its choices' harms, where its layers differ in that."""
    found: list[Group] = []
    first = 0
    for group in chain.groups:
        told = prices[first]
        choices = [_priced(c, told.get(_format(c), c.harm), chain.harm_price) for c in group.choices]
        found.append(Group.of(choices, group.harms) if group.harms else group)
        first += group.num_layers
    return replace(chain, groups=tuple(found))


def _priced(choice: Choice, harm: int, harm_price: int) -> Choice:
    return replace(choice, harm=harm, penalty_picoseconds=harm * harm_price)


def _format(choice: Choice) -> Format:
    return choice.strategy.weight_format, choice.strategy.double_quantization


def in_order(chain: Chain, counts: Counts) -> Places:
    """*counts* of each group's choices, in the order that makes the backward pass's peak the lowest."""
    return tuple(
        tuple(index for index in reversed(backward_order(group.choices)) for _ in range(count[index]))
        for group, count in zip(chain.groups, counts, strict=True)
    )


def arranged(chain: Chain, counts: Counts, limits: Limits) -> Arranged:
    """*counts* of each group's choices given to layers so that they lose least, as far as memory allows.

    Formats are handed out first, then, among the layers of one format, the choices in the order for the lowest peak.
    Where that order's peak is too high, it is the lowest peak's in which layers are swapped for as long as it fits.
    """
    plain = in_order(chain, counts)
    if any(group.harms for group in chain.groups):
        handed = tuple(_handed_out(group, places) for group, places in zip(chain.groups, plain, strict=True))
        fits = _taken(chain, handed).peak_bytes <= limits.memory_bytes
        plain = handed if fits else _swapped(chain, plain, limits.memory_bytes)
    layers = [group.choices[c].strategy for group, places in zip(chain.groups, plain, strict=True) for c in places]
    return Arranged(tuple(layers), _taken(chain, plain))


def prices(chain: Chain, counts: Counts) -> Prices:
    """Of each format in each layer's group, a price at which no layer would rather have another than it gets."""
    found: list[Mapping[Format, int]] = []
    for group, places in zip(chain.groups, in_order(chain, counts), strict=True):
        formats = list(dict.fromkeys(map(_format, group.choices)))
        told: dict[Format, int] = {}
        if group.harms:
            harms = _by_format(group, formats)
            given = [formats.index(_format(group.choices[c])) for c in places]
            told = dict(zip(formats, _supporting(harms, least_harm(harms, given)), strict=True))
        found += [told] * group.num_layers
    return tuple(found)


def least_harm(harms: Harms, given: Sequence[int]) -> list[int]:
    """The formats *given*, one a layer, handed out again so that the layers' harms sum to the least.

    Layers pass formats on around cycles for as long as that gains: then no other way has a lower sum (Klein, 1967).
    """
    chosen = list(given)
    numbers = range(len(harms[0]))
    cycles = [c for size in numbers for c in permutations(numbers, size + 1) if size and c[0] == min(c)]
    while True:
        costs, movers = _moves(harms, chosen)
        rounds = [(sum(costs[a][b] for a, b in _steps(cycle)), cycle) for cycle in cycles]
        gain, best = min(rounds, default=(0, ()))
        if gain >= 0:
            return chosen
        for a, b in _steps(best):
            chosen[movers[a][b]] = b


def _steps(cycle: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))


def _moves(harms: Harms, chosen: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """From each format to each, what moving a layer adds at least, and which layer that is."""
    numbers = range(len(harms[0]))
    costs, movers = [[FAR for _ in numbers] for _ in numbers], [[-1 for _ in numbers] for _ in numbers]
    for layer, (row, a) in enumerate(zip(harms, chosen, strict=True)):
        for b in numbers:
            if row[b] - row[a] < costs[a][b]:
                costs[a][b], movers[a][b] = row[b] - row[a], layer
    return costs, movers


def _supporting(harms: Harms, chosen: Sequence[int]) -> list[int]:
    """Prices that the least harm proves: the lengths of shortest paths of moves, on the mean over their starts.

    The finest format's is its mean harm, from which the others are counted.
    """
    paths, _ = _moves(harms, chosen)
    numbers = range(len(paths))
    for k in numbers:
        for a in numbers:
            for b in numbers:
                paths[a][b] = min(paths[a][b], paths[a][k] + paths[k][b])
    starts = sorted(set(chosen))
    means = [sum(paths[start][b] for start in starts) // len(starts) for b in numbers]
    finest = min(numbers, key=lambda b: sum(row[b] for row in harms))
    shift = sum(row[finest] for row in harms) // len(harms) - means[finest]
    return [mean + shift for mean in means]


def _by_format(group: Group, formats: Sequence[Format]) -> Harms:
    places = [next(i for i, choice in enumerate(group.choices) if _format(choice) == f) for f in formats]
    return [[row[place] for place in places] for row in group.harms]


def _handed_out(group: Group, places: Sequence[int]) -> tuple[int, ...]:
    """*places* with formats where they harm least, and the choices of each format in the order that they had."""
    if not group.harms:
        return tuple(places)
    formats = list(dict.fromkeys(map(_format, group.choices)))
    of = [formats.index(_format(group.choices[place])) for place in places]
    queues = {f: iter([p for p, its in zip(places, of, strict=True) if its == f]) for f in set(of)}
    return tuple(next(queues[f]) for f in least_harm(_by_format(group, formats), of))


def _swapped(chain: Chain, plain: Places, memory_bytes: int) -> Places:
    """*plain* with layers of a group swapped, each time the two that gain most and still fit."""
    found = plain
    while True:
        for _, number, a, b in sorted(_gains(chain, found))[:MOST_SWAPS]:
            row = list(found[number])
            row[a], row[b] = row[b], row[a]
            other = (*found[:number], tuple(row), *found[number + 1 :])
            if _taken(chain, other).peak_bytes <= memory_bytes:
                found = other
                break
        else:
            return found


def _gains(chain: Chain, places: Places) -> list[tuple[int, int, int, int]]:
    """Swaps of two layers that lower the harm: by how much (less than nothing), in which group, which two."""
    found: list[tuple[int, int, int, int]] = []
    for number, (group, row) in enumerate(zip(chain.groups, places, strict=True)):
        for a, b in combinations(range(len(row)), 2) if group.harms else ():
            ours, theirs = group.harms[a], group.harms[b]
            gain = ours[row[b]] + theirs[row[a]] - ours[row[a]] - theirs[row[b]]
            if gain < 0:
                found.append((gain, number, a, b))
    return found


def _harm(group: Group, layer: int, choice: int) -> int:
    return group.harms[layer][choice] if group.harms else group.choices[choice].harm


def _taken(chain: Chain, places: Places) -> Taken:
    """What layers with these choices take, by their own harms."""
    both = list(zip(chain.groups, places, strict=True))
    found = taken_in_order(chain, [(group.choices[choice], 1) for group, row in both for choice in row])
    if not any(group.harms for group in chain.groups):
        return found
    harm = sum(_harm(group, layer, choice) for group, row in both for layer, choice in enumerate(row))
    return replace(found, harm=harm, score_picoseconds=found.step_picoseconds + chain.harm_price * harm)
