"""From a configuration to a model that trains: weights in their formats, recomputation, adapters."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import accelerate
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shallowflow.planner.strategies import Adapter, Configuration, Strategy, TargetModules
from shallowflow.profiles import BadFacts, FactsError
from shallowflow.profiles import load_model as load_model_spec

from . import activations, adapter, attention, dora, quantized

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def transformers_config(
    config: Mapping[str, Any], num_hidden_layers: int | None = None, like_layer: int | None = None
) -> PreTrainedConfig:
    """The transformers object for a configuration's facts, with another depth if *num_hidden_layers* is given.

    Its layers are then like the first ones, or all like number *like_layer*.
    """
    kept = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    facts = copy.deepcopy(kept)  # transformers completes nested facts in place
    try:
        made = AutoConfig.for_model(config["model_type"], **facts)
    except Exception as error:  # whatever a model's own checks raise on a broken configuration
        raise BadFacts(_unbuildable(config, error)) from error
    if num_hidden_layers is not None:
        _set_depth(made, num_hidden_layers, like_layer)
    return made


def some_layers(config: Mapping[str, Any], layers: Sequence[int]) -> PreTrainedConfig:
    """The transformers object for a model of these *layers* of *config*'s alone."""
    made = transformers_config(config)
    for key, listed in _listed(made).items():
        with contextlib.suppress(AttributeError):
            setattr(made, key, [listed[number] for number in layers])
    made.num_hidden_layers = len(layers)
    return made


def layer_kinds(config: Mapping[str, Any]) -> tuple[int, ...]:
    """For each decoder layer, the first layer that is like it, by all that the configuration lists layer by layer."""
    made = transformers_config(config)
    rows = list(zip(*_listed(made).values(), strict=True)) or [()] * made.num_hidden_layers
    return tuple(rows.index(row) for row in rows)


