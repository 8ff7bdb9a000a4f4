"""A proof that no better choice exists, and its check, which shares nothing with the search.

The proof is a tree. Its branches split the ways to choose by how often one choice is made; each leaf has a price per
unit of every limited thing. Whatever is chosen within the leaf, its score is at least the sum, layer by layer, of the
cheapest choice's score and priced needs, less the priced limits (Lagrange's bound). A leaf that promises more has left
few ways open below that, and each is looked at. All of it is whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cmp_to_key

from .chain import Chain, Choice, Limits
from .needs import Box, Needs, Price, Unproven, Whole, comes_before, rounded_row, row_of
from .open_ways import Limited, OpenWays, Place
from .reckoning import reckoned

SCALE = 2**20
"""Prices are in picoseconds per SCALE units, shares in parts of SCALE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A part of the ways to choose.

    Attributes:
        split: (group, choice, most): the first child holds the ways with at most so many, the second the others.
        children: numbers of the two.
        device_share: of a micro-batch's time taken as the device's, the rest as the host's.
        infeasible: the prices alone show that nothing here is within the limits.
        at_least_picoseconds: nothing here scores less, which is seen by going through what prices leave open; below
            zero where harm has prices that are.
    """

    split: tuple[int, int, int] | None = None
    children: tuple[int, int] | None = None
    device_share: Whole = SCALE
    prices: tuple[Price, ...] = ()
    infeasible: bool = False
    at_least_picoseconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The proof for one chain; the first node is the root.

    Attributes:
        dominated: for every group and choice, another choice that is no worse, or None.
    """

    nodes: tuple[Node, ...]
    dominated: tuple[tuple[int | None, ...], ...]


def lower_bound(chain: Chain, limits: Limits, tree: Tree, opened: OpenWays | None = None) -> int | None:
    """What every choice within *limits* scores at least, in picoseconds; None if the tree shows that there is none.

    Takes time in proportion to nodes x prices x choices, and to what leaves leave open, of which there is a most: for
    this tree, or for all that are checked with the same *opened*.

    Raises:
        Unproven: the tree is none, names what the chain has not, or a leaf shows less than it says.
    """
    check = _Check(chain, limits, _kept(chain, tree), opened or OpenWays())
    bounds: list[int] = []
    for node, box in _leaves(chain, tree):
        least = check.least(node, box)
        if least is None:  # the box itself is empty
            continue
        if not node.infeasible:
            bounds.append(least)
        elif least <= 0:
            raise Unproven("a leaf that is said to be infeasible is not shown to be")
    return min(bounds, default=None)


def _kept(chain: Chain, tree: Tree) -> list[list[int]]:
    """For each group the choices that are not dominated, after a look at those that are."""
    if len(tree.dominated) != len(chain.groups):
        raise Unproven(f"{len(chain.groups)} groups have {len(tree.dominated)} lists of dominated choices")
    found: list[list[int]] = []
    for group, by in zip(chain.groups, tree.dominated, strict=True):
        if len(by) != len(group.choices):
            raise Unproven(f"{len(group.choices)} choices have {len(by)} entries on which dominates them")
        for index, better in enumerate(by):
            if better is None:
                continue
            if not 0 <= better < len(by) or by[better] is not None:
                raise Unproven(f"choice {index} is dominated by {better}, which is dominated itself or not there")
            if not _stands_in(group.choices[better], group.choices[index]):
                raise Unproven(f"choice {better} does not dominate choice {index}")
        found.append([index for index, better in enumerate(by) if better is None])
    return found


