"""Single tensors of a model's weights, read from safetensors or GGUF when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .sources import WeightsError, WeightsSource, weights_files

Read = Callable[[str], torch.Tensor]
"""A tensor by its name in the model."""


def reading(source: WeightsSource, model: PreTrainedModel) -> Read:
    """How to read the tensors of *model* from *source*, one at a time.

    Raises:
        WeightsError: the files are no weights; or later, a tensor is missing.
    """
    try:
        found = _in_gguf(source, model) if source.gguf_file else _in_safetensors(source, model)
    except Exception as error:  # readers of two formats raise a dozen kinds
        first = str(error).strip().split("\n")[0]
        raise WeightsError(f"cannot read {source.location}: {first}; give whole weights with --weights") from error

    def read(name: str) -> torch.Tensor:
        if name not in found:
            raise WeightsError(f"the weights at {source.location} lack {name}; give whole, plain ones with --weights")
        return found[name]()

    return read


def _in_safetensors(source: WeightsSource, model: PreTrainedModel) -> dict[str, Callable[[], torch.Tensor]]:
    """Under the model's names, which a file of the bare decoder has without the model's first part, or the reverse."""
    from safetensors import safe_open

    found: dict[str, Callable[[], torch.Tensor]] = {}
    prefix = f"{model.base_model_prefix}."
    for path in weights_files(source):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            load = _loader(path, name)
            for known in (name, prefix + name, name.removeprefix(prefix)):
                found.setdefault(known, load)
    return found


def _loader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    from safetensors import safe_open

    def load() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return load


def _in_gguf(source: WeightsSource, model: PreTrainedModel) -> dict[str, Callable[[], torch.Tensor]]:
    """As transformers reads them (its ``load_gguf_checkpoint``), but for holding all at once."""
    from gguf import GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils

    hf: Any = modeling_gguf_pytorch_utils
    (path,) = weights_files(source)
    reader = GGUFReader(str(path))
    config = hf.load_gguf_checkpoint(str(path))["config"]
    kind = hf.read_field(reader, "general.architecture")[0]
    processor = hf.TENSOR_PROCESSORS.get(kind, hf.TensorProcessor)(config=config)
    names = hf.get_gguf_hf_weights_map(model, processor)

    def loader(tensor: Any) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            numbers = dequantize(tensor.data, tensor.tensor_type)
            made = processor.process(
                weights=numbers, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            return torch.from_numpy(np.copy(made.weights))

        return load

    return {names[tensor.name]: loader(tensor) for tensor in reader.tensors if tensor.name in names}
