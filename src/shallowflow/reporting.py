"""What a plan's page shows beside the plan: its step's timeline, its layers, and what other sizes would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shallowflow.planner.layer_cost import LayerCost, layer_cost
from shallowflow.planner.plan import Plan
from shallowflow.planner.problem import Problem
from shallowflow.planner.remedies import of_length
from shallowflow.planner.variants import Variant, variants
from shallowflow.profiles import ModelSpec, load_gpu
from shallowflow.profiles.load import load_instances
from shallowflow.runtime.files import write_text
from shallowflow.session import Progress, RequestError, Session
from shallowflow.tradeoffs import lengths

RANKS = (8, 16, 32, 64, 128)
MOST_MICRO_BATCHES = 6
"""Sizes of micro-batches that are shown, the smallest ones."""


def write_report(plan: Plan, path: Path, progress: Progress = lambda _message: None) -> None:
    """Write the page of *plan* to *path*.

    Raises:
        RequestError: it cannot be written.
    """
    text = page(plan, progress)
    try:
        write_text(path, text)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def page(plan: Plan, progress: Progress = lambda _message: None) -> str:
    """The page of *plan*, as HTML."""
    from shallowflow.runtime.plan_page import html
    from shallowflow.runtime.simulated import step_timeline

    session = Session(
        ModelSpec(name=plan.model_name, config=plan.model_config),
        load_gpu(plan.gpu),
        progress,
        plan.workload.adapter,
        plan.workload.target_modules,
    )
    posed = _posed(session, plan)
    progress("the step's timeline")
    timeline = None if plan.configuration.num_stages > 1 else step_timeline(plan)
    return html(plan, session.gpu, load_instances(plan.gpu), timeline, _layers(plan, posed), _variants(plan, posed))


def check_report(path: Path | None) -> None:
    """Refuse a name that is no page's, before anything is planned.

    Raises:
        RequestError: it is none, or its folder is not there.
    """
    if path is not None and path.suffix not in (".html", ".htm"):
        raise RequestError(f"--report {path} is no page; give a name that ends in .html")
    if path is not None and not path.parent.is_dir():
        raise RequestError(f"folder {path.parent} for --report does not exist")


def _is_plain(plan: Plan) -> bool:
    """Whether every GPU holds the whole model, so that one GPU's layers tell all."""
    return plan.configuration.num_stages == 1 and plan.configuration.sharding == "none"


def _posed(session: Session, plan: Plan) -> dict[int, Problem]:
    """At each length that is shown, the problem with the plan's strategies alone."""
    if not _is_plain(plan):
        return {}
    used, chosen = set(plan.configuration.strategies()), plan.configuration
    found = {}
    for length in lengths(session.model, chosen.sequence_length):
        if length % chosen.loss_chunks == 0:
            work = replace(of_length(plan.workload, length), packing=chosen.packing)
            found[length] = session.problem(work, (chosen.cell,), chosen.rank, used.__contains__)
    return found


def _layers(plan: Plan, posed: dict[int, Problem]) -> Sequence[LayerCost]:
    """What each layer takes; nothing where GPUs hold parts of the model."""
    chosen = plan.configuration
    if chosen.sequence_length not in posed:
        return ()
    own = posed[chosen.sequence_length]
    by_kind = {
        pair: layer_cost(
            own.updated(profile, chosen.optimizer, pair[1]), chosen.micro_batch_size, chosen.rank or 0, own.gpu
        )
        for pair, profile in own.profiles.items()
    }
    return [by_kind[pair] for pair in zip(chosen.strategies(), own.kinds, strict=True)]


def _variants(plan: Plan, posed: dict[int, Problem]) -> tuple[Variant, ...]:
    chosen = plan.configuration
    share = chosen.micro_batch_size * chosen.gradient_accumulation_steps
    sizes = [n for n in range(1, share + 1) if share % n == 0][:MOST_MICRO_BATCHES]
    if chosen.micro_batch_size not in sizes:
        sizes.append(chosen.micro_batch_size)
    ranks: Sequence[int | None] = [chosen.rank]
    if chosen.rank is not None and chosen.optimizer == "adamw":  # the other's state is traced at the plan's rank alone
        ranks = sorted({*RANKS, chosen.rank})
    return variants(posed, chosen, sizes, ranks)
