"""A plan for another trainer: as near to it as that trainer's settings come, and what they cannot say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import Optimizer
from shallowflow.profiles import GpuSpec, load_gpu
from shallowflow.runtime import build
from shallowflow.runtime.documents import Format

from . import axolotl, llamafactory, resolve, rows, traps, written
from .check import Outcome, first_fitting, leaner, predict
from .settings import TITLES, Dtype, Loss, Precision, Quantized, Settings, Tool

Target = Literal["axolotl", "llamafactory", "trl", "unsloth", "accelerate"]
TARGETS: tuple[Target, ...] = ("axolotl", "llamafactory", "trl", "unsloth", "accelerate")
REPEATING = "repeated_sdpa"
"""The attention that a written script registers: PyTorch's, with the KV heads repeated first."""
_PRECISIONS: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class InexpressibleError(ValueError):
    """A plan that another trainer cannot run: one line that says what would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file for another trainer.

    Attributes:
        outcome: its own step, simulated.
        cannot: what of the plan it does not say.
    """

    text: str
    settings: Settings
    outcome: Outcome
    cannot: tuple[str, ...]


def export(
    plan: Plan,
    target: Target,
    data: Path,
    data_format: Format,
    gpu: GpuSpec,
    progress: Callable[[str], None] = lambda _said: None,
) -> Exported:
    """*plan* for *target*, with rows of *data*, leaner than the plan where *target* needs more memory for the same.

    Raises:
        InexpressibleError: nothing that *target* can say fits on the GPU.
    """
    tool: Tool = "trl" if target == "accelerate" else target
    if tool == "unsloth" and gpu.device_type != "cuda":
        raise InexpressibleError(f"Unsloth needs a GPU; the plan is for {gpu.title}")
    wanted = resolve.resolved(nearest(plan, tool, gpu), plan.model_config)

    def found(settings: Settings) -> Outcome:
        progress(f"{settings.micro_batch_size} sequences at once, weights in {settings.quantization}")
        return predict(settings, plan.model_config, gpu)

    fitting = first_fitting(list(leaner(wanted)), found, plan.budget_bytes + gpu.context_bytes)
    if fitting is None:
        raise InexpressibleError(
            f"with {TITLES[tool]} nothing near this plan fits in {words.gib(plan.memory_bytes)}, not with one sequence "
            "at once, recomputed, in 4 bits; `sfplan train` runs the plan itself"
        )
    settings, outcome = fitting
    cannot = _cannot(plan, settings, wanted, outcome)
    text = _head(plan, tool, settings, outcome, cannot) + _body(plan, target, settings, data, data_format)
    return Exported(text=text, settings=settings, outcome=outcome, cannot=cannot)


def nearest(plan: Plan, tool: Tool, gpu: GpuSpec) -> Settings:
    """What of *plan* the settings of *tool* can say."""
    configuration = plan.configuration
    strategies = configuration.strategies()
    formats = {strategy.weight_format for strategy in strategies}
    quantization: Quantized = "nf4" if "nf4" in formats else "int8" if "int8" in formats else "none"
    dtype: Dtype = plan.compute_dtype
    if configuration.is_full and tool == "axolotl" and dtype == "float16":
        dtype = "float32"  # it has no fp32 weights under fp16
    rows = configuration.micro_batch_size
    flattens = configuration.packing and tool in ("trl", "unsloth")  # all of a micro-batch into one row
    return Settings(
        tool=tool,
        model=plan.model_name,
        sequence_length=configuration.sequence_length,
        micro_batch_size=1 if flattens else rows,
        gradient_accumulation_steps=configuration.gradient_accumulation_steps * (rows if flattens else 1),
        num_gpus=configuration.num_gpus,
        quantization=quantization,
        double_quantization=quantization == "nf4"
        and all(s.double_quantization for s in strategies if s.weight_format == "nf4"),
        weights_dtype="float32" if configuration.is_full else "auto" if tool == "llamafactory" else dtype,
        product_dtype=dtype,
        precision=_PRECISIONS[dtype],
        adapter=configuration.adapter,
        rank=configuration.rank,
        alpha=configuration.alpha,
        target_modules=_modules(plan),
        recomputes=any(strategy.activations != "save" for strategy in strategies),
        attention=_attention(plan, tool, gpu),
        loss=_LOSSES.get(tool, "whole"),
        packing="separate" if configuration.packing else "none",
        longest_first=not configuration.packing,
        optimizer=_OPTIMIZERS[configuration.optimizer],
        learning_rate=2e-5 if configuration.is_full else 2e-4,
        initial_scale=1024.0 if tool == "trl" else 65536.0,
    )


_LOSSES: dict[Tool, Loss] = {"trl": "tiled", "unsloth": "parts"}
_OPTIMIZERS: dict[Optimizer, str] = {"adamw": "adamw_torch", "adamw8bit": "adamw_bnb_8bit"}


def _attention(plan: Plan, tool: Tool, gpu: GpuSpec) -> str:
    if resolve.caps_scores(plan.model_config):
        return "eager"
    repeats = tool == "trl" and gpu.device_type == "cuda" and resolve.repeats_heads(plan.model_config)
    return REPEATING if repeats else "sdpa"


