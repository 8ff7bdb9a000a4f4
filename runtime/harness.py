"""What a run learned, an adapter over its base or a whole model, measured by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shallowflow.planner.plan import Plan

from . import build
from .evaluate import evaluating
from .folder import MODEL
from .merge import adapter_of, plan_of
from .request import RunError, device_of
from .silence import silenced
from .step import make_trainee
from .weights import WeightsSource, find_weights, load_tokenizer, load_weights

INSTALL = "pip install 'shallowflow[eval]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one task; *base* is the score without the adapter, None where that was not asked for."""

    task: str
    metric: str
    trained: float
    standard_error: float | None
    base: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What to measure.

    Attributes:
        tasks: names that the harness knows, or paths of its YAML files.
        limit: examples of each task; None for all.
        with_base: measure the base without the adapter, too.
    """

    run: Path
    tasks: tuple[str, ...]
    weights: Path | None = None
    limit: int | None = None
    batch_size: int = 1
    with_base: bool = False


def examine(asked: Examination, progress: Callable[[str], None] = lambda _message: None) -> list[Score]:
    """Measure what a run learned: an adapter over a base in the weight formats that it was trained on, or a model.

    Raises:
        RunError: the harness is not installed, it has no such task or cannot get its data, or the run is none.
        PlanError, WeightsError: see there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RunError(f"evaluating on tasks needs the package lm-eval; install it with: {INSTALL}")
    plan = plan_of(asked.run)
    device = device_of(plan)
    with silenced("lm_eval"):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        progress("reading tasks")
        manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in asked.tasks))
        _check_tasks(manager, asked.tasks)
        progress("loading weights")
        source = find_weights(plan.model_name, asked.weights)
        is_full = plan.configuration.is_full
        learned = find_weights(plan.model_name, asked.run / MODEL) if is_full else source
        tokenizer = load_tokenizer(learned)
        model = _model(plan, learned, device)
        if not is_full:
            _put_adapter(model, adapter_of(asked.run))

        def results(model: Any) -> Mapping[str, Mapping[str, Any]]:
            wrapped = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=asked.batch_size)
            return _results(wrapped, model, manager, asked)

        progress(f"evaluating the {'model' if is_full else 'adapter'}")
        trained = results(model)
        without: Mapping[str, Mapping[str, Any]] = {}
        if asked.with_base:
            progress("evaluating the base")
            if is_full:
                del model  # before another as large is loaded
                without = results(_model(plan, source, device))
            else:
                with model.disable_adapter():
                    without = results(model)
    return list(_scores(trained, without))


def _model(plan: Plan, source: WeightsSource, device: torch.device) -> Any:
    """The model of *plan* with the weights of *source*, as a run computes it."""
    dtype = build.weights_dtype(plan.configuration, plan.compute_dtype)
    base = load_weights(source, plan.model_config, dtype, plan.num_parameters)
    return make_trainee(base, replace(plan.configuration, packing=False), plan.compute_dtype, device).model


def _check_tasks(manager: Any, tasks: Sequence[str]) -> None:
    """Build every task, which gets its data, before anything large is loaded."""
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known and not Path(task).is_file():
            raise RunError(f"the harness has no task {task!r}, nor is it a YAML file; lm-eval ls tasks lists all")
    for task in tasks:
        try:
            manager.load([task])
        except Exception as error:  # whatever its data's readers and the network raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RunError(
                f"the data of task {task!r} cannot be had: {reason}; they come from the Hub unless its YAML file names "
                "local ones"
            ) from error


def _put_adapter(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(model, saved)
    if found.unexpected_keys:
        raise RunError(f"the adapter holds {found.unexpected_keys[0]}, which the plan's model does not have")
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in found.missing_keys:
        if name in learned:
            raise RunError(f"the adapter lacks {name}, which the plan's model has")


def _results(wrapped: Any, model: torch.nn.Module, manager: Any, asked: Examination) -> Mapping[str, Mapping[str, Any]]:
    from lm_eval.evaluator import simple_evaluate

    try:
        with evaluating(model):
            found: dict[str, Any] = simple_evaluate(
                model=wrapped, tasks=list(asked.tasks), task_manager=manager, limit=asked.limit, log_samples=False
            )
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{asked.batch_size} examples at a time do not fit into memory; give a smaller --batch-size"
        ) from error
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    return results


def _scores(trained: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """The harness calls a metric ``acc,none`` and its error ``acc_stderr,none``, after the filter of the answers."""
    for task, found in trained.items():
        for key, value in found.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{how}")
            yield Score(
                task=task,
                metric=metric if how == "none" else key,
                trained=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                base=float(base[task][key]) if task in base else None,
            )
