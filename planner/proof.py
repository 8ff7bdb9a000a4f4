"""The proof that a plan carries: tables of what every strategy takes, prices per cell, and what they show.

Reading it needs the proof alone. It shares no code with the search but the values that both speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, get_args

from .bounds import Int, Meta
from .certificate import Node, Tree, lower_bound
from .chain import Chain, Choice, Group, Limits
from .needs import Price, Row, Unproven, Whole
from .open_ways import OpenWays
from .reckoning import Reckoned, reckoned
from .staged_cell import StagedCell
from .strategies import MOST_LAYERS, Cell, Configuration, Strategy

Status = Literal["optimal", "within", "feasible"]
OPTIMAL_GAP = 1e-6
"""A bound this near to the score, as a share of it, says that there is nothing better."""

NUMBERS = tuple(field.name for field in fields(Choice) if field.name != "strategy")
ROWS: tuple[Row, ...] = get_args(Row)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGroup:
    """Consecutive layers that are alike.

    Attributes:
        choices: for each strategy that they may be given, its number, and what it takes: NUMBERS.
    """

    num_layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    choices: tuple[tuple[Int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellProof:
    """That nothing in *cell* scores less than its bound.

    Attributes:
        table: number of the cell's table.
        outside: what the step takes outside the layers, as a Chain has it.
        memory_bytes: how much may be allocated by composition: the budget, less what traced steps were fragmented by.
        nodes: the tree, one row of numbers a node: ``0, group, choice, most, child, child`` divides;
            ``1 or 2, device share`` and its prices prove, 2 that nothing is within the limits;
            ``3, device share, picoseconds`` and its prices, that what they leave open scores no less. A price is
            ``row, group + 1, choice + 1, amount, divisor or 0``, and with a divisor one reference a group.
        dominated: for every group and choice the number of a choice that is no worse, or -1.
    """

    cell: Cell
    table: Whole
    outside: tuple[Int, ...]
    memory_bytes: Int
    nodes: tuple[tuple[Int, ...], ...]
    dominated: tuple[tuple[Int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """How good a plan is shown to be.

    Attributes:
        gap: by how much of its score the plan might be beaten in the cells as they are; *unfragmented_gap*: had no
            step any fragmentation.
        score_picoseconds: the plan's step, and what its coarser weights are held to be worth.
        harm, host_bytes, step_picoseconds: limits, where there are any.
        unfragmented: of cells whose memory was cut, a bound on what they held before.
        harms: for each layer its own harm under each of the strategies, where that was measured; the tables' harms are
            prices then, and the same for all layers of a group.
        harm_price: what a unit of harm is held to be worth, in picoseconds; of a plan in stages only where the tables
            have another price, see ``staged_limits``.
        staged: the cells of a plan whose model is cut, of which the bounds are computed and no others are spoken of.
    """

    status: Status
    gap: Annotated[float, Meta(ge=0)]
    unfragmented_gap: Annotated[float, Meta(ge=0)]
    score_picoseconds: Whole
    bound_picoseconds: Whole
    budget_bytes: Whole
    harm: Whole | None
    host_bytes: Whole | None
    step_picoseconds: Whole | None
    strategies: tuple[Strategy, ...]
    tables: tuple[tuple[TableGroup, ...], ...]
    cells: tuple[CellProof, ...]
    unfragmented: tuple[CellProof, ...]
    harms: tuple[tuple[Whole, ...], ...] = ()
    harm_price: Whole = 0
    staged: tuple[StagedCell, ...] = ()


_OUTSIDE = tuple(
    field.name for field in fields(Chain) if field.name not in ("groups", "gradient_accumulation_steps", "harm_price")
)


class Tables:
    """The tables of many chains, each kept once."""

    def __init__(self) -> None:
        self.strategies: list[Strategy] = []
        self.tables: list[tuple[TableGroup, ...]] = []
        self._known: dict[tuple[Group, ...], int] = {}

    def cell(self, cell: Cell, chain: Chain, memory_bytes: int, tree: Tree) -> CellProof:
        """The proof of one cell as a plan carries it."""
        return CellProof(
            cell=cell,
            table=self.table(chain.groups),
            outside=tuple(getattr(chain, name) for name in _OUTSIDE),
            memory_bytes=memory_bytes,
            nodes=tuple(_node_row(node) for node in tree.nodes),
            dominated=tuple(tuple(-1 if by is None else by for by in group) for group in tree.dominated),
        )

    def table(self, groups: tuple[Group, ...]) -> int:
        """The number of the table of *groups*."""
        if groups not in self._known:
            self._known[groups] = len(self.tables)
            self.tables.append(tuple(self._group(group) for group in groups))
        return self._known[groups]

    def _group(self, group: Group) -> TableGroup:
        for choice in group.choices:
            if choice.strategy not in self.strategies:
                self.strategies.append(choice.strategy)
        rows = [
            (self.strategies.index(choice.strategy), *(getattr(choice, name) for name in NUMBERS))
            for choice in group.choices
        ]
        return TableGroup(num_layers=group.num_layers, choices=tuple(rows))


def _node_row(node: Node) -> tuple[int, ...]:
    if node.split is not None and node.children is not None:
        return (0, *node.split, *node.children)
    row = [2 if node.infeasible else 1, node.device_share]
    if node.at_least_picoseconds is not None:
        row = [3, node.device_share, node.at_least_picoseconds]
    for price in node.prices:
        group, choice = (0 if number is None else number + 1 for number in (price.group, price.choice))
        row += [ROWS.index(price.row), group, choice, price.amount, price.divisor or 0, *price.references]
    return tuple(row)


def _node(row: Sequence[int], num_groups: int) -> Node:
    """The inverse of ``_node_row``; Unproven where *row* is none."""
    if row and row[0] == 0 and len(row) == 6:
        return Node(split=(row[1], row[2], row[3]), children=(row[4], row[5]))
    facts = {1: 2, 2: 2, 3: 3}.get(row[0], 0) if row else 0
    if not facts or len(row) < facts or row[1] < 0:
        raise Unproven("a node is neither a division nor a leaf")
    prices: list[Price] = []
    rest = list(row[facts:])
    while rest:
        if len(rest) < 5 or not 0 <= rest[0] < len(ROWS) or min(rest[1:5]) < 0:
            raise Unproven("a price is none")
        kind, group, choice, amount, divisor = rest[:5]
        references = tuple(rest[5 : 5 + num_groups]) if divisor else ()
        if divisor and (len(references) != num_groups or min(references) < 0):
            raise Unproven("a price that divides lacks references")
        del rest[: 5 + len(references)]
        prices.append(
            Price(
                row=ROWS[kind],
                amount=amount,
                group=group - 1 if group else None,
                choice=choice - 1 if choice else None,
                divisor=divisor or None,
                references=references,
            )
        )
    least = row[2] if row[0] == 3 else None
    return Node(device_share=row[1], prices=tuple(prices), infeasible=row[0] == 2, at_least_picoseconds=least)


def unproved(cell: CellProof) -> CellProof:
    """*cell* without its tree: that nothing scores less than each layer's cheapest choice, which needs no proof."""
    dominated = tuple((-1,) * len(group) for group in cell.dominated)
    return replace(cell, nodes=(_node_row(Node()),), dominated=dominated)


