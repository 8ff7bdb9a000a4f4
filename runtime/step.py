"""One training step, the same function for simulating, measuring and training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel, masking_utils

from shallowflow.planner.strategies import Configuration
from shallowflow.profiles import model_facts

from . import activations, attention, build, optimizers, precision, quantized, sharding, stages
from .gradients import add_rows
from .loss import chunked, summed
from .precision import LossScale
from .ranks import ALONE, Ranks
from .stages import Share

LEARNING_RATE = 2e-4
"""LoRA's usual one, as in the QLoRA paper for models up to 13B."""
FULL_LEARNING_RATE = 2e-5
"""Where every weight learns: that of Alpaca and Tulu (Taori et al.; Wang et al., 2023), and a tenth of LoRA's, as LoRA
Without Regret finds the best ones to be (Schulman et al., 2025)."""
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Token numbers and the labels to learn, both (micro batch, sequence length).

    Labels are already shifted: position ``t`` holds the token at ``t + 1``, or -100 where nothing is learned.

    Attributes:
        position_ids: of packed sequences, which begin at 0 with each document; None where each sequence is of one.
        seed: of all that is drawn at random in its passes; None leaves that to chance.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_targets: int
    position_ids: torch.Tensor | None = None
    seed: int | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return [t for t in (self.input_ids, self.labels, self.position_ids) if t is not None]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer update did: mean loss per target token, gradient norm before clipping, and whether it ran."""

    loss: float
    gradient_norm: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor that stays: its category, its path in the model, and the number of its decoder layer if any."""

    category: str
    path: str
    layer: int | None
    tensor: torch.Tensor


