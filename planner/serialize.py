"""Plans to JSON and back; a plan file is data and is checked before anything believes it."""

from __future__ import annotations

import itertools
import math
import re

import msgspec

from shallowflow.profiles import model_facts

from . import schedule
from .plan import FORMAT_VERSION, Plan
from .strategies import Configuration


class PlanError(ValueError):
    """A plan file that is not a plan: which entry, and why."""


def to_json(plan: Plan) -> str:
    """*plan* as indented JSON text with a final newline."""
    text = msgspec.json.format(msgspec.json.encode(plan), indent=2).decode()
    return _NUMBERS.sub(lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


_NUMBERS = re.compile(r"\[[\s\d,-]+\]")
"""A list of whole numbers, which takes one line."""


def from_json(text: str | bytes, where: str = "plan") -> Plan:
    """The inverse of ``to_json``.

    Raises:
        PlanError: *text* is no JSON, lacks entries, has wrong types or values, or contradicts itself.
    """
    try:
        plan = msgspec.json.decode(text, type=Plan)
    except UnicodeError:
        raise PlanError(f"{where} is not UTF-8 text") from None
    except msgspec.ValidationError as error:
        raise PlanError(f"{where} is not a plan: {error}") from None
    except RecursionError:
        raise PlanError(f"{where} is not a plan: it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise PlanError(f"{where} is not JSON: {error}") from None
    for problem in _contradictions(plan):
        raise PlanError(f"{where} contradicts itself: {problem}")
    return plan


def _contradictions(plan: Plan) -> list[str]:
    found: list[str] = []
    if plan.format_version != FORMAT_VERSION:
        found.append(f"format_version is {plan.format_version}, this program reads {FORMAT_VERSION}; plan again")
    found += (_gaps(plan.configuration) or _cut(plan.configuration)) + _adapter(plan.configuration)
    if plan.configuration.sequence_length != plan.workload.sequence_length:
        found.append(
            f"configuration.sequence_length is {plan.configuration.sequence_length}, "
            f"workload.sequence_length {plan.workload.sequence_length}"
        )
    if plan.configuration.global_batch_size != plan.workload.global_batch_size:
        found.append(
            f"micro-batch x accumulation x replicas is {plan.configuration.global_batch_size}, "
            f"workload.global_batch_size {plan.workload.global_batch_size}"
        )
    if plan.configuration.num_gpus != plan.workload.num_gpus:
        found.append(
            f"configuration.num_gpus is {plan.configuration.num_gpus}, workload.num_gpus {plan.workload.num_gpus}"
        )
    if plan.workload.num_gpus % plan.workload.num_machines:
        found.append(
            f"workload.num_machines is {plan.workload.num_machines}, workload.num_gpus {plan.workload.num_gpus}"
        )
    found += _disorder(plan)
    found += _mixed(plan)
    found += _formats(plan, plan.configuration) + _sharing(plan.configuration)
    for number, candidate in enumerate(plan.alternatives):
        found += [f"alternatives[{number}]: {problem}" for problem in _unlike(plan, candidate.configuration)]
    total = sum(part.num_bytes for part in plan.memory)
    if total != plan.prediction.peak_process_bytes:
        found.append(
            f"memory sums to {total} bytes, prediction.peak_process_bytes is {plan.prediction.peak_process_bytes}"
        )
    seconds = sum(part.seconds for part in plan.time.kinds)
    if not math.isclose(seconds, plan.time.device_seconds, rel_tol=1e-6, abs_tol=1e-9):
        found.append(f"time.kinds sums to {seconds} seconds, time.device_seconds is {plan.time.device_seconds}")
    found += _overflow(plan) + _timeless(plan)
    found += _stage_memory(plan)
    if plan.weighed is not None and len(plan.weighed.layers) != plan.configuration.num_layers:
        found.append(
            f"weighed has {len(plan.weighed.layers)} layers, configuration.layers {plan.configuration.num_layers}"
        )
    if "model_type" not in plan.model_config:
        found.append("model_config has no model_type")
    num_layers = model_facts.size(plan.model_config, "num_hidden_layers")
    if num_layers is not None and plan.configuration.num_layers not in (0, num_layers):
        found.append(
            f"configuration.layers covers {plan.configuration.num_layers} layers, model_config has {num_layers}"
        )
    return found


def _stage_memory(plan: Plan) -> list[str]:
    """Whether every candidate tells of each of its stages, and of none where it has one."""
    shown = [("", plan.configuration, plan.prediction)]
    shown += [(f"alternatives[{n}].", c.configuration, c.prediction) for n, c in enumerate(plan.alternatives)]
    found: list[str] = []
    for where, configuration, prediction in shown:
        number, told = configuration.num_stages, len(prediction.stages)
        if told != (number if number > 1 else 0):
            found.append(f"{where}prediction.stages tells of {told} stages, the configuration has {number}")
        peaks = [stage.peak_reserved_bytes for stage in prediction.stages]
        if peaks and max(peaks) != prediction.peak_reserved_bytes:
            found.append(f"{where}prediction.peak_reserved_bytes is not that of the stage that reserves most")
    reason = model_facts.why_not_cut(plan.model_config) if plan.configuration.num_stages > 1 else None
    return [*found, *([f"configuration has several stages, but {reason}"] if reason else [])]


def _formats(plan: Plan, configuration: Configuration) -> list[str]:
    found: list[str] = []
    plain = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[plan.compute_dtype]
    able = ("fp32",) if configuration.is_full else (plain, "int8", "nf4")
    for run in configuration.layers:
        if run.strategy.weight_format not in able:
            learning = " and every weight learns" if configuration.is_full else ""
            found.append(
                f"compute_dtype is {plan.compute_dtype}{learning}, a layer's weights {run.strategy.weight_format}"
            )
        if run.strategy.double_quantization and run.strategy.weight_format != "nf4":
            found.append(f"double_quantization of a layer whose weights are {run.strategy.weight_format}, not nf4")
        if run.strategy.reuses_weights and run.strategy.weight_format != "nf4":
            found.append(f"a layer would {run.strategy.activations}, which are {run.strategy.weight_format}, not nf4")
    return found


def _adapter(configuration: Configuration) -> list[str]:
    """What an adapter has, and nothing else: a rank, an alpha, and modules that it is on."""
    facts = {name: getattr(configuration, name) for name in ("rank", "alpha", "target_modules")}
    return [
        f"configuration.adapter is {configuration.adapter}, configuration.{name} {value or 'null'}"
        for name, value in facts.items()
        if (value is None) != configuration.is_full
    ]


def _unlike(plan: Plan, other: Configuration) -> list[str]:
    """How an alternative is none to *plan*: what a run goes on with has its layers, adapter, data and GPUs."""
    found = (_gaps(other) or _cut(other)) + _adapter(other) + _formats(plan, other) + _sharing(other)
    for name in (
        "num_layers",
        "sequence_length",
        "global_batch_size",
        "num_gpus",
        "packing",
        "adapter",
        "target_modules",
    ):
        mine, its = getattr(plan.configuration, name), getattr(other, name)
        if mine != its:
            found.append(f"configuration.{name} is {its}, the plan's own {mine}")
    return found


def _sharing(configuration: Configuration) -> list[str]:
    alone = configuration.num_gpus == 1 and configuration.sharding != "none"
    return [f"configuration.sharding is {configuration.sharding}, configuration.num_gpus 1"] if alone else []


def _timeless(plan: Plan) -> list[str]:
    """Steps that take no time: rates are divided by it."""
    seconds = plan.prediction.step_seconds
    return [] if seconds > 0 else [f"prediction.step_seconds is {seconds}, and every step takes time"]


def _overflow(plan: Plan) -> list[str]:
    if plan.compute_dtype != "float16" or not model_facts.overflows_fp16(plan.model_config):
        return []
    return [f"compute_dtype is float16, which {plan.model_config['model_type']} overflows; plan for a GPU with bf16"]


def _mixed(plan: Plan) -> list[str]:
    reason = model_facts.why_not_packed(plan.model_config, plan.configuration.sequence_length)
    return [f"configuration.packing is true, but {reason}"] if plan.configuration.packing and reason else []


def _disorder(plan: Plan) -> list[str]:
    prediction = plan.prediction
    rising = [
        ("prediction.resident_bytes", prediction.resident_bytes),
        ("prediction.peak_allocated_bytes", prediction.peak_allocated_bytes),
        ("prediction.peak_reserved_bytes", prediction.peak_reserved_bytes),
        ("prediction.peak_process_bytes", prediction.peak_process_bytes),
        ("memory_bytes", plan.memory_bytes),
    ]
    return [
        f"{low} is {less}, more than {high} of {more}"
        for (low, less), (high, more) in itertools.pairwise(rising)
        if less > more
    ]


def _cut(configuration: Configuration) -> list[str]:
    """What is wrong with the stages of a configuration whose layers are in order."""
    stages, number = configuration.stages, configuration.num_stages
    if stages[0] != 0 or any(a >= b for a, b in itertools.pairwise((*stages, configuration.num_layers))):
        return [f"configuration.stages begin with layers {list(stages)} of {configuration.num_layers}"]
    if configuration.num_gpus % number:
        return [f"configuration has {number} stages, which {configuration.num_gpus} GPUs cannot share"]
    if number > 1 and configuration.gradient_accumulation_steps < number:
        return [
            f"configuration has {configuration.gradient_accumulation_steps} micro-batches in a step, fewer than its "
            f"{number} stages"
        ]
    return _interleaved(configuration) if configuration.parts_per_stage > 1 else []


def _interleaved(configuration: Configuration) -> list[str]:
    """What is wrong with the parts of stages that have several."""
    number, parts = configuration.num_stages, configuration.parts_per_stage
    if parts not in schedule.parts_per_stage(
        configuration.num_layers, number, configuration.gradient_accumulation_steps
    ):
        return [
            f"configuration has {parts} parts in each of {number} stages, which {configuration.num_layers} layers and "
            f"{configuration.gradient_accumulation_steps} micro-batches do not allow"
        ]
    each = configuration.num_layers // (number * parts)
    if configuration.stages != tuple(range(0, number * each, each)):
        return [f"configuration.stages begin with layers {list(configuration.stages)}, in parts of {each} layers"]
    return []


def _gaps(configuration: Configuration) -> list[str]:
    expected = 0
    for run in configuration.layers:
        if run.first != expected or run.last < run.first:
            return [f"configuration.layers covers {run.first} to {run.last} where layer {expected} comes next"]
        expected = run.last + 1
    return [] if expected else ["configuration.layers is empty"]
