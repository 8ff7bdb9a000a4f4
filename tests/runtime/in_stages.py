"""Processes that hold the stages of one model, and what they come to; asked as ``several`` is."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file

import shallowflow
from shallowflow.planner.plan import Plan
from shallowflow.planner.strategies import Activations, Configuration, Strategy, StrategyRun
from shallowflow.runtime import build, joining, pipeline, quantized
from shallowflow.runtime.evaluate import mean_loss
from shallowflow.runtime.learner import Learner
from shallowflow.runtime.run import RunRequest
from shallowflow.runtime.stages import share_of
from shallowflow.runtime.step import Trainee, make_trainee
from tests.runtime import tiny
from tests.runtime.several import LEARNING_RATE, NUM_STEPS, in_processes, trained

NUM_LAYERS = 5
CONFIG = {**tiny.CONFIG, "num_hidden_layers": NUM_LAYERS}


@functools.cache
def place(tied: bool = True, num_layers: int = NUM_LAYERS) -> Path:
    """A folder with a model of some layers, data of many lengths, and text that is held out."""
    folder = Path(tempfile.mkdtemp())
    tiny.save(folder / "model", {**CONFIG, "num_hidden_layers": num_layers, "tie_word_embeddings": tied})
    lines = [line[: 20 + 11 * number % 100] for number, line in enumerate(tiny.LINES)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "held.txt").write_text(tiny.LINES[2][:60] + tiny.LINES[0])
    return folder


@functools.cache
def planned(
    num_gpus: int,
    num_stages: int,
    quantization: str = "fp16",
    *,
    tied: bool = True,
    num_layers: int = NUM_LAYERS,
    **asked: Any,
) -> Plan:
    """The model's plan for so many CPUs, each with a stage."""
    return shallowflow.plan(
        str(place(tied, num_layers) / "model"),
        "cpu",
        num_gpus=num_gpus,
        num_stages=num_stages,
        quantization=quantization,
        micro_batch_size=1,
        double_quantization=False if quantization == "nf4" else None,
        sequence_length=asked.pop("sequence_length", 128),
        global_batch_size=8,
        rank=8,
        **asked,
    )


def request(output: str, *, tied: bool = True, num_layers: int = NUM_LAYERS, **changes: Any) -> RunRequest:
    """Learn the data, into the folder *output*."""
    folder = place(tied, num_layers)
    wanted = {
        "data": folder / "data.jsonl",
        "weights": folder / "model",
        "output": folder / output,
        "num_steps": NUM_STEPS,
        "learning_rate": LEARNING_RATE,
        **changes,
    }
    return RunRequest(**wanted)


def saved_adapter(output: Path) -> dict[str, torch.Tensor]:
    """What a run has written for PEFT."""
    return load_file(output / "adapter" / "adapter_model.safetensors")


def _trained(plan: Plan, wanted: RunRequest, _rank: int) -> dict[str, Any]:
    return trained(plan, wanted)


# What may be asked for


def alike(quantization: str, shapes: list[list[int]], asked: dict[str, Any]) -> dict[str, Any]:
    """The same run in one process and in those of each of *shapes*, of GPUs and stages; and what was predicted."""
    found: dict[str, Any] = {"runs": [], "predicted": [], "adapters": []}
    alone: dict[str, torch.Tensor] = {}
    model: dict[str, Any] = {"tied": asked.pop("tied", True), "num_layers": asked.pop("num_layers", NUM_LAYERS)}
    for gpus, stages, *parts in ([1, 1], *shapes):
        cut = {"parts_per_stage": parts[0]} if parts else {}
        plan = planned(gpus, stages, quantization, **model, **cut, **asked)
        output = f"{quantization}{gpus}{stages}{parts}{sorted(asked)}"
        evaluated = {"eval_data": place(**model) / "held.txt", "eval_every": 4, "samples": ("the cat",)}
        wanted = request(output, **{**model, **evaluated})
        found["runs"].append(in_processes(gpus, functools.partial(_trained, plan, wanted)))
        told = plan.prediction.stages or (plan.prediction,)
        found["predicted"].append([one.peak_allocated_bytes for one in told])
        made = saved_adapter(wanted.output)
        alone = alone or made
        same = made.keys() == alone.keys()
        found["adapters"].append(max(float((made[n] - alone[n]).abs().max()) for n in alone) if same else None)
    return found


def moved(steps: list[list[int]], num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """A run that goes on in other numbers of GPUs and stages, each up to a step; and the same in one go.

    Of no stages, the GPUs share the weights; a fourth number is of the parts of a stage.
    """
    plan_of = functools.partial(planned, num_layers=num_layers)
    wanted = request("moved", num_layers=num_layers)
    found: list[Any] = []
    for gpus, stages, until, *parts in steps:
        now = replace(wanted, num_steps=until, resume=True)
        cut = {"parts_per_stage": parts[0]} if parts else {}
        plan = plan_of(gpus, stages, **cut) if stages else plan_of(gpus, 1, sharding="weights")
        found = in_processes(gpus, functools.partial(_trained, plan, now))
    whole = functools.partial(_trained, plan_of(1, 1), request("in one go", num_layers=num_layers))
    return {"moved": found, "whole": in_processes(1, whole)}


def struck(rank: int, number: int, after: int) -> dict[str, Any]:
    """A run in two stages, one of whose processes gets a signal after some steps; resumed; and undisturbed."""
    wanted = request(f"struck{rank}{number}", save_every=1)

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) == after and learner.work.ranks.rank == rank:
            os.kill(os.getpid(), number)

    first = in_processes(2, lambda _rank: trained(planned(2, 2), wanted, strike))
    saved = sorted(path.name for path in (wanted.output / "checkpoints").glob("step-*"))
    again = in_processes(2, lambda _rank: trained(planned(2, 2), replace(wanted, resume=True)))
    return {"first": first, "saved": saved, "again": again, "whole": undisturbed()}


