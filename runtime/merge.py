"""A run's adapter put into the weights that it was trained on, as a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shallowflow.planner import serialize
from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import Configuration

from . import build, dora, quantized
from .folder import ADAPTER, MODEL
from .request import RunError
from .weights import find_weights, load_tokenizer, load_weights, plain, write_model


def merge(
    run: Path, output: Path, weights: Path | None = None, progress: Callable[[str], None] = lambda _message: None
) -> Path:
    """Write the model of the folder *run* with its adapter merged to *output*, in fp16 or bf16, with its tokenizer.

    Quantized layers become what their rounded weights stand for, plus the adapter: the model that was evaluated, not
    one that was never seen in training.

    Raises:
        RunError: *run* is no finished run's folder, or one that learned every weight, *output* is not new, or merged
            weights exceed what fp16 holds.
        PlanError, WeightsError: see there.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output} is not empty; give a new folder with --output")
    plan = plan_of(run)
    if plan.configuration.is_full:
        raise RunError(f"nothing is to be merged: {run} learned every weight, and {run / MODEL} is the whole model")
    progress("loading weights")
    source = find_weights(plan.model_name, weights)
    tokenizer = load_tokenizer(source)
    base = load_weights(source, plan.model_config, plan.compute_dtype, plan.num_parameters)
    progress("merging")
    _merge(base, plan, adapter_of(run))
    saved = plain(base, plan.model_config, "bfloat16" if plan.compute_dtype == "bfloat16" else "float16")
    for name, parameter in saved.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RunError(f"{name} exceeds what fp16 holds once the adapter is merged; use the adapter with PEFT")
    progress("saving")
    write_model(saved, tokenizer, output)
    return output


def plan_of(run: Path) -> Plan:
    """The plan of the folder *run*, under the configuration that it ended with.

    Raises:
        RunError: *run* is no folder of a run that learned something.
        PlanError: see there.
    """
    if not (any((run / path).is_file() for path in (_ADAPTER, _MODEL)) and (run / "plan.json").is_file()):
        raise RunError(f"{run} holds no adapter and plan; give the folder that sfplan train wrote")
    plan = serialize.from_json((run / "plan.json").read_bytes(), str(run / "plan.json"))
    record = record_of(run)
    if record is not None and not record.steps:
        raise RunError(f"{run} learned nothing: it ended before its first step; go on with sfplan train and --resume")
    return replace(plan, configuration=configuration_of(record, plan))


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    """The adapter in the folder *run*, by PEFT's names."""
    return load_file(run / _ADAPTER)


_ADAPTER, _MODEL = Path(ADAPTER) / "adapter_model.safetensors", Path(MODEL) / "config.json"


class Ran(msgspec.Struct):
    """Of a run's record, what it was run under and what it came to."""

    outcome: str = "completed"
    steps: list[msgspec.Raw] = []
    configuration: Configuration | None = None


def record_of(run: Path) -> Ran | None:
    """What is recorded of the run in the folder *run*; None where nothing is.

    Raises:
        RunError: the record is not one.
    """
    path = run / "run.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ran)
    except msgspec.DecodeError as error:
        raise RunError(f"{path} is not what a run writes: {error}") from None


def configuration_of(record: Ran | None, plan: Plan) -> Configuration:
    """What a run ended under: another than *plan*'s where memory fell short."""
    return (record.configuration if record is not None else None) or plan.configuration


def _merge(base: PreTrainedModel, plan: Plan, trained: dict[str, torch.Tensor]) -> None:
    """Give *base*, in place, the weights that *plan* stored it in, plus the adapter *trained*."""
    transposed = {name for name, module in base.named_modules() if isinstance(module, Conv1D)}
    build.apply_formats(base, plan.configuration.strategies(), plan.compute_dtype)
    known = dict(base.named_modules())
    adapter = {key.removeprefix(_PREFIX): tensor.float() for key, tensor in trained.items()}
    names = _adapted(adapter, plan.configuration, known)
    for name, module in known.items():
        if name not in names and not quantized.is_quantized(module):
            continue
        merged = quantized.weight_of(module, torch.float32)
        if name in names:
            down, up = (adapter[name + end] for end in _MATRICES)
            merged = merged + plan.configuration.scaling * (up @ down)
        if name + _LENGTHS in adapter:
            merged = dora.with_lengths(merged, adapter[name + _LENGTHS])
        made = _layer(merged, getattr(module, "bias", None), is_transposed=name in transposed)
        parent, _, own = name.rpartition(".")
        setattr(known[parent], own, made)


def _adapted(adapter: Collection[str], configuration: Configuration, known: Container[str]) -> set[str]:
    """The names of the modules that the tensors of *adapter* belong to.

    Raises:
        RunError: they are none of *configuration*'s, for a model of the *known* modules.
    """
    ends = (*_MATRICES, _LENGTHS) if configuration.adapter == "dora" else _MATRICES
    names = {key.removesuffix(end) for end in ends for key in adapter if key.endswith(end)}
    wanted = {name + end for name in names for end in ends if name in known}
    for key in adapter:
        if key not in wanted:
            raise RunError(f"the adapter holds {key}, which the plan's model does not have")
    for key in sorted(wanted.difference(adapter)):
        raise RunError(f"the adapter lacks {key}, which the plan's model has")
    return names


_PREFIX = "base_model.model."
"""What PEFT puts before the model's own names."""
_MATRICES, _LENGTHS = (".lora_A.weight", ".lora_B.weight"), ".lora_magnitude_vector"
"""And after them."""


def _layer(weight: torch.Tensor, bias: torch.Tensor | None, *, is_transposed: bool) -> torch.nn.Module:
    """A plain layer that multiplies by *weight*, of the class that the model had."""
    out_features, in_features = weight.shape
    made = cast(
        torch.nn.Module,
        Conv1D(out_features, in_features)
        if is_transposed
        else torch.nn.Linear(in_features, out_features, bias=bias is not None),
    )
    made.weight = torch.nn.Parameter(weight.t().contiguous() if is_transposed else weight, requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made