def _stands_in(better: Choice, worse: Choice) -> bool:
    """Whether replacing *worse* raises no moment of the step and no sum."""
    gains = [0]  # by how much the level falls, moment by moment
    gains.append(worse.resident_bytes - better.resident_bytes)
    gains.append(gains[1] + worse.forward_high_bytes - better.forward_high_bytes)
    gains.append(gains[1] + worse.forward_change_bytes - better.forward_change_bytes)
    gains.append(gains[3] + worse.release_bytes - better.release_bytes)
    gains.append(gains[4] + worse.backward_high_bytes - better.backward_high_bytes)
    gains.append(gains[4] + worse.backward_change_bytes - better.backward_change_bytes)
    sums = ("device_picoseconds", "host_picoseconds", "penalty_picoseconds", "harm", "host_bytes")
    return min(gains) >= 0 and all(getattr(better, name) <= getattr(worse, name) for name in sums)


def _leaves(chain: Chain, tree: Tree) -> Iterator[tuple[Node, Box]]:
    """Every leaf with its box; the boxes together hold every choice."""
    if not tree.nodes:
        raise Unproven("the tree has no nodes")
    open_nodes: list[tuple[int, Box]] = [(0, {})]
    reached = {0}
    while open_nodes:
        number, box = open_nodes.pop()
        node = tree.nodes[number]
        if node.split is None or node.children is None:
            yield node, box
            continue
        group, choice, most = node.split
        if not (0 <= group < len(chain.groups) and 0 <= choice < len(chain.groups[group].choices)):
            raise Unproven(f"node {number} splits by a choice that is not there")
        if not all(number < child < len(tree.nodes) for child in node.children):
            raise Unproven(f"node {number} has no such children")
        if node.children[0] == node.children[1] or not reached.isdisjoint(node.children):
            raise Unproven(f"node {number} has a child that is another's")
        reached.update(node.children)
        least, greatest = box.get((group, choice), (0, chain.groups[group].num_layers))
        open_nodes.append((node.children[0], {**box, (group, choice): (least, min(greatest, most))}))
        open_nodes.append((node.children[1], {**box, (group, choice): (max(least, most + 1), greatest)}))


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a leaf's prices make of each choice and of what is outside of the layers, and what they are prices of."""

    weights: Needs
    outside: int
    limited: list[Limited]


class _Check:
    """The check of one chain's leaves; what a leaf's prices make of the choices is kept, as many share their prices."""

    def __init__(self, chain: Chain, limits: Limits, kept: Sequence[Sequence[int]], opened: OpenWays) -> None:
        self._chain, self._limits, self._kept = chain, limits, kept
        self._opened = opened
        self._last: tuple[tuple[int, bool, tuple[Price, ...]], _Weights] | None = None

    def least(self, node: Node, box: Box) -> int | None:
        """The leaf's bound in picoseconds, rounded down; of an infeasible one the excess of needs over limits.

        None if the box is empty.
        """
        made = self._weights(node, box)
        total = made.outside
        for number, group in enumerate(self._chain.groups):
            cheapest = _cheapest(made.weights[number], group.num_layers, number, box, self._kept[number])
            if cheapest is None:
                return None
            total += cheapest
        if node.infeasible:
            return total
        if node.at_least_picoseconds is None or node.at_least_picoseconds <= total // SCALE:
            return total // SCALE
        dear = (made.weights, SCALE * (node.at_least_picoseconds - 1) - made.outside)
        self._go_through([dear, *_scores(self._chain, node.at_least_picoseconds - 1), *made.limited], box)
        return node.at_least_picoseconds

    def _weights(self, node: Node, box: Box) -> _Weights:
        key = (node.device_share, node.infeasible, node.prices)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        chain, share = self._chain, node.device_share
        if share > SCALE:
            raise Unproven(f"the device's share is {share} of {SCALE}")
        scale = 0 if node.infeasible else SCALE
        steps = 0 if node.infeasible else chain.gradient_accumulation_steps
        on_device, on_host = steps * share, steps * (SCALE - share)
        outside = on_device * chain.device_picoseconds + on_host * chain.host_picoseconds
        outside += scale * (chain.update_picoseconds + chain.penalty_beyond_picoseconds)
        weights = [
            [
                scale * choice.penalty_picoseconds
                + on_device * choice.device_picoseconds
                + on_host * choice.host_picoseconds
                for choice in group.choices
            ]
            for group in chain.groups
        ]
        limited = [_limited(chain, self._limits, price, box, self._kept) for price in node.prices]
        for price, (needs, limit) in zip(node.prices, limited, strict=True):
            outside -= price.amount * limit
            for weight, need in zip(weights, needs, strict=True):
                for index, amount in enumerate(need):
                    weight[index] += price.amount * amount
        made = _Weights(weights, outside, limited)
        fixed = all(
            price.choice is None and (price.group is None or chain.groups[price.group].num_layers == 1)
            for price in node.prices
        )
        self._last = (key, made) if fixed else None  # other limits depend on the box
        return made

    def _go_through(self, limited: Sequence[Limited], box: Box) -> None:
        """Look at every way in *box* that keeps what is *limited*; Unproven if one is within the limits."""
        groups = self._chain.groups
        bounds = [
            {index: box.get((number, index), (0, group.num_layers)) for index in self._kept[number]}
            for number, group in enumerate(groups)
        ]
        certain = {(number, index): least for number, able in enumerate(bounds) for index, (least, _) in able.items()}
        places = [
            Place(
                group.num_layers - sum(least for least, _ in able.values()),
                {index: most - least for index, (least, most) in able.items() if most > least},
            )
            for group, able in zip(groups, bounds, strict=True)
        ]
        dear, *others = (
            (needs, limit - sum(n * needs[number][index] for (number, index), n in certain.items()))
            for needs, limit in limited
        )
        for way in self._opened.within(dear, others, places, sum(group.num_layers for group in groups)):
            layers: list[Choice] = []
            for number, group in enumerate(groups):
                made = {i: certain[number, i] + way.get((number, i), 0) for i in self._kept[number]}
                layers += _ordered(group.choices, made)
            if not reckoned(self._chain, layers).excess(self._limits):
                raise Unproven("a way that scores less than a leaf promises is within the limits")


