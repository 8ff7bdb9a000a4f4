"""What a plan's numbers leave out, and a user should know."""

from __future__ import annotations

from collections.abc import Mapping

from shallowflow.planner import words
from shallowflow.planner.plan import Candidate, Plan, Workload
from shallowflow.profiles.load import load_instances
from shallowflow.profiles.specs import GpuSpec
from shallowflow.session import Session


def _time_note(gpu: GpuSpec) -> str:
    """How far the seconds can be trusted, and why."""
    return f"Seconds: give or take {gpu.step_error:.0%}: {gpu.sources['step_error'].text}."


def _order(chosen: Candidate) -> str:
    """Of micro-batches through stages."""
    return "interleaved 1F1B" if chosen.configuration.parts_per_stage > 1 else "1F1B"


def of(session: Session, workload: Workload, shown: tuple[Candidate, ...]) -> tuple[str, ...]:
    """What the numbers leave out and a user should know."""
    notes = [_time_note(session.gpu)]
    formats = {strategy.weight_format for c in shown for strategy in c.configuration.strategies()}
    if "int8" in formats and session.gpu.device_type == "cuda":
        notes.append(
            "No step with int8 weights was recorded on a GPU: their products are priced as fp16's, which is a guess."
        )
    if workload.adapter == "full" and session.gpu.device_type == "cuda":
        notes.append(
            "No step in which every weight learns was recorded on a GPU: its bytes are traced like any other's, and "
            "its seconds follow from the rates of LoRA's."
        )
    policies = {strategy.activations for c in shown for strategy in c.configuration.strategies()}
    if "offload" in policies:
        notes.append(
            "No step with offloaded activations was recorded on a GPU: their copies are priced at the link's rate, "
            "beside the computing of their layer."
        )
    if session.gpu.device_type == "cpu" and workload.optimizer == "adamw8bit":
        notes.append("On a CPU the update of an optimizer in 8 bits takes several times as long as is predicted here.")
    if shown[0].configuration.num_stages > 1:
        notes.append(
            f"Stages run under PyTorch's {_order(shown[0])} and are taken to wait for every message. What NCCL holds "
            "beside PyTorch's memory is left out, and no such step was timed on GPUs."
        )
    elif workload.num_gpus > 1:
        shared = shown[0].configuration.sharding == "weights"
        held = "a part of every frozen matrix, which is gathered before its use" if shared else "the model"
        notes.append(
            f"Several GPUs are data parallel: each holds {held}, and gradients are added up at the end of a step. "
            "What NCCL holds beside PyTorch's memory is left out, and no such step was timed on GPUs."
        )
    hosts = [i for i in load_instances(session.gpu.name) if i.num_gpus >= workload.num_gpus]
    cheapest = min(hosts, key=lambda i: i.ram_bytes, default=None)
    bits = 32 if workload.adapter == "full" else 16
    weights = session.num_parameters() * bits // 8
    if cheapest is not None and weights > cheapest.ram_bytes:
        notes.append(
            f"The weights in {bits} bits ({weights / 2**30:.1f} GiB) exceed the RAM of {cheapest.name} "
            f"({cheapest.ram_bytes / 2**30:.0f} GiB): load them shard by shard."
        )
    return tuple(notes)


def compared(workload: Workload, tried: Mapping[tuple[int, int], Plan | None]) -> str:
    """What came of each number of stages and of their parts that was *tried*."""
    limited = any((workload.deadline_hours, workload.budget_usd, workload.max_weight_error is not None))
    failed = "no better or not within the limits" if limited else "no better or too large"
    shown = ((cut, made) for cut, made in sorted(tried.items()) if made is not None or cut[1] == 1)
    return f"Compared: {'; '.join(_outcome(*cut, made, failed) for cut, made in shown)}."


def _outcome(num_stages: int, num_parts: int, made: Plan | None, failed: str) -> str:
    name = "every GPU with the whole model" if num_stages == 1 else words.counted(num_stages, "stage")
    name += f" of {num_parts} parts" if num_parts > 1 else ""
    return f"{name}, {failed if made is None else f'{words.duration(made.prediction.step_seconds)} a step'}"
