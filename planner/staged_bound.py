"""What every cut of a model into stages takes at least, by a plan's own tables; nothing of the search is used.

Whatever stage is the slowest, a step takes its micro-batch's time as often as there are micro-batches and every other
stage's once. So for each stage and stretch of layers let ``once`` and ``often`` be no more than the time and penalties
of one micro-batch, and of that many. A cut takes at least the sum of its stages' ``once`` and the largest rise from
there to ``often``. Both follow from prices of memory: whatever each layer gets, what its stage takes is at least the
sum of its layers' cheapest choices, each at its seconds and its priced bytes, less the price of the stage's room, and
of what it may send to the host (Lagrange's bound). The least over all cuts is a shortest path. All is whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

from .chain import Choice
from .needs import Unproven
from .proof import Proof
from .staged_cell import SIDES, StagedCell
from .staged_tables import layers_of

Least = list[list[int | None]]
"""For layers i up to j; None where they do not fit."""


def bound(proof: Proof, staged: StagedCell) -> int | None:
    """What every cut of a cell within the budget scores at least; None if none is."""
    layers = layers_of(proof, staged)
    if not layers or staged.num_stages != len(staged.fixed_bytes):
        raise Unproven("a cell does not say what each of its stages holds")
    stages, weight = range(staged.num_stages), staged.num_micro_batches
    often = [_least(staged, stage, layers, proof.budget_bytes, proof.host_bytes, weight) for stage in stages]
    once = [_least(staged, stage, layers, proof.budget_bytes, proof.host_bytes, 1) for stage in stages]
    rises = [_rise(*pair) for pair in zip(once, often, strict=True)]
    update = staged.update_picoseconds * -(-len(layers) // staged.num_stages)
    flattest = _flattest(rises, len(layers))
    if flattest is None:
        return None
    best: int | None = None
    most: int | None = flattest
    is_first = True
    while True:
        found = _shortest(once, rises, len(layers), most)
        if found is None or (best is not None and found[0] + flattest >= best):
            break
        total, top = found
        best = total + top if best is None else min(best, total + top)
        most, is_first = None if is_first else top - 1, False
    return None if best is None else best + update


def _rise(once: Least, often: Least) -> Least:
    """By how much *often* is more than *once*."""
    rows = (zip(a, b, strict=True) for a, b in zip(once, often, strict=True))
    return [[None if a is None or b is None else max(0, b - a) for a, b in row] for row in rows]


def _flattest(rises: Sequence[Least], num_layers: int) -> int | None:
    """The largest of *rises* in the cut where it is the least; None where there is no cut."""
    level: list[int | None] = [0, *[None] * num_layers]
    for rise in rises:
        after: list[int | None] = [None] * (num_layers + 1)
        for first, before in enumerate(level):
            if before is None:
                continue
            for last in range(first + 1, num_layers + 1):
                own, known = rise[first][last], after[last]
                if own is None:
                    continue
                if known is None or max(before, own) < known:
                    after[last] = max(before, own)
        level = after
    return level[-1]


def _shortest(
    once: Sequence[Least], rises: Sequence[Least], num_layers: int, most: int | None
) -> tuple[int, int] | None:
    """The least sum of *once* over all cuts with no rise of more than *most*, and that cut's largest rise."""
    level: list[tuple[int, int] | None] = [(0, 0), *[None] * num_layers]
    for least, rise in zip(once, rises, strict=True):
        after: list[tuple[int, int] | None] = [None] * (num_layers + 1)
        for first, before in enumerate(level):
            if before is None:
                continue
            for last in range(first + 1, num_layers + 1):
                own, more = least[first][last], rise[first][last]
                if own is None or more is None or (most is not None and more > most):
                    continue
                reached, known = (before[0] + own, max(before[1], more)), after[last]
                if known is None or reached < known:
                    after[last] = reached
        level = after
    return level[-1]


