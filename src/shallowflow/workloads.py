"""What is asked for: a workload from its entries, whether it makes sense, and what it leaves to choose."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import msgspec

from shallowflow import packing
from shallowflow.planner import allowed, machines, money, quality, schedule, words
from shallowflow.planner.plan import Workload
from shallowflow.planner.strategies import Cell
from shallowflow.profiles import model_facts
from shallowflow.profiles.load import load_instances
from shallowflow.profiles.specs import GpuSpec, ModelSpec
from shallowflow.session import RequestError, Session


def workload_of(entries: Mapping[str, Any]) -> Workload:
    """A workload of these *entries*; RequestError where one is unknown or wrong."""
    try:
        wanted = msgspec.convert(dict(entries), type=Workload, strict=True)
    except msgspec.ValidationError as error:
        raise RequestError(f"bad workload: {error}") from None
    unknown = sorted(set(entries) - set(Workload.__dataclass_fields__))
    if unknown:
        near = difflib.get_close_matches(unknown[0], Workload.__dataclass_fields__, n=1)
        meant = f"did you mean {near[0]}? There" if near else "there"
        raise RequestError(f"unknown workload {unknown[0]!r}; {meant} are {', '.join(Workload.__dataclass_fields__)}")
    return wanted


def check(workload: Workload, model: ModelSpec, gpu: GpuSpec) -> None:
    """RequestError where *workload* contradicts itself, *model* or *gpu*."""
    check_stages(workload, model)
    if not stage_counts(workload, model):
        _refuse_batch(workload)
    if workload.loss_chunks is not None and workload.sequence_length % workload.loss_chunks:
        raise RequestError(
            f"{workload.loss_chunks} chunks do not divide a sequence of {workload.sequence_length} tokens; "
            "try a power of two"
        )
    if workload.sharding == "weights" and workload.num_gpus == 1:
        raise RequestError("--sharding weights shares them between GPUs, and there is one; try --gpus 2")
    if workload.sharding == "weights" and workload.adapter == "full":
        raise RequestError(
            "--sharding weights shares frozen weights, and with --adapter full all of them learn; try lora"
        )
    if workload.max_weight_error is not None and math.isnan(workload.max_weight_error):
        raise RequestError("max_weight_error is nan; give a number such as 0.05, or leave it out")
    check_method(workload)
    _check_machines(workload, gpu)
    _check_strategies(workload, gpu)
    if model_facts.is_mixture_of_experts(model.config):
        raise RequestError(f"{model.name} is a mixture of experts, which cannot be planned yet; try a dense model")
    offered = {price.region for instance in load_instances(gpu.name) for price in instance.prices}
    if offered and workload.region not in offered:
        raise RequestError(
            f"no prices of {gpu.title} instances in region {workload.region!r}; known: {', '.join(sorted(offered))}"
        )
    kind = str(model.config.get("model_type"))
    if gpu.compute_dtype == "float16" and model_facts.overflows_fp16(model.config):
        raise RequestError(
            f"{model.name} overflows in fp16 (model_type {kind}) and {gpu.title} has no bf16; "
            "try a GPU that has, such as --gpu l4"
        )
    rank = None if workload.adapter == "full" else workload.rank or workload.min_rank
    check_sizes(model, workload.sequence_length, rank)
    reason = packing.refusal(workload, model)
    if workload.packing and reason is not None:
        raise RequestError(f"documents for {model.name} cannot be packed: {reason}; try --no-packing")


def _check_machines(workload: Workload, gpu: GpuSpec) -> None:
    """RequestError where GPUs cannot be shared out over the machines, or none has so many."""
    number, each = workload.num_machines, workload.gpus_per_machine
    if workload.num_gpus % number:
        fewer = max(n for n in range(1, number) if workload.num_gpus % n == 0)
        raise RequestError(
            f"{words.counted(workload.num_gpus, 'GPU')} cannot be shared out over {number} machines; "
            f"try --nodes {fewer}"
        )
    offered = load_instances(gpu.name)
    if offered and not machines.suitable(offered, each):
        most = max(instance.num_gpus for instance in offered)
        raise RequestError(
            f"no machine has {each} x {gpu.title}, the largest {most}; "
            f"try --nodes {machines.fewest(offered, workload.num_gpus)}"
        )
    if number > 1 and workload.sharding == "weights":
        raise RequestError("--sharding weights is not planned over a network; leave it out, or try --nodes 1")


def check_method(workload: Workload) -> None:
    """RequestError where every weight shall learn, and something is said of an adapter, or of quantized weights."""
    if workload.adapter != "full":
        return
    usual = Workload()
    said = {
        "rank": workload.rank,
        "min_rank": workload.min_rank,
        "target_modules": workload.target_modules,
        "quantization": None if workload.quantization == "fp16" else workload.quantization,
        "double_quantization": workload.double_quantization or None,
    }
    for name, value in said.items():
        if value not in (None, getattr(usual, name)):
            raise RequestError(
                f"{name} is {value}, and adapter is full: every weight learns, in fp32 and without an adapter; "
                "leave it out, or give --adapter lora"
            )


def _refuse_batch(workload: Workload) -> NoReturn:
    """RequestError where GPUs cannot share the global batch."""
    if workload.global_batch_size % workload.num_gpus:
        raise RequestError(
            f"a global batch of {workload.global_batch_size} sequences does not divide over {workload.num_gpus} GPUs; "
            f"try --global-batch-size {math.ceil(workload.global_batch_size / workload.num_gpus) * workload.num_gpus}"
        )
    share = workload.global_batch_size // workload.num_gpus
    divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
    raise RequestError(
        f"micro-batches of {workload.micro_batch_size} do not divide the {share} sequences of one GPU's step; "
        f"try one of {divisors}"
    )


def _check_strategies(workload: Workload, gpu: GpuSpec) -> None:
    if allowed.strategies(workload, gpu):
        return
    if workload.activations == "offload" and gpu.device_type == "cpu":
        raise RequestError("a CPU has no other memory to offload to; try --fix activations=recompute")
    if workload.activations is not None and workload.activations.endswith("reusing weights"):
        raise RequestError(
            f"weights in {workload.quantization} are not dequantized to recompute with, so none are reused; "
            f"try --quantization nf4, or --fix activations={workload.activations.removesuffix(' reusing weights')!r}"
        )
    raise RequestError(
        f"weights in {workload.quantization} have no double quantization; "
        "try --quantization nf4, or --fix double_quantization=false"
    )


def check_sizes(model: ModelSpec, sequence_length: int, rank: int | None) -> None:
    """RequestError where *model* was not built for sequences so long, or a rank is so large that it saves nothing."""
    longest = model_facts.size(model.config, "max_position_embeddings")
    if longest is not None and sequence_length > longest:
        raise RequestError(
            f"sequence length {sequence_length} is more than the {longest} that {model.name} was built for; "
            f"try --sequence-length {longest}"
        )
    width = model_facts.size(model.config, "hidden_size")
    if width is not None and rank is not None and rank > width:
        raise RequestError(
            f"rank {rank} is more than the hidden size {width} of {model.name}; try a rank up to {width}"
        )


def space(
    session: Session, workload: Workload, num_stages: int = 1, num_parts: int = 1
) -> tuple[tuple[Cell, ...], int | None]:
    """The cells to search for *workload* in *num_stages* of *num_parts*, and the rank in all of them; None without."""
    divisible = not model_facts.changes_logits(session.model.config)
    if not divisible and (workload.loss_chunks or 1) > 1:
        raise RequestError(
            f"{session.model.name} changes its logits after the head, so its loss is not computed in chunks; "
            "try loss_chunks=1"
        )
    rank = workload.rank
    if rank is None and workload.adapter != "full":
        at_any, per_rank = session.adapter_parameters(workload.sequence_length, packing=workload.packing is True)
        rank = quality.enough_rank(workload.total_tokens, per_rank, workload.min_rank, at_any)
        widest = model_facts.size(session.model.config, "hidden_size") or rank
        rank = max(workload.min_rank, min(rank, widest))
    made = allowed.cells(
        workload, session.gpu, rank, divisible_loss=divisible, num_stages=num_stages, num_parts=num_parts
    )
    return made, rank


def check_stages(workload: Workload, model: ModelSpec) -> None:
    """RequestError where *workload* asks for stages that the GPUs, the batch or *model* do not allow."""
    wanted, gpus = workload.num_stages, workload.num_gpus
    if wanted is None or wanted == 1:
        _check_parts(workload, model)
        return
    if gpus % wanted:
        raise RequestError(
            f"{words.counted(gpus, 'GPU')} cannot hold {wanted} stages evenly; try --stages "
            f"{max(n for n in range(1, gpus + 1) if gpus % n == 0 and n <= wanted)} or --gpus {wanted}"
        )
    layers = model_facts.num_layers(model.config)
    if wanted > layers:
        raise RequestError(f"{model.name} has {layers} layers, too few for {wanted} stages; try --stages {layers}")
    _check_cut(workload, model, "--stages 1")
    if allowed.most_micro_batches(workload, wanted) < wanted:
        raise RequestError(
            f"{workload.global_batch_size} sequences over {words.counted(gpus // wanted, 'replica')} make fewer "
            f"micro-batches than {wanted} stages; try --global-batch-size {gpus * (workload.micro_batch_size or 1)}"
        )
    _check_parts(workload, model)


def _check_cut(workload: Workload, model: ModelSpec, instead: str) -> None:
    """RequestError where *model* cannot be cut, or not with what *workload* asks for besides."""
    reason = model_facts.why_not_cut(model.config)
    if reason is not None:
        raise RequestError(f"{model.name} cannot be cut into stages: {reason}; try {instead}")
    if workload.adapter == "full" or workload.sharding == "weights":
        other = "--adapter full" if workload.adapter == "full" else "--sharding weights"
        raise RequestError(f"{other} is not planned for models in stages; leave it out, or try {instead}")


def _check_parts(workload: Workload, model: ModelSpec) -> None:
    """RequestError where *workload* asks for parts that no number of stages that it allows of *model* can have."""
    parts, layers = workload.parts_per_stage, model_facts.num_layers(model.config)
    if parts in (None, 1):
        return
    if workload.num_gpus == 1:
        raise RequestError(
            f"parts_per_stage is {parts}, and one GPU holds the whole model; try --gpus 2, or leave it out"
        )
    _check_cut(workload, model, "--fix parts_per_stage=1")
    free = replace(workload, parts_per_stage=None)
    able = {n: allowed.part_counts(free, layers, n) for n in allowed.stage_counts(free, layers)}
    if any(parts in counts for counts in able.values()):
        return
    others = sorted({count for counts in able.values() for count in counts})
    pinned = "no number of stages" if workload.num_stages is None else words.counted(workload.num_stages, "stage")
    raise RequestError(
        f"parts_per_stage is {parts}, and {pinned} of {model.name}, of {layers} layers, can be planned with as many: "
        f"they are equal, at most {schedule.MOST_PARTS}, and {workload.global_batch_size} sequences make full rounds "
        f"of micro-batches; try one of {', '.join(map(str, others or [1]))}"
    )


def part_counts(workload: Workload, model: ModelSpec, num_stages: int) -> tuple[int, ...]:
    """Into how many parts each of *num_stages* of *model* may be divided."""
    return allowed.part_counts(workload, model_facts.num_layers(model.config), num_stages)


def stage_counts(workload: Workload, model: ModelSpec) -> tuple[int, ...]:
    """Into how many stages *model* may be cut for *workload*, one first."""
    found = allowed.stage_counts(workload, model_facts.num_layers(model.config))
    if workload.parts_per_stage is not None:
        found = tuple(n for n in found if part_counts(workload, model, n))
    whole = workload.adapter == "full" or workload.sharding == "weights"
    if whole or model_facts.why_not_cut(model.config) is not None:
        return tuple(n for n in found if n == 1)
    return found


def deadline_hours(workload: Workload, gpu: GpuSpec) -> float | None:
    """When the run must be over, for the time or for the money."""
    if workload.budget_usd is None:
        return workload.deadline_hours
    hours = money.hours_for(workload.budget_usd, load_instances(gpu.name), workload)
    if hours is None:
        raise RequestError(f"no shipped instance has {workload.num_gpus} x {gpu.title}, so --budget-usd has no price")
    return hours if workload.deadline_hours is None else min(hours, workload.deadline_hours)
