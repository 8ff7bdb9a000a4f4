"""What int8 and nf4 change in a model's own weights, read and stored one matrix at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shallowflow.planner.weighed import LayerErrors, Weighed
from shallowflow.profiles.specs import ModelSpec

from . import build, quantized, weighed
from .sources import WeightsError, WeightsSource, weights_at_hand, weights_files
from .stored import Read, reading
from .weights import check_config

FORMATS: dict[str, tuple[Literal["int8", "nf4"], bool]] = {
    "int8": ("int8", False),
    "nf4": ("nf4", False),
    "double_quantized": ("nf4", True),
}
"""By the errors' names: the weight format, and whether its constants are quantized."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear module's weight: its name in the model, and whether it is held transposed, as GPT-2's are."""

    name: str
    is_transposed: bool


def weigh(
    model: ModelSpec, weights: Path | None = None, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Weighed:
    """The errors that every format makes in the weights of *model*, layer by layer; kept, so that plans use them.

    Each layer is kept under the digest of its weights as soon as it is done, so that another call goes on from there.

    Args:
        weights: a folder or .gguf file; None for those beside the model's configuration, in a package, or downloaded.
        progress: told how many layers are done, and how many there are.

    Raises:
        FactsError, WeightsError: the model cannot be built; the weights are not here, or are another model's.
    """
    source = weights_at_hand(model, weights)
    check_config(source, model.config)
    empty = build.empty_model(build.transformers_config(model.config), "float32", "meta")
    read = reading(source, empty)
    digest, found = hashlib.sha256(), []
    layers = list(_matrices(empty))
    for number, matrices in enumerate(layers):
        progress(number, len(layers))
        own = _digest(read, matrices)
        errors = weighed.layer_errors(own)
        if errors is None:
            errors = _errors(read, matrices, source)
            weighed.keep_layer(own, errors)
        digest.update(own.encode())
        found.append(errors)
    made = Weighed(digest=digest.hexdigest(), layers=tuple(found))
    weighed.record(model, weights_files(source), made)
    return made


def _matrices(empty: PreTrainedModel) -> Iterator[list[Matrix]]:
    """For each decoder layer the weights that quantizing stores anew."""
    names = {id(module): name for name, module in empty.named_modules()}
    for layer in build.decoder_layers(empty):
        linears = [module for module in layer.modules() if quantized.is_linear(module)]
        yield [Matrix(f"{names[id(module)]}.weight", isinstance(module, Conv1D)) for module in linears]


def _digest(read: Read, matrices: Sequence[Matrix]) -> str:
    found = hashlib.sha256()
    for matrix in matrices:
        weight = read(matrix.name).contiguous()
        found.update(f"{tuple(weight.shape)} {weight.dtype} {matrix.is_transposed}".encode())
        found.update(weight.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _errors(read: Read, matrices: Sequence[Matrix], source: WeightsSource) -> LayerErrors:
    """Of all of a layer's weights together: the root of what squares are lost over all squares."""
    total, lost = 0.0, dict.fromkeys(FORMATS, 0.0)
    for matrix in matrices:
        weight = read(matrix.name).float()
        weight = weight.t().contiguous() if matrix.is_transposed else weight
        total += _square(weight)
        for name, (weight_format, twice) in FORMATS.items():
            lost[name] += _square(quantized.stored(weight, weight_format, double_quantization=twice) - weight)
        if not math.isfinite(total):
            raise WeightsError(f"{matrix.name} at {source.location} holds what is no number; give whole --weights")
    found: dict[str, Any] = {name: math.sqrt(square / total) if total else 0.0 for name, square in lost.items()}
    return LayerErrors(**found)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