def _limited(chain: Chain, limits: Limits, price: Price, box: Box, kept: Sequence[Sequence[int]]) -> Limited:
    """What has a *price*, after it is made stronger."""
    needs, limit = row_of(chain, limits, price, box, kept)
    if price.divisor is None:
        return needs, limit
    return rounded_row(chain, needs, limit, price.divisor, price.references)


def _scores(chain: Chain, most: int) -> list[Limited]:
    """What layers add to a score of *most*, and what is left of it, if the device is the bound, and if the host is."""
    steps = chain.gradient_accumulation_steps
    most -= chain.update_picoseconds + chain.penalty_beyond_picoseconds
    on_device, on_host = (
        [
            [steps * getattr(choice, name) + choice.penalty_picoseconds for choice in group.choices]
            for group in chain.groups
        ]
        for name in ("device_picoseconds", "host_picoseconds")
    )
    return [(on_device, most - steps * chain.device_picoseconds), (on_host, most - steps * chain.host_picoseconds)]


def _ordered(choices: Sequence[Choice], made: Mapping[int, int]) -> list[Choice]:
    """A group's layers in the order that makes its backward pass's peak the lowest, the last of which comes first."""

    def backward(one: int, other: int) -> int:
        return -1 if comes_before(choices, one, other) else 1

    return [
        choices[index] for index in sorted(made, key=cmp_to_key(backward), reverse=True) for _ in range(made[index])
    ]


def _cheapest(weights: Sequence[int], num_layers: int, group: int, box: Box, kept: Sequence[int]) -> int | None:
    """The least sum of *num_layers* weights, each choice as often as *box* allows; None if it allows no such number."""
    bounds = {index: box.get((group, index), (0, num_layers)) for index in kept}
    if any(least > most for least, most in bounds.values()):
        return None
    left = num_layers - sum(least for least, _ in bounds.values())
    if left < 0:
        return None
    total = sum(bounds[index][0] * weights[index] for index in kept)
    for index in sorted(kept, key=lambda i: weights[i]):
        more = min(left, bounds[index][1] - bounds[index][0])
        total += more * weights[index]
        left -= more
    return None if left else total