class Pipe(Protocol):
    """What takes micro-batches through a model that is cut, of which this process has a stage."""

    def passes(self, trainee: Trainee, micro_batches: Sequence[MicroBatch], num_targets: int) -> list[torch.Tensor]:
        """Forward and backward over every micro-batch; the losses on the last stage, each over *num_targets*."""

    def forward(
        self,
        trainee: Trainee,
        batches: Sequence[MicroBatch],
        last: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Forward over some micro-batches; on the last stage their summed losses, or what *last* makes; else zeros."""


@dataclass(slots=True)
class Trainee:
    """A model ready to train: its adapters, or all of its weights, with optimizer and loss scale.

    Attributes:
        dtype: of products, where every weight learns; None where an adapter does.
        head_apart: also a loss in one part is computed here, and not by the model.
        before_micro_batch: called where a step may still be given up, with nothing changed by it.
        ranks: the processes that share a step, each with a trainee like this one.
        in_step: whether they also share the weights, and so make every pass together.
        pipe: what takes micro-batches through the stages of a model that is cut; None where it is whole.
        names: of all parameters that learn, on whatever stage, in the order of the whole model.
    """

    model: torch.nn.Module
    layers: list[torch.nn.Module]
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    loss_chunks: int = 1
    before_micro_batch: Callable[[], None] = lambda: None
    ranks: Ranks = ALONE
    dtype: torch.dtype | None = None
    head_apart: bool = False
    in_step: bool = False
    pipe: Pipe | None = None
    names: tuple[str, ...] = ()

    def resident_tensors(self) -> list[Resident]:
        """Everything held between steps, but the optimizer's state."""
        owner = {id(m): index for index, layer in enumerate(self.layers) for m in layer.modules()}
        found: list[Resident] = []
        learned, frozen = ("adapter", "base weights") if self.dtype is None else ("weights", "weights")
        for path, module in self.model.named_modules():
            layer = owner.get(id(module))
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                category = learned if tensor.requires_grad else frozen
                found.append(Resident(category, f"{path}.{name}", layer, tensor))
            found += [Resident("quantization constants", path, layer, t) for t in quantized.constants(module)]
        return found

    def resident(self) -> list[torch.Tensor]:
        """Every tensor held between steps, the optimizer's state included."""
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*(item.tensor for item in self.resident_tensors()), *state]

    def prime(self) -> None:
        """Create the optimizer's state without a forward pass; for ``meta`` tensors, whose values do not matter."""
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, micro_batches: Sequence[MicroBatch], num_targets: int | None = None) -> StepOutcome:
        """Forward and backward over every micro-batch, then one optimizer update.

        The loss is the mean over all target tokens of the step, however they are spread over micro-batches and
        processes: *num_targets*, or None for those of *micro_batches*. All processes make the same update, or none.
        """
        num_targets = num_targets or sum(batch.num_targets for batch in micro_batches)
        if self.pipe is None:
            losses = [self._micro_step(batch, num_targets) for batch in micro_batches]
        else:
            self.before_micro_batch()
            losses = self.pipe.passes(self, micro_batches, num_targets)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bucket = self.ranks.bucket(gradients)
        if self.ranks.talks:  # a sum on devices would wait for a lost process: vote when all have their part
            self._told(losses, gradients)
        self.before_micro_batch()
        self.ranks.add_up(gradients, bucket)
        del bucket
        told = self.ranks.gathered(self._told(losses, gradients))
        norms = [each[-1] for each in told[: self.ranks.num_stages]]  # the first replica's, so that all clip alike
        norm = math.hypot(*norms) / self.loss_scale.value
        finite = math.isfinite(norm)
        if finite:
            clip = MAX_GRADIENT_NORM / norm if norm > MAX_GRADIENT_NORM else 1.0
            torch._foreach_mul_(gradients, clip / self.loss_scale.value)
            self.optimizer.step()
        del gradients
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflowed=not finite)
        return StepOutcome(sum(self.ranks.merged([each[:-1] for each in told])), norm, skipped=not finite)

    def _told(self, losses: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[float]:
        """The losses and the norm of all *gradients*, in one read, for which the host waits for the device."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        told: list[float] = torch.stack([*losses, norm]).cpu().tolist()
        return told

    def _micro_step(self, batch: MicroBatch, num_targets: int) -> torch.Tensor:
        self.before_micro_batch()
        if batch.seed is not None:
            torch.manual_seed(batch.seed)
        with not_asking_for_documents():
            if self.head_apart:
                loss = self._in_chunks(batch, factor=self.loss_scale.value / num_targets) / num_targets
            else:
                loss = self.loss(batch) / num_targets
        (loss * self.loss_scale.value).backward()
        return loss.detach()

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed cross-entropy over the target tokens, in fp32; where the model is cut, zero but on the last stage."""
        return self.after(batch) if self.pipe is None else self.pipe.forward(self, [batch])[0]

    def losses(self, batches: Sequence[MicroBatch]) -> list[float]:
        """The ``loss`` of each of some batches, through a model that is cut together."""
        found = map(self.loss, batches) if self.pipe is None else self.pipe.forward(self, batches)
        return [float(one) for one in found]

    def after(self, batch: MicroBatch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The loss after the model's layers, or after what is here of them, which follow what made *hidden*."""
        if self.loss_chunks > 1 or self.head_apart:
            return self._in_chunks(batch, hidden)
        taken = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
        if batch.position_ids is not None:
            taken["position_ids"] = batch.position_ids
        return summed(self.model(**taken, use_cache=False).logits, batch.labels)

    def _in_chunks(self, batch: MicroBatch, hidden: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
        chunk_tokens = -(-batch.labels.numel() // self.loss_chunks)
        inputs = batch.input_ids, batch.labels, chunk_tokens, batch.position_ids
        return chunked(self.model, *inputs, dtype=self.dtype, factor=factor, before=hidden)


@contextlib.contextmanager
def not_asking_for_documents() -> Iterator[None]:
    """Spare the host transformers' question whether positions begin anew within a sequence, which waits for the device.

    Where they do, attention is given its mask, and transformers does not ask.
    """
    asks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asks


def make_trainee(
    model: PreTrainedModel,
    configuration: Configuration,
    compute_dtype: str,
    device: torch.device | None = None,
    learning_rate: float = LEARNING_RATE,
    ranks: Ranks = ALONE,
    fill: sharding.Fill = lambda _module: None,
    share: Share | None = None,
) -> Trainee:
    """Turn a loaded base model into what *configuration* says: quantized, adapted, recomputing, with an optimizer.

    Where every weight learns, the model's are fp32, and multiplied in the compute dtype.

    The model is moved to *device* once its weights have their formats; None leaves it where it is. Where *ranks* share
    the weights, it is given each layer's by *fill* just before, and keeps its part of them. Of a *share* of the model
    alone, the others are on ``meta``, and gone once the adapter has been drawn as for the whole model.

    Raises:
        ValueError: the configuration does not match the model.
    """
    strategies, dtype = configuration.strategies(), build.DTYPES[compute_dtype]
    if configuration.packing:
        attention.pack(model, dtype)
    if configuration.sharding == "weights":
        sharding.share_out(model, strategies, compute_dtype, ranks, fill)
    else:
        build.apply_formats(model, strategies, compute_dtype)
    layers = build.decoder_layers(model)
    activations.apply_policies(model, layers, strategies)
    learner = _learner(model, configuration, dtype)
    if configuration.sharding == "weights":
        sharding.line_up(layers, strategies)
    names = tuple(name for name, parameter in learner.named_parameters() if parameter.requires_grad)
    if share is not None:
        stages.keep(learner, share)
        layers = [layers[number] for number in share.layers]
    if device is not None:
        learner.to(device)
    learner.train()
    parameters = [p for p in learner.parameters() if p.requires_grad]
    scale = LossScale.for_dtype(compute_dtype)
    if not configuration.is_full:
        optimizer = optimizers.make(configuration.optimizer, parameters, learning_rate)
        return Trainee(
            learner,
            layers,
            optimizer,
            scale,
            parameters,
            configuration.loss_chunks,
            ranks=ranks,
            in_step=configuration.sharding == "weights",
            names=names,
        )
    return Trainee(
        learner,
        layers,
        optimizers.make_full(configuration.optimizer, learner, learning_rate),
        scale,
        parameters,
        configuration.loss_chunks,
        ranks=ranks,
        dtype=dtype,
        head_apart=not model_facts.changes_logits(model.config.to_dict()),
        names=names,
    )


def _learner(model: PreTrainedModel, configuration: Configuration, dtype: torch.dtype) -> torch.nn.Module:
    """*model* with an adapter that learns, or with all of its weights learning."""
    c = configuration
    if c.rank is not None and c.alpha is not None and c.target_modules is not None and c.adapter != "full":
        return build.add_adapters(model, c.rank, c.alpha, c.adapter, c.target_modules)
    model.requires_grad_(True)
    add_rows(model)
    if dtype != torch.float32:
        precision.multiply_in(model, dtype)
    return model