def _listed(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """What *config* says of each layer, such as ``layer_types``."""
    depth = config.num_hidden_layers
    return {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == depth}


def _unbuildable(config: Mapping[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "Unrecognized model identifier" in reason:
        reason = f"transformers {transformers.__version__} knows no such model_type"
    keys = [key for key, value in config.items() if isinstance(error, KeyError) and [value] == list(error.args)]
    if keys:
        reason = f"transformers {transformers.__version__} knows no {keys[0]} {config[keys[0]]!r}"
    return f"cannot build a causal language model of model_type {config['model_type']!r}: {reason}"


def _set_depth(config: PreTrainedConfig, depth: int, like_layer: int | None) -> None:
    """Cut or repeat what is listed per layer along with the number of layers."""
    for key, listed in _listed(config).items():
        chosen = [listed[i % len(listed)] if like_layer is None else listed[like_layer] for i in range(depth)]
        with contextlib.suppress(AttributeError):  # some configurations derive the list from the depth
            setattr(config, key, chosen)
    config.num_hidden_layers = depth


def load_model(
    name_or_config: str | Path | Mapping[str, Any] | PreTrainedConfig,
    quantization: Literal["int8", "nf4"] | None = None,
    *,
    double_quantization: bool = False,
    compute_dtype: str = "float16",
    device: str = "meta",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build the modules that loading with weights gives, without weights.

    Args:
        name_or_config: a shipped name, a path, the facts of a ``config.json``, or a transformers configuration.
        quantization: ``int8`` or ``nf4`` for every linear layer but the head; None for none.
        double_quantization: quantize nf4's constants, too.
        compute_dtype: ``float16``, ``bfloat16`` or ``float32``: of activations and of whatever is not quantized.
        device: where the tensors live; ``meta`` holds none.
        attn_implementation: ``eager``, ``sdpa``, or None for SDPA with expanded KV heads.

    Raises:
        FactsError: the name is unknown, the configuration is broken, or there is no such format or dtype.
    """
    if quantization not in (None, "int8", "nf4"):
        raise FactsError(f"quantization is {quantization!r}; give 'int8', 'nf4', or None for none")
    if compute_dtype not in DTYPES:
        raise FactsError(f"compute_dtype is {compute_dtype!r}; give one of {', '.join(DTYPES)}")
    if isinstance(name_or_config, (str, Path)):
        config = transformers_config(load_model_spec(str(name_or_config)).config)
    elif isinstance(name_or_config, Mapping):
        config = transformers_config(name_or_config)
    else:
        config = name_or_config
    model = empty_model(config, compute_dtype, device, attn_implementation)
    if quantization in ("int8", "nf4"):
        for layer in decoder_layers(model):
            quantized.quantize_linears(layer, quantization, DTYPES[compute_dtype], double_quantization)
    return model


def empty_model(
    config: PreTrainedConfig, compute_dtype: str, device: str | None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A model of *config* with unquantized, untrained weights on *device*; None where they are made.

    Raises:
        BadFacts: transformers cannot build it.
    """
    try:
        attn_implementation = attn_implementation or attention.best_for(config)
        with torch.device(device or "cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[compute_dtype], attn_implementation=attn_implementation
            )
    except Exception as error:  # whatever a model's own code raises on a broken configuration
        raise BadFacts(_unbuildable({**config.to_dict(), "model_type": config.model_type}, error)) from error
    if device is not None:
        _bring(model, device, DTYPES[compute_dtype])
    model.tie_weights()
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def unfilled_model(config: PreTrainedConfig, compute_dtype: str) -> PreTrainedModel:
    """A model of *config* on the CPU whose parameters are on ``meta``, to be filled; what it computes itself is there.

    Raises:
        BadFacts: transformers cannot build it.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        model = empty_model(config, compute_dtype, None)
    model.tie_weights()  # within, a parameter that is given to a module becomes another
    return model


def _bring(model: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
    """Move parameters that were made by ``torch.FloatTensor``, which knows no default device or dtype."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != torch.device(device).type:
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(device, dtype)))


def count_parameters(config: Mapping[str, Any]) -> int:
    """Distinct parameters of the model; a tied head counts once."""
    return sum(p.numel() for p in empty_model(transformers_config(config), "float16", "meta").parameters())


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks, in order: the module list that holds most of the parameters."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    if not lists:
        raise ValueError(f"no repeated layers found in {type(model).__name__}")
    outermost = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(outermost)


def weights_dtype(configuration: Configuration, compute_dtype: str) -> str:
    """What a model's weights are loaded in, those that learn in fp32."""
    return "float32" if configuration.is_full else compute_dtype


def without_adapter(model: Any) -> Any:
    """The model that an adapter was put on, or *model* itself, where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def apply_formats(model: torch.nn.Module, strategies: Sequence[Strategy], compute_dtype: str) -> None:
    """Give each decoder layer its weight format.

    Raises:
        ValueError: the model has another number of layers.
    """
    for layer, strategy in layers_with(model, strategies):
        apply_format(layer, strategy, compute_dtype)


def layers_with(model: torch.nn.Module, strategies: Sequence[Strategy]) -> Iterable[tuple[torch.nn.Module, Strategy]]:
    """Each decoder layer and its strategy.

    Raises:
        ValueError: the model has another number of layers.
    """
    layers = decoder_layers(model)
    if len(layers) != len(strategies):
        raise ValueError(f"the plan has {len(strategies)} layers, the model {len(layers)}")
    return zip(layers, strategies, strict=True)


def apply_format(layer: torch.nn.Module, strategy: Strategy, compute_dtype: str) -> None:
    """Give one decoder *layer* the weight format of its *strategy*."""
    if strategy.weight_format in ("int8", "nf4"):
        twice = strategy.double_quantization
        quantized.quantize_linears(layer, strategy.weight_format, DTYPES[compute_dtype], twice)


def add_adapters(
    model: PreTrainedModel,
    rank: int,
    alpha: int,
    adapter_kind: Adapter = "lora",
    target_modules: TargetModules = "all-linear",
) -> torch.nn.Module:
    """LoRA in fp32 on linear modules of the decoder layers, as PEFT does it.

    fp32, because a loss scale needs gradients that neither overflow nor vanish; the base keeps its dtype.

    Raises:
        BadFacts: a layer has no such module.
    """
    with contextlib.suppress(ImportError):
        quantized.bitsandbytes()  # PEFT imports it too, where it is, and less quietly
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=adapter_kind == "rslora",
        target_modules=adapter_targets(model, target_modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_meta = all(p.is_meta for p in model.parameters())  # or PEFT fills real memory with zeros and random numbers
        adapted: torch.nn.Module = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter_kind == "dora":
        dora.learn_lengths(adapted)
    adapter.fuse(adapted)
    return adapted


def adapter_targets(model: torch.nn.Module, target_modules: TargetModules = "all-linear") -> list[str]:
    """The ends of the names of those linear modules of the decoder layers that are meant by *target_modules*.

    As many parts of a name as tell it from what else is in the layers, or is not linear: ``attn.c_proj``, where
    ``mlp.c_proj`` is not meant. Linear modules beside the layers that are called the same come along.

    Raises:
        BadFacts: a layer has no such module.
    """
    layers = decoder_layers(model)
    meant = {id(module) for layer in layers for module in _meant(model, layer, target_modules)}
    if not meant:
        raise ValueError(f"no linear layers to adapt in {type(model).__name__}")
    beside = {id(m) for m in model.modules() if _is_adaptable(m)} - {id(m) for layer in layers for m in layer.modules()}
    known = meant | beside
    others = {end for name, module in model.named_modules() if id(module) not in known for end in _ends(name)}
    names = [name for name, module in model.named_modules() if id(module) in meant]
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in names})


def _meant(model: torch.nn.Module, layer: torch.nn.Module, target_modules: TargetModules) -> Iterable[torch.nn.Module]:
    """The linear modules of *layer* that are meant by *target_modules*."""
    refused = {"out_proj"} if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_KINDS else set()
    linear = {
        name: module
        for name, module in layer.named_modules()
        if _is_adaptable(module) and name.rpartition(".")[2] not in refused
    }
    if target_modules == "all-linear":
        return linear.values()
    there = f"the layers of {type(model).__name__} have {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}"
    if target_modules == "attention":
        try:
            inside = set(activations.part(layer, "recompute attention").modules())
        except ValueError:
            raise BadFacts(f"a layer has no attention of its own to put adapters on; {there}") from None
        return [module for module in linear.values() if module in inside]
    for wanted in target_modules:
        if not any(wanted in _ends(name) for name in linear):
            raise BadFacts(f"no linear module is called {wanted!r}; {there}")
    return [module for name, module in linear.items() if not set(_ends(name)).isdisjoint(target_modules)]


_MAMBA_KINDS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Where PEFT refuses ``out_proj``, whose weight Mamba's kernels read themselves (its ``tuners_utils.py``)."""


def _is_adaptable(module: torch.nn.Module) -> bool:
    """Whether *module* is linear, and not one that returns more than a product or takes its input in groups."""
    return quantized.is_linear(module) and not type(module).__name__.endswith(("Router", "GroupedLinear"))


def _ends(name: str) -> list[str]:
    """``c``, ``b.c`` and ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
