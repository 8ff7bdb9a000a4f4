"""``sfplan verify``: whether a plan's proof holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from shallowflow.planner.plan import Plan
from shallowflow.planner.proof import Status
from shallowflow.printing import echo_json
from shallowflow.profiles import load_gpu
from shallowflow.profiles.load import load_instances
from shallowflow.training import read_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What is said of a plan's proof.

    Attributes:
        holds: whether there is no doubt.
        status, gap: how good the plan is shown to be, as its proof says.
        doubts: what is wrong with it, a sentence each.
    """

    holds: bool
    status: Status
    gap: float
    doubts: list[str]


@click.command("verify")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify_command(plan: Path, as_json: bool) -> None:
    """Check the proof that PLAN carries, without the search that made it.

    Ends with 1 where the proof does not hold.

    \b
    sfplan verify plan.json
    """
    from shallowflow.planner.verify import doubts

    loaded = read_plan(plan)
    found = doubts(loaded, load_gpu(loaded.gpu), load_instances(loaded.gpu))
    if as_json:
        echo_json(Verified(holds=not found, status=loaded.proof.status, gap=loaded.proof.gap, doubts=found))
    elif not found:
        click.echo(_held(loaded))
    else:
        click.echo("\n".join(["The proof does not hold:", *(f"  {doubt}" for doubt in found)]), err=True)
    if found:
        sys.exit(1)


def _held(plan: Plan) -> str:
    proof = plan.proof
    cells, nodes = len(proof.cells) or len(proof.staged), sum(len(cell.nodes) for cell in proof.cells)
    return f"The proof holds: {proof.status}, gap {proof.gap:.1e}, {cells} cells, {nodes} nodes."
