"""A training step on ``meta``: the trainer's own step, with made-up batches, for the profiler to trace."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shallowflow.planner.memory_record import Timeline
from shallowflow.planner.plan import Plan
from shallowflow.planner.profiler.kernels import Target, register_bitsandbytes
from shallowflow.planner.profiler.simulate import traced_timeline
from shallowflow.planner.strategies import Configuration, StrategyRun, traced_micro_batches, untraced_messages
from shallowflow.profiles import load_gpu

from . import attention, build, evaluate, pipeline, quantized, stages
from .ranks import ALONE, Ranks
from .step import MicroBatch, Resident, StepOutcome, Trainee, make_trainee

SHOWN_MICRO_BATCHES = 3
"""In a timeline; those between the first and the last are alike."""


@dataclass(slots=True)
class MetaStep:
    """A trainee with made-up batches, for the profiler to trace.

    Attributes:
        evaluation_micro_batch_size: sequences that are evaluated at once; None for those of a micro-batch.
    """

    trainee: Trainee
    micro_batches: list[MicroBatch]
    evaluation_micro_batch_size: int | None = None

    @property
    def model(self) -> torch.nn.Module:
        """The model that learns."""
        return self.trainee.model

    @property
    def layers(self) -> list[torch.nn.Module]:
        """Its decoder layers."""
        return self.trainee.layers

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of what learns."""
        return self.trainee.optimizer

    @property
    def attention(self) -> str:
        """The attention that the model took."""
        return attention.shown(str(getattr(self.trainee.model.config, "_attn_implementation", "eager")))

    def resident_tensors(self) -> list[Resident]:
        """Everything held between steps, but the optimizer's state."""
        return self.trainee.resident_tensors()

    def prime(self) -> None:
        """Create the optimizer's state."""
        self.trainee.prime()

    def run(self, num_micro_batches: int | None = None) -> StepOutcome:
        """One optimizer update over the first *num_micro_batches*; None for all.

        Of a stage some more, so that one is held while another comes, as in any step of a pipeline.
        """
        if isinstance(self.trainee.pipe, pipeline.Line) and num_micro_batches is not None:
            num_micro_batches = self.trainee.pipe.fewest(num_micro_batches)
        return self.trainee.step(self.micro_batches[:num_micro_batches])

    def update_alone(self) -> None:
        """Let the update be one process's, whatever passes are shared: what sums take is no polynomial of the rank."""
        self.trainee.ranks = ALONE

    def evaluate(self) -> object:
        """The loss of one micro-batch, without gradients."""
        first, size = self.micro_batches[0], self.evaluation_micro_batch_size
        batch = replace(first, input_ids=first.input_ids[:size], labels=first.labels[:size])
        return evaluate.loss(self.trainee, batch)


def register_quantization() -> None:
    """Import bitsandbytes with ``torch.compile`` out of the way, and make its operators known to the profiler.

    It wraps a few CPU kernels when imported, which alone loads the whole compiler: a second, for kernels that never
    run on ``meta``. It falls back to the plain functions by itself.
    """
    if "bitsandbytes" not in sys.modules:
        compiler = torch.compile
        torch.compile = _no_compiler
        try:
            quantized.bitsandbytes()
        finally:
            torch.compile = compiler
    register_bitsandbytes()


def _no_compiler(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("nothing is compiled while simulating")


def make_meta_step(
    model_config: Mapping[str, Any],
    configuration: Configuration,
    compute_dtype: str,
    num_micro_batches: int,
    like_layer: int | None = None,
    stage: int = 0,
) -> MetaStep:
    """The training step of *configuration* on ``meta``, with as many layers as the configuration has.

    They are those of the model, or all like its layer *like_layer*. Where it is cut, the step is that of one *stage*,
    of which the other layers are never made.
    """
    register_quantization()
    share = stages.share_of(configuration, stage)
    if share is None:
        config = build.transformers_config(model_config, configuration.num_layers, like_layer)
    else:
        config = build.some_layers(model_config, share.layers)
        share, configuration = share.alone(), _cut(configuration, share.layers)
    ranks = Ranks(rank=stage, size=configuration.num_gpus).staged(configuration.num_stages)
    model = build.empty_model(config, build.weights_dtype(configuration, compute_dtype), "meta")
    trainee = make_trainee(model, configuration, compute_dtype, ranks=ranks, share=share)
    pipeline.connected(trainee, share, ranks, build.DTYPES[compute_dtype])
    if isinstance(trainee.pipe, pipeline.Line):
        trainee.pipe.unseen = untraced_messages(configuration, stage, num_micro_batches)
    shape = (configuration.micro_batch_size, configuration.sequence_length)
    batches = []
    for _ in range(num_micro_batches):
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        positions = torch.empty_like(tokens) if configuration.packing else None
        batches.append(MicroBatch(tokens, torch.empty_like(tokens), math.prod(shape), positions))
    return MetaStep(trainee, batches)


def make_stage_step(
    model_config: Mapping[str, Any], configuration: Configuration, compute_dtype: str, stage: int = 0
) -> MetaStep:
    """The training step of *configuration* on ``meta``, or of one *stage* where it is cut, that shows all it takes."""
    number = traced_micro_batches(configuration, stage)
    return make_meta_step(model_config, configuration, compute_dtype, number, stage=stage)


def _cut(configuration: Configuration, layers: Sequence[int]) -> Configuration:
    """*configuration* of these *layers* alone."""
    strategies = configuration.strategies()
    runs = [StrategyRun(first=n, last=n, strategy=strategies[layer]) for n, layer in enumerate(layers)]
    return replace(configuration, layers=tuple(runs))


def step_timeline(plan: Plan) -> Timeline:
    """The allocator over one whole step of *plan*, as it is predicted; of stages, the one that reserves most."""
    configuration, peaks = plan.configuration, [stage.peak_reserved_bytes for stage in plan.prediction.stages]
    target, stage = Target.of(load_gpu(plan.gpu)), peaks.index(max(peaks)) if peaks else 0
    shown = max(SHOWN_MICRO_BATCHES, traced_micro_batches(configuration, stage))
    number = min(configuration.gradient_accumulation_steps, shown)
    step = make_meta_step(plan.model_config, configuration, plan.compute_dtype, number, stage=stage)
    return traced_timeline(step, target)