def _least(
    staged: StagedCell,
    stage: int,
    layers: Sequence[Sequence[Choice]],
    memory_bytes: int,
    host_bytes: int | None,
    weight: int,
) -> Least:
    """For each stretch of layers as a stage what *weight* micro-batches and the penalties come to at least.

    It depends on how many layers of each kind there are, and is computed once for each such number.
    """
    others = staged.in_flight(stage) - 1
    kinds = list(dict.fromkeys(map(tuple, layers)))
    kind_of = [kinds.index(tuple(choices)) for choices in layers]
    needs = [
        [choice.resident_bytes + (others + 1) * (choice.forward_change_bytes + choice.release_bytes) for choice in kind]
        for kind in kinds
    ]
    room = memory_bytes - staged.outside_bytes(stage) - _moment(staged, stage, kinds)
    sent = [[(others + 1) * choice.host_bytes for choice in kind] for kind in kinds]
    priced: list[tuple[int, Fraction, list[Fraction]]] = []
    for side in SIDES:
        costs = [[weight * getattr(c, side) + c.penalty_picoseconds for c in kind] for kind in kinds]
        outside = weight * staged.outside_picoseconds(stage, side)
        for price, host_price in _prices(needs, costs, sent, host_bytes):
            values = [
                min(cost + price * need + host_price * host for cost, need, host in zip(*rows, strict=True))
                for rows in zip(costs, needs, sent, strict=True)
            ]
            priced.append((outside, price * room + host_price * (host_bytes or 0), values))
    least = [min(need) for need in needs]
    staying, spared = _staying(needs, sent)
    known: dict[tuple[int, ...], int | None] = {}

    def shown(counts: tuple[int, ...]) -> int | None:
        if counts not in known:
            fits = sum(n * low for n, low in zip(counts, least, strict=True)) <= room
            if host_bytes is not None and staying is not None:  # what the host does not take stays
                stays = sum(n * low for n, low in zip(counts, staying, strict=True))
                fits = fits and stays - spared * host_bytes <= room
            known[counts] = (
                max(
                    floor(sum(n * v for n, v in zip(counts, values, strict=True)) - left) + outside
                    for outside, left, values in priced
                )
                if fits
                else None
            )
        return known[counts]

    found: Least = [[None] * (len(layers) + 1) for _ in range(len(layers) + 1)]
    for first in range(len(layers)):
        counts = [0] * len(kinds)
        for last in range(first, len(layers)):
            counts[kind_of[last]] += 1
            found[first][last + 1] = shown(tuple(counts))
    return found


def _moment(staged: StagedCell, stage: int, kinds: Sequence[Sequence[Choice]]) -> int:
    """What is allocated at least beyond the layers' shares once all are through their forward pass."""
    back = min(choice.backward_high_bytes for kind in kinds for choice in kind)
    if stage < staged.num_stages - 1:
        return back
    return max(staged.head_high_bytes, staged.head_change_bytes + back)


def _staying(needs: Sequence[Sequence[int]], sent: Sequence[Sequence[int]]) -> tuple[list[int] | None, Fraction]:
    """What each kind of layer needs at least with nothing sent to the host; and what each byte there spares at most."""
    staying = [[need for need, host in zip(*rows, strict=True) if not host] for rows in zip(needs, sent, strict=True)]
    if not all(staying):
        return None, Fraction(0)
    least = [min(need) for need in staying]
    spared = [
        Fraction(low - need, host)
        for low, *rows in zip(least, needs, sent, strict=True)
        for need, host in zip(*rows, strict=True)
        if host
    ]
    return least, max([Fraction(0), *spared])


def _prices(
    needs: Sequence[Sequence[int]],
    costs: Sequence[Sequence[int]],
    sent: Sequence[Sequence[int]],
    host_bytes: int | None,
) -> list[tuple[Fraction, Fraction]]:
    """Prices of a byte of memory and of one of the host; any give a bound.

    Of memory those at which two choices of a layer are as good; of the host none, and that at which it gains nothing.
    """
    alone = {Fraction(0)}
    for need, cost, host in zip(needs, costs, sent, strict=True):
        alone |= _slopes(need, cost)
        alone |= _slopes(*([v for v, h in zip(values, host, strict=True) if not h] for values in (need, cost)))
    found = [(price, Fraction(0)) for price in alone]
    for price in alone if host_bytes is not None else ():
        gains = [Fraction(0)]
        for rows in zip(needs, costs, sent, strict=True):
            values = [(cost + price * need, host) for need, cost, host in zip(*rows, strict=True)]
            staying = [value for value, host in values if not host]
            if not staying:
                break
            gains += [(min(staying) - value) / host for value, host in values if host]
        else:
            found.append((price, max(gains)))
    return found


def _slopes(needs: Sequence[int], costs: Sequence[int]) -> set[Fraction]:
    """What a byte costs along the lower hull of *costs* over *needs*."""
    found: set[Fraction] = set()
    best = sorted(zip(needs, costs, strict=True))
    while best:
        lean = best[0]
        slopes = [(Fraction(lean[1] - c, n - lean[0]), n, c) for n, c in best[1:] if n > lean[0] and c < lean[1]]
        if not slopes:
            break
        steepest = max(slopes)
        found.add(steepest[0])
        best = [pair for pair in best if pair[0] >= steepest[1] and pair[1] <= steepest[2]]
    return found