def chain_of(proof: Proof, cell: CellProof) -> Chain:
    """The chain that *cell*'s part of *proof* is about; Unproven where the tables do not hold one."""
    if cell.table >= len(proof.tables):
        raise Unproven(f"there is no table {cell.table}")
    groups: list[Group] = []
    for group in proof.tables[cell.table]:
        for row in group.choices:
            if len(row) != 1 + len(NUMBERS) or not 0 <= row[0] < len(proof.strategies):
                raise Unproven("a row of a table is not what a strategy takes")
        choices = tuple(
            Choice(strategy=proof.strategies[row[0]], **dict(zip(NUMBERS, row[1:], strict=True)))
            for row in group.choices
        )
        if not choices:
            raise Unproven("a group of layers has no choices")
        beyond = _harm_beyond(proof, sum(g.num_layers for g in groups), group)
        groups.append(Group(num_layers=group.num_layers, choices=choices, harm_beyond=beyond))
    if proof.harms and len(proof.harms) != sum(group.num_layers for group in groups):
        raise Unproven(f"{len(proof.harms)} layers have a harm of their own, the tables another number")
    if len(cell.outside) != len(_OUTSIDE):
        raise Unproven("a cell does not say what its step takes outside the layers")
    outside = dict(zip(_OUTSIDE, cell.outside, strict=True))
    return Chain(
        groups=tuple(groups),
        gradient_accumulation_steps=cell.cell.gradient_accumulation_steps,
        harm_price=proof.harm_price,
        **outside,
    )


