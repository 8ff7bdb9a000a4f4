"""Plans that are kept: found again by all that they follow from, and made anew by anything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shallowflow import kept_plans
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler import cache
from shallowflow.planner.weighed import LayerErrors, Weighed
from shallowflow.profiles.load import load_instances
from shallowflow.session import Session
from tests.planner.planned import SHORT, T4, model, planned


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    planned(SHORT)
    monkeypatch.setenv("SHALLOWFLOW_CACHE", str(tmp_path))


def counted() -> tuple[list[Plan], Callable[[], Plan]]:
    """What makes a plan, and every one that it has made."""
    made: list[Plan] = []

    def make() -> Plan:
        made.append(planned(SHORT))
        return made[-1]

    return made, make


def test_what_was_made_once_is_found_again() -> None:
    """The same plan, without making it."""
    made, make = counted()

    first = kept_plans.kept_or_made(model(), T4, SHORT, make)
    again = kept_plans.kept_or_made(model(), T4, SHORT, make)

    assert first == again == planned(SHORT)
    assert len(made) == 1


def test_anything_else_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another workload, GPU, model, price, weight error, or code."""
    made, make = counted()
    kept_plans.kept_or_made(model(), T4, SHORT, make)

    kept_plans.kept_or_made(model(), T4, replace(SHORT, total_tokens=SHORT.total_tokens + 1), make)
    kept_plans.kept_or_made(model(), replace(T4, memory_bytes=T4.memory_bytes - 1), SHORT, make)
    kept_plans.kept_or_made(replace(model(), name="another"), T4, SHORT, make)
    assert len(made) == 4
    with monkeypatch.context() as changed:
        dearer = [replace(one, network_bits_per_second=1.0) for one in load_instances("t4")]
        changed.setattr(kept_plans, "load_instances", lambda _name: dearer)
        kept_plans.kept_or_made(model(), T4, SHORT, make)
    with monkeypatch.context() as changed:
        weighed = Weighed(digest="0", layers=(LayerErrors(int8=0.1, nf4=0.2, double_quantized=0.3),))
        changed.setattr(Session, "weighed", lambda _self: weighed)
        kept_plans.kept_or_made(model(), T4, SHORT, make)
    with monkeypatch.context() as changed:
        changed.setattr(kept_plans, "_front", lambda: "other code")
        kept_plans.kept_or_made(model(), T4, SHORT, make)
    assert len(made) == 7


def test_a_damaged_entry_is_none() -> None:
    """It is made again, and kept whole."""
    made, make = counted()
    kept_plans.kept_or_made(model(), T4, SHORT, make)
    (entry,) = (path for path in cache.folder().glob("*.json") if path.stat().st_size > 1000)

    entry.write_text(entry.read_text(encoding="utf-8")[:500], encoding="utf-8")

    assert kept_plans.kept_or_made(model(), T4, SHORT, make) == planned(SHORT)
    assert len(made) == 2
    assert kept_plans.kept_or_made(model(), T4, SHORT, make) == planned(SHORT)
    assert len(made) == 2
