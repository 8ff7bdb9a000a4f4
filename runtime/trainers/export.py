"""A plan for another trainer: as near to it as that trainer's settings come, and what they cannot say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from runtime import build
from shallowflow.planner import words
from shallowflow.planner.plan import Plan
from shallowflow.profiles import GpuSpec, ModelSpec

from . import axolotl, llamafactory, written
from .check import Outcome, leaner, predict
from .settings import TITLES, Dtype, Packing, Precision, Quantized, Settings, Tool

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
    plan: Plan, target: Target, data: Path, gpu: GpuSpec, progress: Callable[[str], None] = lambda _said: None
) -> Exported:
    """*plan* for *target*, with rows of *data*, leaner than the plan where *target* needs more memory for the same.

    Raises:
        InexpressibleError: nothing that *target* can say fits on the GPU.
    """
    tool: Tool = "trl" if target == "accelerate" else target
    wanted = nearest(plan, tool, gpu)
    model = ModelSpec(name=plan.model_name, config=plan.model_config)
    for settings in leaner(wanted):
        progress(f"{settings.micro_batch_size} sequences at once")
        outcome = predict(settings, model.config, gpu)
        if outcome.peak_process_bytes <= plan.budget_bytes + gpu.context_bytes:
            break
    else:
        raise InexpressibleError(
            f"with {TITLES[tool]} nothing near this plan fits in {words.gib(plan.memory_bytes)}: the leanest takes "
            f"{words.gib(outcome.peak_process_bytes)}; `sfplan train` runs the plan itself"
        )
    cannot = _cannot(plan, settings, wanted, outcome)
    head = _head(plan, tool, settings, outcome, cannot)
    return Exported(text=head + _body(plan, target, settings, data), settings=settings, outcome=outcome, cannot=cannot)


def nearest(plan: Plan, tool: Tool, gpu: GpuSpec) -> Settings:
    """What of *plan* the settings of *tool* can say."""
    configuration = plan.configuration
    strategies = configuration.strategies()
    formats = {strategy.weight_format for strategy in strategies}
    quantization: Quantized = "nf4" if "nf4" in formats else "int8" if "int8" in formats else "none"
    dtype: Dtype = plan.compute_dtype
    packing: Packing = "separate" if configuration.packing and tool in ("llamafactory", "unsloth") else "none"
    return Settings(
        tool=tool,
        model=plan.model_name,
        sequence_length=configuration.sequence_length,
        micro_batch_size=configuration.micro_batch_size,
        gradient_accumulation_steps=configuration.gradient_accumulation_steps,
        num_gpus=configuration.num_gpus,
        quantization=quantization,
        double_quantization=quantization == "nf4"
        and all(s.double_quantization for s in strategies if s.weight_format == "nf4"),
        weights_dtype="float32" if configuration.is_full else dtype,
        product_dtype=dtype,
        precision=_PRECISIONS[dtype],
        adapter=configuration.adapter,
        rank=configuration.rank,
        alpha=configuration.alpha,
        target_modules=_modules(plan),
        recomputes=any(strategy.activations != "save" for strategy in strategies),
        attention=REPEATING if tool == "trl" and gpu.device_type == "cuda" else "sdpa",
        loss={"trl": "tiled", "unsloth": "parts"}.get(tool, "whole"),  # type: ignore[arg-type]
        packing=packing,
        longest_first=packing == "none",
        optimizer="adamw_bnb_8bit" if configuration.optimizer == "adamw8bit" else "adamw_torch",
        learning_rate=2e-5 if configuration.is_full else 2e-4,
        initial_scale=1024.0 if tool == "trl" else 65536.0,
    )


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
    if configuration.packing and settings.packing == "none":
        said.append(f"the plan packs documents; {title} keeps packed ones apart with FlashAttention alone")
    if configuration.sharding == "weights":
        said.append(f"the plan shares the base's weights among {configuration.num_gpus} GPUs; here each holds them all")
    if settings.micro_batch_size != wanted.micro_batch_size:
        said.append(
            f"{wanted.micro_batch_size} sequences at once do not fit with {title}; {settings.micro_batch_size} do, "
            "with the same global batch"
        )
    if settings.quantization != wanted.quantization:
        said.append(f"with {title} the base fits in {settings.quantization} only")
    if settings.precision == "fp16" and settings.initial_scale > 1024:
        said.append(f"{title} begins with a loss scale of 65536, which the first updates overflow: warm up longer")
    if settings.attention == "sdpa" and settings.tool not in ("unsloth",) and plan.compute_dtype == "float16":
        said.append(
            f"{title} gives SDPA fewer KV heads than query heads; a T4's kernel refuses that, and scores are made whole"
        )
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


def _body(plan: Plan, target: Target, settings: Settings, data: Path) -> str:
    if target == "axolotl":
        return _yaml(axolotl.write(settings, str(data)))
    if target == "llamafactory":
        return _yaml(llamafactory.write(settings, data.stem))
    if target == "accelerate":
        return _yaml(accelerate(settings))
    seed = 0
    if target == "trl":
        return written.trl(settings, data, seed)
    return written.unsloth(settings, data, seed, build.adapter_targets(_one_layer(plan)))


def _one_layer(plan: Plan) -> Any:
    return build.empty_model(build.transformers_config(plan.model_config, 1), "float32", "meta")


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
