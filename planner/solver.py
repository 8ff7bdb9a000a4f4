"""The best plan over all cells, its own whole step traced, with the proof that there is no better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from . import allowed, quality, single
from . import problem as posing
from .arrangement import arranged, prices, repriced
from .branch import BranchAndBound
from .cell_search import FEW_NODES, MOST_NODES, CellSearch, best_of, priced, proving
from .chain import Chain, Limits, Taken
from .memory_record import TracedPeak
from .needs import Unproven
from .neighbours import Chosen
from .open_ways import OpenWays
from .plan import Candidate, Sensitivity
from .problem import Problem
from .proof import OPTIMAL_GAP, CellProof, Proof, Status, Tables, bound, gap, unproved
from .strategies import Cell, Configuration

MOST_TRACES = 24
"""Whole steps that are traced at most before the search gives up on a plan that fits."""
MOST_TRACES_EACH = 4
"""The same for one alternative."""
MOST_TIGHTENINGS = 200
"""Times that less harm is looked for, which takes no trace, before the search gives up."""
LEAST_CUT_BYTES = 4 * 2**20
"""By how much a cell's memory is cut at least when a step of it did not fit."""
NUM_ALTERNATIVES = 4
LEANER = 0.9
"""Of the plan's memory, for the alternative that needs less."""
MUCH_LEANER = (0.8, 0.7, 0.6)
"""The same, where other kinds of alternatives are too few."""
FINER = 0.5
"""Of the plan's harm, for the alternative whose weights are finer."""

Trace = Callable[[Configuration], TracedPeak]


@dataclass(frozen=True, slots=True)
class Solution:
    """The best configuration that fits, with its proof, and others that are near.

    Attributes:
        num_cells, num_nodes, num_traced, num_rejected: see SearchRecord.
        best_uniform_seconds: a step of the best configuration with one strategy for all layers, by composition.
    """

    best: Candidate
    peak: TracedPeak
    proof: Proof
    sensitivity: Sensitivity
    alternatives: tuple[Candidate, ...]
    num_cells: int
    num_nodes: int
    num_traced: int
    num_rejected: int
    best_uniform_seconds: float | None


@dataclass(slots=True)
class _Found:
    """What fits when traced whole."""

    at: CellSearch
    chosen: Chosen
    configuration: Configuration
    peak: TracedPeak


