"""Load a model's weights, and the tokenizer that belongs to them, and write both."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from . import attention, build
from .build import DTYPES, empty_model, transformers_config
from .files import new_folder
from .sources import WeightsError, WeightsSource, find_weights
from .stages import Share, parts
from .stored import Read, reading

__all__ = [
    "WeightsError",
    "WeightsSource",
    "begin_loading",
    "find_weights",
    "load_share",
    "load_tokenizer",
    "load_weights",
    "plain",
    "write_model",
]


def load_weights(
    source: WeightsSource, config: Mapping[str, Any], compute_dtype: str, num_parameters: int
) -> PreTrainedModel:
    """The base model with real weights in *compute_dtype*, frozen, on the CPU, with the attention of its plan.

    Raises:
        WeightsError: they cannot be had, or have another number of parameters than the plan's model.
    """
    planned = transformers_config(config)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=DTYPES[compute_dtype],
                attn_implementation=attention.best_for(planned),
                use_safetensors=True,
                output_loading_info=True,
                **source.arguments(),
            )
    except Exception as error:  # readers of three formats raise a dozen kinds
        raise WeightsError(_unavailable(source, error)) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    model.tie_weights()
    model.config.use_cache = False
    model.requires_grad_(False)
    for problem in _differences(model, report, planned, num_parameters):
        raise WeightsError(
            f"the weights at {source.location} {problem}; give those of the planned model with --weights"
        )
    return model


def begin_loading(
    source: WeightsSource, config: Mapping[str, Any], compute_dtype: str, num_parameters: int
) -> tuple[PreTrainedModel, Callable[[torch.nn.Module], None]]:
    """The base model without its weights, and how to give any module of it its own, one tensor after the other.

    They are read when they are asked for, so that a model need never be whole in this process.

    Raises:
        WeightsError: they cannot be had, or are another model's; or later, a tensor is missing or of another shape.
    """
    check_config(source, config)
    model = build.unfilled_model(transformers_config(config), compute_dtype)
    count = sum(p.numel() for p in model.parameters())
    if count != num_parameters:
        raise WeightsError(
            f"the plan's configuration has {count:,} parameters, its model {num_parameters:,}; plan again"
        )
    return model, _Filling(reading(_on_this_machine(source), model), source, DTYPES[compute_dtype], model)


def load_share(
    source: WeightsSource, config: Mapping[str, Any], compute_dtype: str, num_parameters: int, share: Share
) -> PreTrainedModel:
    """The base model with the weights of one stage's *share* of it alone; all others stay on ``meta``.

    Raises:
        WeightsError: as ``begin_loading`` has it.
    """
    model, fill = begin_loading(source, config, compute_dtype, num_parameters)
    for part in parts(model, share).values():
        fill(part)
    return model


class _Filling:
    """Replaces parameters on ``meta`` by those that are read; one that modules share is read once."""

    def __init__(self, read: Read, source: WeightsSource, dtype: torch.dtype, model: PreTrainedModel) -> None:
        self.read, self.source, self.dtype = read, source, dtype
        self.empty = {id(p): (name, p) for name, p in model.named_parameters()}  # held, so that none gets its number
        self.found: dict[int, torch.nn.Parameter] = {}

    def __call__(self, module: torch.nn.Module) -> None:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.is_meta:
                    setattr(owner, name, self._filled(id(parameter)))

    def _filled(self, number: int) -> torch.nn.Parameter:
        if number not in self.found:
            name, empty = self.empty[number]
            tensor = self.read(name)
            if tensor.shape != empty.shape:
                raise WeightsError(
                    f"{name} at {self.source.location} has shape {tuple(tensor.shape)}, in the plan's model "
                    f"{tuple(empty.shape)}; give its weights with --weights"
                )
            self.found[number] = torch.nn.Parameter(tensor.to(self.dtype), requires_grad=False)
        return self.found[number]


def _on_this_machine(source: WeightsSource) -> WeightsSource:
    """*source* as a folder, downloaded if need be.

    Raises:
        WeightsError: it cannot be.
    """
    if Path(source.location).is_dir():
        return source
    from huggingface_hub import snapshot_download

    try:
        with _quiet():
            folder = snapshot_download(source.location, allow_patterns=["*.safetensors", "*.json"])
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise WeightsError(_unavailable(source, error)) from error
    return WeightsSource(folder, source.gguf_file)


SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def _differences(
    model: PreTrainedModel, report: dict[str, Any], planned: PreTrainedConfig, num_parameters: int
) -> Iterator[str]:
    """How loaded weights are not those of the plan."""
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        yield f"lack {missing[0]}" + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
    count = sum(p.numel() for p in model.parameters())
    if count != num_parameters:
        yield f"have {count:,} parameters, the plan's model {num_parameters:,}"
    yield from _other_sizes(model.config, planned)


def _other_sizes(config: PreTrainedConfig, planned: PreTrainedConfig) -> Iterator[str]:
    for name in SIZES:
        found, wanted = getattr(config, name, None), getattr(planned, name, None)
        if found != wanted:
            yield f"have {name} {found}, the plan's model {wanted}"


def check_config(source: WeightsSource, config: Mapping[str, Any]) -> None:
    """Refuse weights whose own configuration is of another model than *config*, without reading them.

    Raises:
        WeightsError: they cannot be had, or in which size they differ.
    """
    planned = transformers_config(config)
    try:
        with _quiet():
            found = AutoConfig.from_pretrained(source.location, **source.arguments())
    except Exception as error:  # readers of several formats raise a dozen kinds
        raise WeightsError(_unavailable(source, error)) from error
    for problem in _other_sizes(found, planned):
        raise WeightsError(
            f"the weights at {source.location} {problem}; give those of the planned model with --weights"
        )


def load_tokenizer(source: WeightsSource) -> Any:
    """The tokenizer beside the weights.

    Raises:
        WeightsError: there is none.
    """
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments())
    except Exception as error:  # readers of several formats raise a dozen kinds
        raise WeightsError(_unavailable(source, error)) from error
    if not len(tokenizer):
        raise WeightsError(f"the tokenizer at {source.location} knows no token; give a complete folder with --weights")
    return tokenizer


def plain(model: PreTrainedModel, config: Mapping[str, Any], dtype: str) -> PreTrainedModel:
    """The weights of *model* in *dtype*, in a model that knows nothing of how they were loaded.

    One read from GGUF holds itself to be quantized, and refuses to be saved.
    """
    made = empty_model(transformers_config(config), dtype, "meta")
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    made.config.use_cache = True
    made.generation_config = model.generation_config
    return made


def write_model(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Write both as a folder in Hugging Face's layout, whole or not at all."""
    with new_folder(path) as partial:
        model.save_pretrained(str(partial), safe_serialization=True)
        tokenizer.save_pretrained(str(partial))


def _unavailable(source: WeightsSource, error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"cannot load {source.location}: {first}; give a folder or .gguf file with --weights"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what libraries say while loading; errors still come through."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
