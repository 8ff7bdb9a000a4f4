"""The best choice for one chain, with its proof: branch and bound over HiGHS's linear relaxation.

Where a part's prices leave few ways open that score less than the best that is known, it is not divided: the ways are
gone through.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .certificate import SCALE, Node, Tree
from .chain import Chain, Limits, dominated
from .listing import ways_below
from .neighbours import Chosen, Neighbours
from .points import SECOND, Bounds, Floats, Point
from .relaxation import Relaxation

MOST_NODES = 4_000
"""Parts of a chain's choices that are looked into before the search stops with what it has."""
WHOLE = 1e-6
"""A count this near to a whole number is taken for it."""
NEGLIGIBLE = 1e-9
"""A bound this near to the best score, as a share of it, promises nothing better."""
MOST_TRIED = 4
"""Counts by which a part is divided in thought, before it is divided by one of them."""
MOST_PARTS = 50_000
"""Parts of ways that are followed at the root, where its prices leave few open."""
MOST_PARTS_INSIDE = 3_000
"""The same, where the root is divided."""
MOST_PARTS_IN_ALL = 300_000
"""The same, of all that the proof asks to go through, a whole way counting as its layers; checking stops far above."""
SHARES = (0.25, 0.5, 1.0)
"""Of what the root's score is below the best that is known, up to which ways are followed, until one is found."""
STILL_TOO_WIDE = 0.7
"""Of a gap that left too many ways open: a narrower one is tried again."""
STUBBORN = 1_000
"""Parts after which HiGHS's own search for whole numbers is asked, which takes as long as they did."""
KNOWN = 2
"""Times that a count was divided, after which what that did is known well enough not to be tried again."""


MOMENTS = {"head": "loss", "update": "update", "forward": "forward pass", "backward": "backward pass"}


@dataclass(frozen=True, slots=True)
class Search:
    """What a search came to.

    Attributes:
        best: None if nothing better than the cutoff was found.
        bound_seconds: no choice within the limits scores less; infinite if there is none.
        tree: the proof of it.
    """

    best: Chosen | None
    bound_seconds: float
    tree: Tree


@dataclass(slots=True, order=True)
class _Open:
    """A part that may hold something better; where *point* is another part's, it is still to be looked into.

    Attributes:
        too_wide: seconds below the best that is known that leave too many ways open to go through.
    """

    score_seconds: float
    number: int
    point: Point = field(compare=False)
    bounds: Bounds = field(compare=False)
    seen: bool = field(compare=False, default=True)
    too_wide: float = field(compare=False, default=float("inf"))


