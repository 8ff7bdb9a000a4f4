"""Plans whose model is cut into pipeline stages: the search over one number of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from shallowflow.planner import allowed
from shallowflow.planner.pipelined import Memory, StagedSearch, smallest
from shallowflow.planner.plan import Workload
from shallowflow.planner.profiler import cache
from shallowflow.planner.staged import priced, stagings
from shallowflow.planner.strategies import Cell, Strategy
from shallowflow.profiles import model_facts
from shallowflow.session import Session
from shallowflow.workloads import space


@dataclass(frozen=True, slots=True)
class Staged:
    """The searches for *workload* with the model in one number of stages, more than one, of some numbers of parts."""

    session: Session
    workload: Workload
    num_stages: int
    num_parts: tuple[int, ...]

    def searches(
        self,
        only: Callable[[Strategy], bool] = lambda _strategy: True,
        within: Callable[[Cell], bool] = lambda _cell: True,
    ) -> dict[tuple[int, int], StagedSearch]:
        """Of the cells that are *within*, over *only* some strategies, by numbers of stages and parts."""
        session, workload = self.session, self.workload
        cells, rank = space(session, workload, self.num_stages, min(self.num_parts))
        considered = tuple(filter(within, cells))
        posed = session.problem(workload, considered, rank, only)
        width = model_facts.size(session.model.config, "hidden_size") or 1
        made = stagings(posed, considered, self.num_stages, width, posed.between)
        found: dict[tuple[int, int], StagedSearch] = {}
        for parts in self.num_parts:
            able, _ = space(session, workload, self.num_stages, parts)
            own = priced(posed, [one for one in made if one.cell in able], parts)
            found[self.num_stages, parts] = StagedSearch(posed, session.trace_stage, own, _MEMORY)
        return found

    def smallest_process_bytes(self) -> int:
        """The lowest peak of the stage that takes the most, with every layer's leanest strategy."""
        gpu, workload = self.session.gpu, replace(self.workload, deadline_hours=None, max_weight_error=None)
        open_to_it = allowed.strategies(workload, gpu)
        lean = [s for s in open_to_it if s.activations in ("recompute", "offload")] or list(open_to_it)
        bits = min(allowed.BYTES_PER_WEIGHT[s.weight_format] for s in lean)
        lean = [s for s in lean if allowed.BYTES_PER_WEIGHT[s.weight_format] == bits]
        parts = min(self.num_parts)  # which hold the least
        cells, _ = space(self.session, workload, self.num_stages, parts)
        least = min(cell.micro_batch_size for cell in cells), max(cell.loss_chunks for cell in cells)
        searches = replace(self, workload=workload, num_parts=(parts,)).searches(
            lambda strategy: strategy in lean, lambda cell: (cell.micro_batch_size, cell.loss_chunks) == least
        )
        peaks = smallest(searches[self.num_stages, parts]).peaks
        return max(peak.peak_reserved_bytes for peak in peaks) + gpu.context_bytes


def _name(asked: str) -> str:
    return cache.key("cut", {"asked": asked})


_MEMORY = Memory(
    recall=lambda asked: cache.read_numbers(_name(asked)),
    keep=lambda asked, told: cache.write_numbers(_name(asked), told),
)