def _modules(plan: Plan) -> tuple[str, ...]:
    wanted = plan.configuration.target_modules
    if wanted is None or wanted == "all-linear":
        return ()
    if wanted != "attention":
        return tuple(wanted)
    model = build.empty_model(build.transformers_config(plan.model_config, 1), "float32", "meta")
    return tuple(build.adapter_targets(model, wanted))


def _cannot(plan: Plan, settings: Settings, wanted: Settings, outcome: Outcome) -> tuple[str, ...]:
    """What *settings* do otherwise than *plan*, in sentences without full stops."""
    configuration, title = plan.configuration, TITLES[settings.tool]
    strategies = set(configuration.strategies())
    said = []
    if len({(s.weight_format, s.double_quantization) for s in strategies}) > 1:
        said.append(f"{title} stores all layers in one format; the plan mixes: {words.summary(configuration)}")
    policies = {s.activations for s in strategies}
    if policies - {"save"} and (len(policies) > 1 or policies != {"recompute"}):
        said.append(f"{title} recomputes all of every layer, or nothing; the plan: {', '.join(sorted(policies))}")
    if configuration.loss_chunks > 1 and settings.loss == "whole":
        said.append(f"the plan computes the loss in {configuration.loss_chunks} parts; {title} holds all logits")
    if configuration.sharding == "weights":
        said.append(f"the plan shares the base's weights among {configuration.num_gpus} GPUs; here each holds them all")
    if settings.micro_batch_size != wanted.micro_batch_size:
        said.append(
            f"{wanted.micro_batch_size} sequences at once do not fit with {title}; {settings.micro_batch_size} do, "
            "with the same global batch"
        )
    if settings.quantization != wanted.quantization:
        said.append(f"with {title} the base fits in {settings.quantization} only")
    found = traps.found(settings, plan.model_config, load_gpu(plan.gpu))
    said += [f"{finding.what} ({finding.trap})" for finding in found if finding.trap in _TOLD]
    slower = outcome.step_seconds / plan.prediction.step_seconds - 1
    if slower > 0.01:
        said.append(f"a step is predicted to take {slower:.0%} longer than the plan's")
    return tuple(said)


def _head(plan: Plan, tool: Tool, settings: Settings, outcome: Outcome, cannot: tuple[str, ...]) -> str:
    gpu = words.counted(settings.num_gpus, plan.gpu.upper())
    lines = [
        f"{plan.model_name} on {gpu} with {TITLES[tool]}, after a plan of ShallowFlow's.",
        f"Its own step, simulated: {words.gib(outcome.peak_process_bytes)} at the peak of each process, "
        f"{outcome.step_seconds:.1f} s a step, {outcome.tokens_per_second * settings.num_gpus:,.0f} tokens/s.",
        *([] if not cannot else ["What the plan has, and this does not say:"]),
        *(f"- {one}." for one in cannot),
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)  # a plan is data: no line of its own


_TOLD = ("grouped KV heads", "loss scale", "bf16 left over", "whole logits")
"""Traps that a written file may still have, because its tool cannot say better."""


def _body(plan: Plan, target: Target, settings: Settings, data: Path, data_format: Format) -> str:
    seed = 0
    if target == "axolotl":
        return _yaml({"datasets": [rows.for_axolotl(data, data_format)], **axolotl.write(settings)})
    if target == "llamafactory":
        return _llamafactory(settings, data, data_format)
    if target == "accelerate":
        return _yaml(accelerate(settings))
    if target == "trl":
        return written.trl(settings, data, data_format, seed)
    return written.unsloth(settings, data, data_format, seed, _all_modules(plan))


def _all_modules(plan: Plan) -> list[str]:
    model = build.empty_model(build.transformers_config(plan.model_config, 1), "float32", "meta")
    return build.adapter_targets(model)


def _llamafactory(settings: Settings, data: Path, data_format: Format) -> str:
    entry = json.dumps({rows.NAME: rows.for_llamafactory(data, data_format)})
    is_text = data_format == "text"
    told: dict[str, Any] = {
        "stage": "pt" if is_text else "sft",
        "dataset": rows.NAME,
        "dataset_dir": ".",
        "template": "empty" if is_text or data_format == "prompt-completion" else "default",
    }
    entries = {**llamafactory.write(settings), **told}
    if is_text and entries.pop("neat_packing"):
        entries["packing"] = True  # whose documents see each other, as they always do in this stage
    note = "# dataset_info.json beside this file says what the data is; a template fits one family of models.\n"
    return f"{note}# {entry}\n{_yaml(entries)}"


def accelerate(settings: Settings) -> dict[str, Any]:
    """The entries of a file for ``accelerate launch``: as many processes as GPUs, on one machine."""
    several = settings.num_gpus > 1
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if several else "NO",
        "mixed_precision": "no" if settings.precision == "fp32" else settings.precision,
        "num_machines": 1,
        "num_processes": settings.num_gpus,
        "machine_rank": 0,
        "gpu_ids": "all",
        "main_training_function": "main",
        "use_cpu": False,
        "debug": False,
        "downcast_bf16": "no",
        "same_network": True,
    }


def _yaml(entries: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return text