class _Solver:
    """All cells of a problem, and what was traced of them."""

    def __init__(self, problem: Problem, trace: Trace) -> None:
        self.problem = problem
        self._trace = trace
        self.traced: dict[Configuration, TracedPeak] = {}
        self.num_rejected = 0

    def cells(self, chains: dict[Cell, Chain], limits: Limits) -> list[CellSearch]:
        return [CellSearch(cell, chain, limits) for cell, chain in chains.items()]

    def found(self, cells: Sequence[CellSearch], most_traces: int, most_nodes: int) -> _Found | None:
        """The best that fits when it is traced whole; cells are cut by what a step of theirs did not fit by."""
        budget = self.problem.budget_bytes
        traced = tightened = 0
        while traced < most_traces and tightened < MOST_TIGHTENINGS:
            best = best_of(cells, most_nodes)
            if best is None:
                return None
            at, chosen = best
            layers = arranged(at.chain, chosen.counts, at.limits)
            chosen = Chosen(chosen.counts, layers.taken)
            if at.too_harmful(chosen.taken):
                tightened += 1
                continue
            traced += 1
            configuration = allowed.configured(self.problem.workload, at.cell, layers.strategies)
            peak = self.tracing(configuration)
            if peak.peak_reserved_bytes <= budget:
                return _Found(at, chosen, configuration, peak)
            self.num_rejected += 1
            excess = max(LEAST_CUT_BYTES, peak.peak_reserved_bytes - budget)
            at.cut(chosen.taken.peak_bytes - excess * (1 + at.cuts // 2))
        return None

    def tracing(self, configuration: Configuration) -> TracedPeak:
        """*configuration* traced whole, once."""
        if configuration not in self.traced:
            self.traced[configuration] = self._trace(configuration)
        return self.traced[configuration]

    def candidate(self, found: _Found) -> Candidate:
        """What was found, with its traced prediction."""
        composed = posing.predict(self.problem, found.configuration)
        peak = found.peak
        prediction = replace(
            composed,
            resident_bytes=peak.resident_bytes,
            peak_allocated_bytes=peak.peak_allocated_bytes,
            peak_reserved_bytes=peak.peak_reserved_bytes,
            peak_process_bytes=peak.peak_reserved_bytes + self.problem.gpu.context_bytes,
            traced=True,
        )
        return Candidate(
            configuration=found.configuration,
            prediction=prediction,
            weight_error=quality.mean_error(found.configuration.strategies(), self.problem.weighed),
        )


def solve(
    problem: Problem, considered: tuple[Cell, ...], trace: Trace, num_alternatives: int = NUM_ALTERNATIVES
) -> Solution | None:
    """The best configuration in the cells *considered* whose own traced step fits; None when none was found."""
    chains = posing.chains(problem, considered)
    if problem.weighed:
        chains = priced(chains, problem.limits)
    solver = _Solver(problem, trace)
    cells = solver.cells(chains, problem.limits)
    found = solver.found(cells, MOST_TRACES, MOST_NODES) if cells else None
    found = _less_fragmented(solver, cells, found, problem.limits)
    if found is None:
        return None
    alternatives = _alternatives(solver, chains, found, num_alternatives)
    if problem.weighed:
        cells = proving(cells, found.at, found.chosen, problem.limits)
    return Solution(
        best=solver.candidate(found),
        peak=found.peak,
        proof=_proof(problem, cells, found),
        sensitivity=_sensitivity(problem, found),
        alternatives=alternatives,
        num_cells=len(cells),
        num_nodes=sum(len(at.search.proof.nodes) for at in cells),
        num_traced=len(solver.traced),
        num_rejected=solver.num_rejected,
        best_uniform_seconds=single.best_seconds(chains, {at.cell: at.limits for at in cells}),
    )


def _less_fragmented(
    solver: _Solver, cells: Sequence[CellSearch], found: _Found | None, limits: Limits
) -> _Found | None:
    """*found*, or a single strategy for all layers that scores less and fits, though its cell was cut by more.

    Layers that are alike leave fewer gaps than a mix of them, by which its cell's memory was cut.
    """
    least = float("inf") if found is None else found.chosen.taken.score_picoseconds
    singles = [
        (needs.score_picoseconds, number, at, alone, needs)
        for number, at in enumerate(cells)
        if at.limits != limits
        for alone, needs in single.uniform(at.chain)
        if needs.within(limits) and needs.score_picoseconds < least
    ]
    singles.sort(key=lambda item: item[:2])
    tried = singles[:MOST_TRACES_EACH]
    if found is None:  # what needs the least is tried before it is said that nothing fits
        tried += sorted(singles[MOST_TRACES_EACH:], key=lambda item: item[4].peak_bytes)[:MOST_TRACES_EACH]
    for _, _, at, alone, needs in tried:
        alone_found = _traced_alone(solver, at, alone, needs)
        if alone_found is not None:
            return alone_found
    return found


def _traced_alone(solver: _Solver, at: CellSearch, alone: Chain, needs: Taken) -> _Found | None:
    """The single strategy of *alone* in the cell *at*, proved there as far as may be; None if it does not fit."""
    layers = single.strategies(alone) * solver.problem.num_layers
    configuration = allowed.configured(solver.problem.workload, at.cell, layers)
    peak = solver.tracing(configuration)
    if peak.peak_reserved_bytes > solver.problem.budget_bytes:
        solver.num_rejected += 1
        return None
    counts = tuple(
        tuple(group.num_layers if choice.strategy == layers[0] else 0 for choice in group.choices)
        for group in at.chain.groups
    )
    at.cut(max(at.limits.memory_bytes, needs.peak_bytes))
    at.search.search(needs.score_picoseconds / posing.SECOND, MOST_NODES)
    return _Found(at, Chosen(counts, needs), configuration, peak)


def _proof(problem: Problem, cells: Sequence[CellSearch], found: _Found) -> Proof:
    tables, limits = Tables(), problem.limits
    proved = tuple(tables.cell(at.cell, at.chain, at.limits.memory_bytes, at.search.proof) for at in cells)
    before = tuple(tables.cell(at.cell, at.chain, limits.memory_bytes, at.first.root) for at in cells if at.cuts)
    proof = Proof(
        status="feasible",
        gap=0.0,
        unfragmented_gap=0.0,
        score_picoseconds=found.chosen.taken.score_picoseconds,
        bound_picoseconds=0,
        budget_bytes=limits.memory_bytes,
        harm=limits.harm,
        host_bytes=limits.host_bytes,
        step_picoseconds=limits.step_picoseconds,
        strategies=tuple(tables.strategies),
        tables=tuple(tables.tables),
        cells=proved,
        unfragmented=before,
        harms=tuple(tuple(quality.harm(s, own) for s in tables.strategies) for own in problem.weighed),
        harm_price=found.at.chain.harm_price,
    )
    opened = OpenWays()
    proved, bounds = _shown(proof, proved, opened)
    before, loose = _shown(proof, before, opened)
    cut = {cell.cell for cell in before}
    loose += [b for cell, b in zip(proved, bounds, strict=True) if cell.cell not in cut]
    shown = gap(proof.score_picoseconds, bounds)
    status: Status = "optimal" if shown <= OPTIMAL_GAP else "within"
    return replace(
        proof,
        cells=proved,
        unfragmented=before,
        status=status,
        gap=shown,
        unfragmented_gap=gap(proof.score_picoseconds, loose),
        bound_picoseconds=max(0, min((b for b in bounds if b is not None), default=proof.score_picoseconds)),
    )


def _shown(
    proof: Proof, cells: tuple[CellProof, ...], opened: OpenWays
) -> tuple[tuple[CellProof, ...], list[int | None]]:
    """*cells* with their bounds; where a tree shows less than it says, nothing but the cheapest choices is taken."""
    kept: list[CellProof] = []
    bounds: list[int | None] = []
    for cell in cells:
        try:
            least, shown = bound(proof, cell, opened), cell
        except Unproven:
            shown = unproved(cell)
            least = bound(proof, shown)
        kept.append(shown)
        bounds.append(least)
    return tuple(kept), bounds


def _sensitivity(problem: Problem, found: _Found) -> Sensitivity:
    """What the limits are worth, by the prices of the relaxation, and what the next rank costs."""
    at = found.at
    per_byte, binding = at.search.memory_price()
    rank = None if problem.rank is None else quality.next_rank(problem.rank)
    next_seconds: float | None = None
    if rank is not None and problem.workload.rank is None:
        wider = replace(problem, rank=rank)
        cell = replace(at.cell, rank=rank)
        chain = posing.chains(wider, (cell,), posing.harm_price(at.chain.groups))[cell]
        if problem.weighed:
            chain = repriced(chain, prices(at.chain, found.chosen.counts))
        chosen = BranchAndBound(chain, at.limits).search(most_nodes=FEW_NODES).best
        next_seconds = None if chosen is None else chosen.taken.step_picoseconds / posing.SECOND
    return Sensitivity(
        binding=binding,
        seconds_per_100_mib=per_byte * 100 * 2**20,
        next_rank=rank if next_seconds is not None else None,
        next_rank_seconds=next_seconds,
    )


def _alternatives(solver: _Solver, chains: dict[Cell, Chain], found: _Found, wanted: int) -> tuple[Candidate, ...]:
    """Other configurations that fit when traced, each the best of its kind, best first."""
    known = {found.configuration}
    near: list[tuple[int, Candidate]] = []
    for cells in _variants(solver, chains, found):
        if len(near) == wanted:
            break
        other = solver.found(cells, MOST_TRACES_EACH, FEW_NODES)
        if other is not None and other.configuration not in known:
            known.add(other.configuration)
            near.append((other.chosen.taken.score_picoseconds, solver.candidate(other)))
    return tuple(candidate for _, candidate in sorted(near, key=lambda item: item[0]))


def _variants(solver: _Solver, chains: dict[Cell, Chain], found: _Found) -> Iterator[list[CellSearch]]:
    """Kinds of configurations that are not the plan, each as the cells to look for it in."""
    cell, limits = found.at.cell, found.at.limits
    own = {cell: found.at.chain}
    sizes = {other: chain for other, chain in chains.items() if other.micro_batch_size != cell.micro_batch_size}
    yield solver.cells(sizes, limits)
    alike = single.best(found.at.chain, limits)
    if len(found.configuration.layers) > 1 and alike is not None:
        yield solver.cells({cell: alike}, limits)
    memory, harm = found.chosen.taken.peak_bytes, found.chosen.taken.harm
    yield solver.cells(own, replace(limits, memory_bytes=int(LEANER * memory)))
    if harm:
        yield solver.cells(own, replace(limits, harm=int(FINER * harm)))
    for wanted in sorted({strategy.weight_format for strategy in single.strategies(found.at.chain)}):
        alone = single.only(found.at.chain, {s for s in single.strategies(found.at.chain) if s.weight_format == wanted})
        if alone is not None:
            yield solver.cells({cell: alone}, limits)
    for other, chain in chains.items():
        if other.micro_batch_size == cell.micro_batch_size and other != cell:
            yield solver.cells({other: chain}, limits)
    for share in MUCH_LEANER:
        yield solver.cells(own, replace(limits, memory_bytes=int(share * memory)))