@functools.cache
def undisturbed() -> list[Any]:
    """The run in two stages that nothing disturbs."""
    return in_processes(2, functools.partial(_trained, planned(2, 2), request("undisturbed")))


def short_of_memory(rank: int, where: str, parts: int = 1) -> Any:
    """A run in two stages, one of whose processes finds no memory in a pass of the fourth step."""
    cut: dict[str, Any] = {"num_layers": 4, "parts_per_stage": parts} if parts > 1 else {}
    wanted = request(f"short{rank}{where}{parts}", num_layers=cut.get("num_layers", NUM_LAYERS))

    def strike(learner: Learner) -> None:
        if len(learner.progress.steps) != 3 or learner.work.ranks.rank != rank or learner.progress.fallbacks:
            return
        layer = learner.trainee.layers[-1]
        if where == "forward":
            layer.register_forward_pre_hook(_no_memory)
        else:
            layer.register_full_backward_pre_hook(_no_memory)

    return in_processes(2, lambda _rank: trained(planned(2, 2, **cut), wanted, strike))


def _no_memory(*_args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def steps_of_every_kind() -> list[Any]:
    """For each way to store and save: loss and norm of two steps in one process and in two stages, and evaluated."""
    policies = [policy for policy in get_args(Activations) if "reusing" not in policy]
    kinds = [*itertools.product(("fp32", "nf4", "int8"), policies)]
    kinds += [("nf4", policy) for policy in get_args(Activations) if "reusing" in policy]
    return [_steps_of(*kind, chunks) for kind, chunks in zip(kinds, itertools.cycle((1, 4)), strict=False)]


def _steps_of(weight_format: Any, policy: Any, chunks: int) -> Any:
    runs = [
        StrategyRun(first=0, last=1, strategy=Strategy(weight_format=weight_format, activations=policy)),
        StrategyRun(first=2, last=4, strategy=Strategy(weight_format="fp32", activations="save")),
    ]
    whole = replace(tiny.configuration(), layers=tuple(runs), loss_chunks=chunks, gradient_accumulation_steps=3)

    def alone(_rank: int) -> Any:
        return _two_steps(make_trainee(tiny.base(num_hidden_layers=NUM_LAYERS), whole, "float32", tiny.CPU))

    def cut(rank: int) -> Any:
        return _two_steps(staged(replace(whole, num_gpus=2, stages=(0, 3)), rank))

    return [*in_processes(1, alone), *in_processes(2, cut)]


def staged(configuration: Configuration, rank: int) -> Trainee:
    """The trainee of one stage of the tiny model of five layers, as a run makes it."""
    ranks = joining.join().staged(configuration.num_stages)
    share = share_of(configuration, ranks.stage)
    torch.manual_seed(0)
    model = tiny.base(num_hidden_layers=NUM_LAYERS)
    torch.manual_seed(0)
    made = make_trainee(model, configuration, "float32", tiny.CPU, share=share)
    return pipeline.connected(made, share, ranks, torch.float32)


def _two_steps(trainee: Trainee) -> list[float]:
    """Losses and norms of two updates over micro-batches of three lengths, and of an evaluation after them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainee.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=_maker(name)) * 0.05)
    found: list[float] = []
    for number in range(2):
        batches = [tiny.random_batch([9, length], length, seed=number) for length in (16, 12, 10)]
        outcome = trainee.step(batches)
        found += [outcome.loss, outcome.gradient_norm]
    windows = [tiny.window(list(range(n, n + 12))) for n in range(5)]
    return [*found, mean_loss(trainee, windows, 2, tiny.CPU)]


def _maker(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def overflowing() -> list[Any]:
    """Two stages in fp16, the second of which has an infinite gradient in the first of two steps."""
    configuration = replace(
        tiny.configuration(num_layers=NUM_LAYERS), gradient_accumulation_steps=2, num_gpus=2, stages=(0, 2)
    )

    def work(rank: int) -> Any:
        ranks = joining.join().staged(2)
        share = share_of(configuration, ranks.stage)
        model = tiny.base("float16", num_hidden_layers=NUM_LAYERS)
        trainee = make_trainee(model, configuration, "float16", tiny.CPU, share=share)
        pipeline.connected(trainee, share, ranks, torch.float16)
        if rank == 1:
            hook = trainee.parameters[0].register_hook(lambda gradient: gradient + float("inf"))
        batches = [tiny.random_batch([16, 16], seed=number) for number in range(2)]
        outcomes = [trainee.step(batches)]
        if rank == 1:
            hook.remove()
        outcomes.append(trainee.step(batches))
        return [[one.skipped, one.loss, trainee.loss_scale.value] for one in outcomes]

    return in_processes(2, work)


def main() -> None:
    """Answer each line on standard input."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    joining.PATIENCE = datetime.timedelta(seconds=60)
    quantized.bitsandbytes()
    build.add_adapters(tiny.base(), rank=1, alpha=1)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