class BranchAndBound:
    """The search in one *chain* within *limits*; its root is solved at once.

    Attributes:
        best: the best that was found so far.
    """

    def __init__(self, chain: Chain, limits: Limits) -> None:
        self.chain, self.limits = chain, limits
        self.best: Chosen | None = None
        self._dominated = tuple(tuple(dominated(group.choices)) for group in chain.groups)
        self._relaxation = Relaxation(chain, limits, self._dominated)
        self._neighbours = Neighbours(chain, limits, self._relaxation)
        self._nodes: list[Node] = []
        self._leaf_bounds: dict[int, float] = {}
        self._open: list[_Open] = []
        self._asked = False
        self._parts_left = MOST_PARTS_IN_ALL
        self._num_layers = sum(group.num_layers for group in chain.groups)
        columns = len(self._relaxation.columns)
        self._raised, self._times = np.zeros((2, columns)), np.zeros((2, columns))
        point = self._solved({})
        self._plain = point
        if point.score_seconds < float("inf"):
            point = self._relaxation.strengthened(point)
        self._root = point
        self._push(point, {})

    @property
    def bound_seconds(self) -> float:
        """The best that may still be."""
        return min(self._leaf_bounds.values())

    @property
    def root(self) -> Tree:
        """A proof of the bound that was known before anything was divided."""
        return Tree(nodes=(self._root.node,), dominated=self._dominated)

    def memory_price(self) -> tuple[float, str]:
        """Seconds of the score that a byte of memory is worth at the root, and what of the step needs it most."""
        prices = [price for price in self._plain.node.prices if price.row in MOMENTS]
        if not prices:
            return 0.0, "nothing"
        total = sum(price.amount for price in prices) / SCALE / SECOND
        return total, MOMENTS[max(prices, key=lambda price: price.amount).row]

    @property
    def proof(self) -> Tree:
        """The tree as it is now."""
        return Tree(nodes=tuple(self._nodes), dominated=self._dominated)

    def search(self, cutoff_seconds: float = float("inf"), most_nodes: int = MOST_NODES) -> Search:
        """Look for a choice that scores less than *cutoff_seconds*, until none can or there are *most_nodes*.

        May be called again, with another cutoff.
        """
        while self._open and len(self._nodes) < most_nodes:
            node = heapq.heappop(self._open)
            least = min(cutoff_seconds, self._best_seconds())
            if node.score_seconds < _worthwhile(least):
                self._look_near(node)
                if self._go_through(node, min(cutoff_seconds, self._best_seconds())):
                    heapq.heappush(self._open, node)
                    continue
                least = min(cutoff_seconds, self._best_seconds())
            if node.score_seconds >= _worthwhile(least):
                heapq.heappush(self._open, node)
                break
            if node.seen:
                self._divide(self._narrowed(node, least))
            else:
                self._look_into(node)
        found = self.best if self._best_seconds() < cutoff_seconds else None
        return Search(found, self.bound_seconds, self.proof)

    def _best_seconds(self) -> float:
        return float("inf") if self.best is None else self.best.taken.score_picoseconds / SECOND

    def _solved(self, bounds: Bounds) -> Point:
        point = self._relaxation.best(bounds)
        if point is None:  # HiGHS cannot say
            nothing = np.zeros(len(self._relaxation.columns))
            point = Point(0.0, nothing, nothing, Node())
        return point

    def _push(
        self, point: Point, bounds: Bounds, score_seconds: float | None = None, too_wide: float = float("inf")
    ) -> int:
        """A new part; with *score_seconds* one of which only that is known, and *point* is of what it is a part of."""
        score = point.score_seconds if score_seconds is None else score_seconds
        number = self._leaf(point, score)
        if score < float("inf"):
            seen = score_seconds is None
            heapq.heappush(self._open, _Open(score, number, point, bounds, seen=seen, too_wide=too_wide))
        return number

    def _leaf(self, point: Point, score_seconds: float) -> int:
        self._nodes.append(point.node)
        self._leaf_bounds[len(self._nodes) - 1] = score_seconds
        return len(self._nodes) - 1

    def _look_into(self, node: _Open) -> None:
        node.point, node.seen = self._solved(node.bounds), True
        node.score_seconds = node.point.score_seconds
        self._nodes[node.number] = node.point.node
        self._leaf_bounds[node.number] = node.score_seconds
        if node.score_seconds < float("inf"):
            heapq.heappush(self._open, node)

    def _go_through(self, node: _Open, cutoff_seconds: float) -> bool:
        """Raise *node*'s bound to *cutoff_seconds*, or to a better score that is found, if few ways are open below."""
        root = node.number == 0
        point = self._plain if root else node.point
        gap = cutoff_seconds - point.score_seconds
        if not node.seen or not gap < min(node.too_wide, float("inf")):
            return False
        for share in SHARES if root else SHARES[-1:]:
            most_parts = min(MOST_PARTS if root else MOST_PARTS_INSIDE, self._parts_left)
            below = cutoff_seconds if share == 1 else point.score_seconds + share * gap
            listed = ways_below(self._relaxation, point, node.bounds, below, most_parts)
            if listed is None:
                node.too_wide = STILL_TOO_WIDE * share * gap
                return False
            best, looked_at = self._neighbours.best_of(listed.counts, listed.score_seconds)
            if best is not None:
                self._keep(best)
            if share == 1 or (best is not None and best.taken.score_picoseconds < below * SECOND):
                self._parts_left -= listed.num_parts + looked_at * self._num_layers
                self._settle(node, point, best, below)
                return True
        return False

    def _settle(self, node: _Open, point: Point, best: Chosen | None, below_seconds: float) -> None:
        """Note that in *node* no way but *best*, which is known, scores less than it and *below_seconds*."""
        least = round(below_seconds * SECOND)
        if best is not None:
            least = min(least, best.taken.score_picoseconds)
        node.score_seconds = least / SECOND
        self._nodes[node.number] = replace(point.node, at_least_picoseconds=least)
        self._leaf_bounds[node.number] = node.score_seconds

    def _keep(self, chosen: Chosen) -> None:
        if self.best is None or chosen.taken.score_picoseconds < self.best.taken.score_picoseconds:
            self.best = chosen

    def _limits_of(self, node: _Open, column: int) -> tuple[int, int]:
        return node.bounds.get(column, (0, int(self._relaxation.layers[column])))

    def _narrowed(self, node: _Open, cutoff_seconds: float) -> _Open:
        """*node* without the counts that its point's prices alone show to be no better than *cutoff_seconds*."""
        least = node.point.score_seconds
        gap = cutoff_seconds - least
        if not gap < float("inf"):
            return node
        reduced = node.point.reduced_seconds
        for column in np.flatnonzero(np.abs(reduced) > gap / (2 * self._relaxation.layers)).tolist():
            fewest, most = self._limits_of(node, column)
            moves = int(gap / abs(reduced[column]))
            at_least, at_most = node.point.counts[column] < fewest + WHOLE, node.point.counts[column] > most - WHOLE
            score = least + (moves + 1) * abs(float(reduced[column]))
            if reduced[column] > 0 and at_least and fewest + moves < most:
                node = self._cut(node, column, fewest + moves, keeps_lower=True, score_seconds=score)
            elif reduced[column] < 0 and at_most and most - moves > fewest:
                node = self._cut(node, column, most - moves - 1, keeps_lower=False, score_seconds=score)
        return node

    def _cut(self, node: _Open, column: int, most: int, *, keeps_lower: bool, score_seconds: float) -> _Open:
        """Divide *node* where one child promises nothing better than *score_seconds*; the other is returned."""
        least, greatest = self._limits_of(node, column)
        lower, upper = {**node.bounds, column: (least, most)}, {**node.bounds, column: (most + 1, greatest)}
        kept, dropped = (lower, upper) if keeps_lower else (upper, lower)
        number = self._leaf(node.point, node.score_seconds)
        other = self._push(node.point, dropped, score_seconds, node.too_wide)
        self._branch(node.number, column, most, [number, other] if keeps_lower else [other, number])
        return _Open(node.score_seconds, number, node.point, kept, too_wide=node.too_wide)

    def _branch(self, number: int, column: int, most: int, children: list[int]) -> None:
        where = self._relaxation.columns[column]
        self._nodes[number] = Node(split=(where.group, where.choice, most), children=(children[0], children[1]))
        del self._leaf_bounds[number]

    def _divide(self, node: _Open) -> None:
        """Divide *node* by a count that is not whole, or by a choice whose own worst moment is not allowed for."""
        counts = node.point.counts
        rest = np.abs(counts - np.round(counts))
        if float(rest.max()) > WHOLE:
            column, sides = self._most_telling(node, rest)
        else:
            if self._neighbours.nearest(counts)[1].taken.within(self.limits):
                return  # nothing here scores less than this point, which can be chosen
            broken = self._relaxation.broken_choice(counts, node.bounds)
            column, most = (broken, 0) if broken is not None else self._unsettled(node)
            if column < 0:
                return
            sides = self._sides(node, column, most)
        children = [self._push(point, bounds, too_wide=node.too_wide) for bounds, point in sides]
        self._branch(node.number, column, sides[0][0][column][1], children)

    def _sides(self, node: _Open, column: int, most: int) -> list[tuple[Bounds, Point]]:
        """The two parts of *node* that have at most so many of *column*, and more."""
        least, greatest = self._limits_of(node, column)
        boxes = ({**node.bounds, column: (least, most)}, {**node.bounds, column: (most + 1, greatest)})
        return [(bounds, self._solved(bounds)) for bounds in boxes]

    def _most_telling(self, node: _Open, rest: Floats) -> tuple[int, list[tuple[Bounds, Point]]]:
        """The count whose division raises both parts' bounds most, by what earlier divisions did or by trial."""
        counts = node.point.counts
        chosen, best_merit, best_sides = -1, -1.0, None
        for column in np.argsort(-rest, kind="stable")[:MOST_TRIED].tolist():
            if rest[column] <= WHOLE:
                break
            most = int(np.floor(counts[column]))
            shares = (counts[column] - most, most + 1 - counts[column])
            sides = None
            if min(self._times[:, column]) >= KNOWN:
                rises = [self._raised[s, column] / self._times[s, column] * shares[s] for s in (0, 1)]
            else:
                sides = self._sides(node, column, most)
                rises = [point.score_seconds - node.score_seconds for _, point in sides]
                for side, rise in enumerate(rises):
                    if rise < float("inf"):
                        self._raised[side, column] += rise / shares[side]
                        self._times[side, column] += 1
            merit = max(rises[0], 1e-9) * max(rises[1], 1e-9)
            if merit > best_merit:
                chosen, best_merit, best_sides = column, merit, sides
        if best_sides is None:
            best_sides = self._sides(node, chosen, int(np.floor(counts[chosen])))
        return chosen, best_sides

    def _unsettled(self, node: _Open) -> tuple[int, int]:
        """A column whose count is not settled in *node*, and where to divide it; -1 if there is none."""
        for column in np.argsort(-node.point.counts, kind="stable").tolist():
            count = round(float(node.point.counts[column]))
            least, most = self._limits_of(node, column)
            if least < most:
                return column, count - 1 if count > least else count
        return -1, 0

    def _look_near(self, node: _Open) -> None:
        """Keep the best of the whole choices near the best point of *node*; at the root with more effort."""
        for chosen in self._near(node):
            self._keep(chosen)

    def _near(self, node: _Open) -> Iterator[Chosen]:
        if not node.seen:
            return
        if node.number == 0:
            yield from self._neighbours.around(node.point.counts)
            return
        _, chosen = self._neighbours.nearest(node.point.counts)
        if chosen.taken.within(self.limits):
            yield chosen
        if len(self._nodes) >= STUBBORN and not self._asked:
            self._asked = True
            whole = self._relaxation.whole_counts({})
            yield from () if whole is None else self._neighbours.around(whole.astype(np.float64))


def _worthwhile(score_seconds: float) -> float:
    """What is less than this is better than a score by enough to tell; where harm has prices, one may be below zero."""
    return score_seconds * (1 - NEGLIGIBLE if score_seconds > 0 else 1 + NEGLIGIBLE)


def solve(chain: Chain, limits: Limits, most_nodes: int = MOST_NODES) -> Search:
    """The best choice for *chain* within *limits*, with its proof."""
    return BranchAndBound(chain, limits).search(most_nodes=most_nodes)
