"""One chain's problem without whole numbers, as a linear program for HiGHS that is solved again box by box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import highspy
import numpy as np
import numpy.typing as npt

from .certificate import SCALE, Node
from .chain import Chain, Counts, Limits, backward_order
from .needs import Price, Row
from .points import SECOND, Bounds, Column, Floats, Point, Priced
from .rounding import Rounded, rounded_limits

PASSES: tuple[Row, ...] = ("forward", "backward")
MIB = float(2**20)
VIOLATED_MIB = 1e-8
WHOLE = 1e-6
"""A count this near to a whole number is taken for it."""
MOST_ROUNDINGS = 12
MOST_ROUNDED = 6
"""Limits that are made stronger at once."""
LEAST_GAIN = 1e-7
MOST_COLUMNS = 400
"""Of a chain for which HiGHS looks for whole numbers, in MOST_WHOLE_NODES parts of its own."""
MOST_WHOLE_NODES = 50
FEASIBLE = 2
"""HiGHS's number for a solution that satisfies everything."""
LARGEST_PRICES = 2.0**60
"""The sum of those that show a part to be infeasible; readers of JSON know whole numbers of 64 bits."""
MOST_ROUNDS = 50
"""Of adding the rows that a solution breaks."""


class _Silent(highspy.Highs):  # type: ignore[misc]
    def enableCallbacks(self) -> None:  # noqa: N802  (prints a banner on the way)
        self.silent()
        super().enableCallbacks()