def _harm_beyond(proof: Proof, first: int, group: TableGroup) -> int:
    """What the layers of *group*, from number *first* on, lose beyond its table's harms, whatever each of them gets.

    Whoever adds this to a bound by the table's harms has one by the layers' own: each layer's own harm is its table's
    and a difference, which is no less than the least of that layer's differences.
    """
    if not proof.harms:
        return 0
    harm, penalty = (1 + NUMBERS.index(name) for name in ("harm", "penalty_picoseconds"))
    if any(row[penalty] != proof.harm_price * row[harm] for row in group.choices):
        raise Unproven("a penalty in a table is not its harm at the price of harm")
    layers = proof.harms[first : first + group.num_layers]
    if any(len(own) != len(proof.strategies) for own in layers):
        raise Unproven("a layer's own harms are not one for each strategy")
    return sum(min(own[row[0]] - row[harm] for row in group.choices) for own in layers)


def bound(proof: Proof, cell: CellProof, opened: OpenWays | None = None) -> int | None:
    """What everything in *cell* scores at least, in picoseconds; None if nothing there is within the limits.

    What is gone through counts together with all else that was with the same *opened*.

    Raises:
        Unproven: the proof shows less than that.
    """
    chain = chain_of(proof, cell)
    nodes = tuple(_node(row, len(chain.groups)) for row in cell.nodes)
    dominated = tuple(tuple(None if by < 0 else by for by in group) for group in cell.dominated)
    return lower_bound(chain, limits(proof, cell), Tree(nodes=nodes, dominated=dominated), opened)


def limits(proof: Proof, cell: CellProof) -> Limits:
    """Those that *cell* was searched within."""
    return Limits(
        memory_bytes=cell.memory_bytes,
        harm=proof.harm,
        host_bytes=proof.host_bytes,
        step_picoseconds=proof.step_picoseconds,
    )


def weigh(proof: Proof, configuration: Configuration) -> tuple[CellProof, Reckoned]:
    """The cell of *configuration*, and what it takes.

    Raises:
        Unproven: the proof does not speak of it.
    """
    cell = next((cell for cell in proof.cells if cell.cell == configuration.cell), None)
    if cell is None:
        raise Unproven("the proof does not speak of the plan's own micro-batch, rank and loss")
    chain = chain_of(proof, cell)
    strategies = configuration.strategies()
    if len(strategies) != sum(group.num_layers for group in chain.groups):
        raise Unproven(f"the plan has {len(strategies)} layers, its proof another number")
    layers: list[Choice] = []
    for group in chain.groups:
        for strategy in strategies[len(layers) : len(layers) + group.num_layers]:
            found = next((choice for choice in group.choices if choice.strategy == strategy), None)
            if found is None:
                raise Unproven(f"the proof does not speak of {strategy}")
            layers.append(_own(proof, len(layers), found))
    if proof.harms:  # the layers' own, beyond which there is nothing
        chain = replace(chain, groups=tuple(replace(group, harm_beyond=0) for group in chain.groups))
    return cell, reckoned(chain, layers)


def _own(proof: Proof, layer: int, choice: Choice) -> Choice:
    """*choice* with the harm that it does to this *layer*."""
    if not proof.harms:
        return choice
    harm = proof.harms[layer][proof.strategies.index(choice.strategy)]
    return replace(choice, harm=harm, penalty_picoseconds=proof.harm_price * harm)


def gap(score_picoseconds: int, bounds: Sequence[int | None]) -> float:
    """By how much of its score something else might be better, where every part of the space has one of *bounds*."""
    least = min((bound for bound in bounds if bound is not None), default=score_picoseconds)
    return max(0.0, 1 - least / score_picoseconds)
