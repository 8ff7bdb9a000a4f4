"""ShallowFlow: the best way to fine-tune a language model on a small GPU, predicted, proved and run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shallowflow.comparing import whatif
    from shallowflow.planner.plan import Plan, Workload
    from shallowflow.planner.profiler.user_step import simulate
    from shallowflow.planner.remedies import Infeasible
    from shallowflow.planner.serialize import PlanError
    from shallowflow.planning import plan
    from shallowflow.profiles import FactsError
    from shallowflow.profiling import profile
    from shallowflow.runtime.build import load_model
    from shallowflow.runtime.calibrate import calibrate
    from shallowflow.runtime.data_files import DataError
    from shallowflow.runtime.record import RunRecord
    from shallowflow.runtime.request import RunRequest
    from shallowflow.runtime.run import train
    from shallowflow.runtime.trainers.live import check
    from shallowflow.runtime.user_step import measure
    from shallowflow.session import RequestError

__version__ = "0.1.0"

_HOMES = {
    "DataError": "runtime.data_files",
    "FactsError": "profiles",
    "Infeasible": "planner.remedies",
    "Plan": "planner.plan",
    "PlanError": "planner.serialize",
    "RequestError": "session",
    "RunRecord": "runtime.record",
    "RunRequest": "runtime.request",
    "Workload": "planner.plan",
    "calibrate": "runtime.calibrate",
    "check": "runtime.trainers.live",
    "load_model": "runtime.build",
    "measure": "runtime.user_step",
    "plan": "planning",
    "profile": "profiling",
    "simulate": "planner.profiler.user_step",
    "trade_offs": "tradeoffs",
    "train": "runtime.run",
    "whatif": "comparing",
}

__all__ = [
    "DataError",
    "FactsError",
    "Infeasible",
    "Plan",
    "PlanError",
    "RequestError",
    "RunRecord",
    "RunRequest",
    "Workload",
    "calibrate",
    "check",
    "load_model",
    "measure",
    "plan",
    "profile",
    "simulate",
    "trade_offs",
    "train",
    "whatif",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing the package stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shallowflow' has no attribute '{name}'")
    return getattr(import_module(f"shallowflow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