class Relaxation:
    """The linear program of *chain*; rows come in when a solution breaks them."""

    def __init__(self, chain: Chain, limits: Limits, dominated: Sequence[Sequence[int | None]]) -> None:
        self.chain, self.limits = chain, limits
        self.columns = [
            Column(g, c, choice)
            for g, group in enumerate(chain.groups)
            for c, choice in enumerate(group.choices)
            if dominated[g][c] is None
        ]
        self._place = {(column.group, column.choice): i for i, column in enumerate(self.columns)}
        self.group = np.array([column.group for column in self.columns])
        self.layers = np.array([chain.groups[column.group].num_layers for column in self.columns], dtype=np.float64)
        self.device_seconds, self.host_seconds = self._seconds("device_picoseconds"), self._seconds("host_picoseconds")
        self.penalty_seconds = self._seconds("penalty_picoseconds")
        self._resident = self._bytes("resident_bytes")
        self._forward = self._bytes("forward_change_bytes")
        self._through = self._resident + self._forward + self._bytes("release_bytes")
        self._back = self._bytes("backward_change_bytes")
        self._forward_high = self._bytes("forward_high_bytes")
        self._back_high = self._bytes("backward_high_bytes")
        self._room = (limits.memory_bytes - chain.fixed_bytes) / MIB
        self._before = [self._ranks(g) for g in range(len(chain.groups))]
        self._rows: dict[tuple[Row, int | None, int | None], int] = {}
        self._strong: dict[int, tuple[Price, float]] = {}
        self._upper: dict[int, float] = {}
        self._needs: dict[int, Floats] = {}
        self._most: dict[int, float] = {}  # of what a row limits, in the present box
        self._idle: set[int] = set()  # rows of choices that the present box need not make
        self._model = self._program()

    def best(self, bounds: Bounds) -> Point | None:
        """The best point where every column is within *bounds*; None if HiGHS cannot say."""
        count, model = len(self.columns), self._model
        lower, upper = self.box(bounds)
        model.changeColsBounds(count, np.arange(count, dtype=np.int32), lower, upper)
        self._settle_rows(lower, upper)
        for _ in range(MOST_ROUNDS):
            model.run()
            status = model.getModelStatus()
            if status == highspy.HighsModelStatus.kInfeasible:
                return self._nothing()
            if status != highspy.HighsModelStatus.kOptimal:
                return None
            solution = model.getSolution()
            counts = np.array(solution.col_value[:count])
            if not self._add_broken(counts, lower, upper):
                break
        outside = (self.chain.update_picoseconds + self.chain.penalty_beyond_picoseconds) / SECOND
        prices = -np.array(solution.row_dual)
        reduced = np.array(solution.col_dual[:count])
        return Point(
            model.getObjectiveValue() + outside, counts, reduced, self._leaf(prices), tuple(self._priced(prices))
        )

    def box(self, bounds: Bounds) -> tuple[Floats, Floats]:
        """How often each column's choice is made within *bounds*, least and most."""
        lower, upper = np.zeros(len(self.columns)), self.layers.copy()
        for column, (least, most) in bounds.items():
            lower[column], upper[column] = least, most
        return lower, upper

    def _priced(self, prices: Floats) -> Iterator[Priced]:
        for index, needs in self._needs.items():
            if index not in self._idle and prices[index] > 0:
                yield Priced(needs, self._most[index], float(prices[index]))

    def _settle_rows(self, lower: Floats, upper: Floats) -> None:
        """The limits of moments that depend on which choices must or may be made."""
        for (row, group, choice), index in self._rows.items():
            if group is not None and choice is None and self.chain.groups[group].num_layers > 1:
                self._most[index] = self._alone(row, group, upper)[1]
                self._model.changeRowBounds(index, -highspy.kHighsInf, self._most[index])
            if group is not None and choice is not None:
                there = lower[self._place[group, choice]] >= 1
                self._model.changeRowBounds(
                    index, -highspy.kHighsInf, self._upper[index] if there else highspy.kHighsInf
                )
                (self._idle.discard if there else self._idle.add)(index)

    def whole_counts(self, bounds: Bounds) -> npt.NDArray[np.int64] | None:
        """What HiGHS's own search for whole numbers finds within *bounds*, by the limits that it knows of."""
        if len(self.columns) > MOST_COLUMNS:
            return None
        count, model = len(self.columns), self._model
        numbers = np.arange(count, dtype=np.int32)
        lower, upper = self.box(bounds)
        model.changeColsBounds(count, numbers, lower, upper)
        self._settle_rows(lower, upper)
        search = _Silent()
        for option, value in {"threads": 1, "mip_max_nodes": MOST_WHOLE_NODES, "mip_rel_gap": 1e-7}.items():
            search.setOptionValue(option, value)
        search.passModel(model.getLp())
        search.changeColsIntegrality(count, numbers, np.full(count, highspy.HighsVarType.kInteger))
        search.run()
        if search.getInfo().primal_solution_status != FEASIBLE:
            return None
        whole: npt.NDArray[np.int64] = np.round(search.getSolution().col_value[:count]).astype(np.int64)
        return whole

    def strengthened(self, point: Point) -> Point:
        """*point*, the best without bounds, again after limits that counts so divided break are made stronger."""
        for _ in range(MOST_ROUNDINGS):
            if point.score_seconds == float("inf") or not self._add_rounded(point):
                break
            better = self.best({})
            if better is None or better.score_seconds < point.score_seconds * (1 + LEAST_GAIN):
                break
            point = better
        return point

    def _add_rounded(self, point: Point) -> bool:
        """Add what rounding makes of the limits that have a price, where *point* breaks it."""
        parts = np.flatnonzero(np.abs(point.counts - np.round(point.counts)) > WHOLE)
        inside = [np.flatnonzero(self.group == number) for number in range(len(self.chain.groups))]
        references = tuple(self.columns[where[np.argmax(point.counts[where])]].choice for where in inside)
        divided = [(self.columns[part].group, self.columns[part].choice) for part in parts]
        found: list[tuple[float, Rounded, Floats]] = []
        for strong in rounded_limits(self.chain, self.limits, point.node.prices, references, divided):
            values = np.array([strong.needs[c.group][c.choice] / strong.unit for c in self.columns])
            excess = float(values @ point.counts) - strong.limit / strong.unit
            if excess > VIOLATED_MIB:
                found.append((excess, strong, values))
        for _, strong, values in sorted(found, key=lambda item: -item[0])[:MOST_ROUNDED]:
            index = self._model.getNumRow()
            where = np.flatnonzero(values).astype(np.int32)
            self._model.addRow(-highspy.kHighsInf, strong.limit / strong.unit, len(where), where, values[where])
            self._strong[index] = (strong.price, strong.unit)
            self._needs[index], self._most[index] = values, strong.limit / strong.unit
        return bool(found)

    def broken_choice(self, counts: Floats, bounds: Bounds) -> int | None:
        """A column that is partly used in a group of several layers, and whose worst moment is then too much."""
        for index, column in enumerate(self.columns):
            used = counts[index] > 1e-9 and bounds.get(index, (0, 0))[0] < 1
            if used and self.layers[index] > 1:
                for row in PASSES:
                    needs, limit = self._together(row, column.group, column.choice)
                    if float(needs @ counts) > limit + VIOLATED_MIB:
                        return index
        return None

    def as_counts(self, counts: npt.NDArray[np.int64]) -> Counts:
        """Whole *counts* of the columns, by group and choice."""
        found = [[0] * len(group.choices) for group in self.chain.groups]
        for column, count in zip(self.columns, counts.tolist(), strict=True):
            found[column.group][column.choice] = count
        return tuple(tuple(row) for row in found)

    def _bytes(self, name: str) -> Floats:
        return np.array([getattr(column.value, name) for column in self.columns], dtype=np.float64) / MIB

    def _seconds(self, name: str) -> Floats:
        return np.array([getattr(column.value, name) for column in self.columns], dtype=np.float64) / SECOND

    def _ranks(self, group: int) -> dict[int, int]:
        """When a group's backward pass meets each of its choices."""
        choices = self.chain.groups[group].choices
        return {choice: rank for rank, choice in enumerate(backward_order(choices))}

    def _program(self) -> highspy.Highs:
        chain, count = self.chain, len(self.columns)
        model = _Silent()
        model.setOptionValue("presolve", "off")  # or an infeasible program leaves no proof of it
        model.setOptionValue("threads", 1)
        model.setOptionValue("primal_feasibility_tolerance", 1e-9)
        model.addVars(count + 1, np.zeros(count + 1), np.append(self.layers, highspy.kHighsInf))
        costs = np.append(self.penalty_seconds, chain.gradient_accumulation_steps)
        model.changeColsCost(count + 1, np.arange(count + 1, dtype=np.int32), costs)
        for number, group in enumerate(chain.groups):
            inside = np.flatnonzero(self.group == number).astype(np.int32)
            model.addRow(group.num_layers, group.num_layers, len(inside), inside, np.ones(len(inside)))
        self._model = model
        device, host = self.device_seconds, self.host_seconds
        self._first_time_row = len(chain.groups)
        for seconds, outside in ((device, chain.device_picoseconds), (host, chain.host_picoseconds)):
            values, where = np.append(seconds, -1.0), np.arange(count + 1, dtype=np.int32)
            model.addRow(-highspy.kHighsInf, -outside / SECOND, count + 1, where, values)
        head = self._room - chain.head_high_bytes / MIB
        self._add(("head", None, None), self._through, head)
        update = self._room - (chain.head_change_bytes + chain.update_high_bytes) / MIB
        self._add(("update", None, None), self._through + self._back, update)
        limits = self.limits
        if limits.harm is not None:
            self._add(("harm", None, None), self._bytes("harm"), (limits.harm - chain.harm_beyond) / MIB)
        if limits.host_bytes is not None:
            self._add(("host", None, None), self._bytes("host_bytes"), limits.host_bytes / MIB)
        if limits.step_picoseconds is not None:
            micro = (limits.step_picoseconds - chain.update_picoseconds) // chain.gradient_accumulation_steps
            self._add(("device time", None, None), device, (micro - chain.device_picoseconds) / SECOND)
            self._add(("host time", None, None), host, (micro - chain.host_picoseconds) / SECOND)
        return model

    def _add(self, key: tuple[Row, int | None, int | None], values: Floats, limit: float) -> None:
        where = np.flatnonzero(values).astype(np.int32)
        self._rows[key] = index = self._model.getNumRow()
        self._upper[index] = self._most[index] = limit
        self._needs[index] = values
        self._model.addRow(-highspy.kHighsInf, limit, len(where), where, values[where])

    def _add_broken(self, counts: Floats, lower: Floats, upper: Floats) -> bool:
        """Add the rows that *counts* break: the worst moments of single layers, and of choices that are there."""
        broken: list[tuple[float, tuple[Row, int | None, int | None], Floats, float]] = []
        for number, group in enumerate(self.chain.groups):
            at: list[int | None] = [None]
            if group.num_layers > 1:
                at += [self.columns[i].choice for i in np.flatnonzero((self.group == number) & (lower >= 1))]
            for row, choice in ((row, choice) for row in PASSES for choice in at):
                if (row, number, choice) in self._rows:
                    continue
                if choice is None:
                    needs, limit = self._alone(row, number, upper)
                else:
                    needs, limit = self._together(row, number, choice)
                excess = float(needs @ counts) - limit
                if excess > VIOLATED_MIB:
                    broken.append((excess, (row, number, choice), needs, limit))
        for _, key, needs, limit in sorted(broken, key=lambda item: -item[0])[:4]:
            self._add(key, needs, limit)
        return bool(broken)

    def _alone(self, row: Row, group: int, upper: Floats) -> tuple[Floats, float]:
        """The worst moment of the first layer of *group* that a pass comes to, where *upper* bounds the counts."""
        inside = self.group == group
        if row == "forward":
            needs = self._resident + np.where(self.group < group, self._forward, 0.0)
            highs, limit = self._forward_high, self._room
        else:
            needs = self._through + np.where(self.group > group, self._back, 0.0)
            highs, limit = self._back_high, self._room - self.chain.head_change_bytes / MIB
        if self.chain.groups[group].num_layers == 1:
            return needs + np.where(inside, highs, 0.0), limit
        may_be = highs[inside & (upper >= 1)]
        return needs, limit - (float(may_be.min()) if may_be.size else 0.0)

    def _together(self, row: Row, group: int, choice: int) -> tuple[Floats, float]:
        """The worst moment of *choice* in a group of several layers, if it is made there."""
        chosen = self.chain.groups[group].choices[choice]
        rank, ranks = self._before[group][choice], self._before[group]
        if row == "forward":
            done = [c.group < group or (c.group == group and ranks[c.choice] > rank) for c in self.columns]
            needs, limit = self._resident + np.where(done, self._forward, 0.0), self._room
            high, change = chosen.forward_high_bytes, chosen.forward_change_bytes
        else:
            done = [c.group > group or (c.group == group and ranks[c.choice] < rank) for c in self.columns]
            needs = self._through + np.where(done, self._back, 0.0)
            limit = self._room - self.chain.head_change_bytes / MIB
            high, change = chosen.backward_high_bytes, chosen.backward_change_bytes
        if change > 0:
            needs[self._place[group, choice]] += change / MIB
        return needs, limit - (high - max(0, change)) / MIB

    def _leaf(self, prices: Floats, *, infeasible: bool = False) -> Node:
        """The proof that HiGHS's dual *prices*, one per row, make."""
        device, host = (max(0.0, float(prices[self._first_time_row + i])) for i in (0, 1))
        unit = {"device time": SCALE, "host time": SCALE}
        found = [
            Price(row=row, group=group, choice=choice, amount=round(price * unit.get(row, SECOND / MIB * SCALE)))
            for (row, group, choice), index in self._rows.items()
            if index not in self._idle and (price := max(0.0, float(prices[index]))) > 0
        ]
        found += [
            replace(strong, amount=round(price * SECOND * SCALE / size))
            for index, (strong, size) in self._strong.items()
            if (price := max(0.0, float(prices[index]))) > 0
        ]
        share = round(SCALE * device / (device + host)) if device + host > 0 else SCALE
        return Node(device_share=share, prices=tuple(p for p in found if p.amount), infeasible=infeasible)

    def _nothing(self) -> Point | None:
        _, has_ray, ray = self._model.getDualRay()
        if not has_ray:
            return None
        prices = np.asarray(ray)
        prices = prices / max(float(np.abs(prices).max()), 1e-30)
        signs = [(sum(p.amount for p in self._leaf(sign * prices).prices), sign) for sign in (-1.0, 1.0)]
        total, sign = max(signs)
        finer = LARGEST_PRICES / max(total, 1)  # these prices count only against each other
        node = self._leaf(sign * finer * prices, infeasible=True)
        nothing = np.zeros(len(self.columns))
        return Point(float("inf"), nothing, nothing, node)
