"""Plans that were made before, found again by all that they follow from."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from shallowflow.planner.plan import Plan, Workload
from shallowflow.planner.profiler import cache as kept
from shallowflow.planner.serialize import PlanError, from_json, to_json
from shallowflow.profiles.load import load_instances
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.session import Session


def kept_or_made(model: ModelSpec, gpu: GpuSpec, workload: Workload, make: Callable[[], Plan]) -> Plan:
    """The plan for *workload* that is kept, or what *make* gives, kept from now on.

    A search takes seconds where profiles are known, and a comparison asks for many. An entry is found by the facts of
    model, GPU and instances, measured weight errors, the code, and the versions of what is traced; a damaged one counts
    as none.
    """
    weighed = Session(model, gpu, adapter=workload.adapter).weighed()
    facts = {
        "model": asdict(model),
        "gpu": asdict(gpu),
        "instances": [asdict(instance) for instance in load_instances(gpu.name)],
        "workload": asdict(workload),
        "weighed": None if weighed is None else asdict(weighed),
        "front": _front(),
    }
    name = kept.key("plan", facts)
    text = kept.read_text(name)
    if text is not None:
        with contextlib.suppress(PlanError):
            return from_json(text, name)
    made = make()
    kept.write_text(name, to_json(made))
    return made


@cache
def _front() -> str:
    """A digest of the code beside planner, profiles and runtime, whose digest is in every key."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
