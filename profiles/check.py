"""Whether facts make sense: the exceptions that say no, and the checks of a model's configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class FactsError(ValueError):
    """Facts that cannot be used; its message is one line for a person, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class UnknownName(FactsError):
    """A name that no shipped fact answers to."""


class BadFacts(FactsError):
    """A file or a configuration that is broken, or that contradicts itself."""


Config = Mapping[str, Any]

HIDDEN_SIZES = ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim", "emb_dim")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_transformer_layers")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads")
KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")
VOCABULARY_SIZES = ("vocab_size", "padded_vocab_size")
INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
MAY_BE_NULL = (*KEY_VALUE_HEAD_COUNTS, *INNER_SIZES, "head_dim")
MAY_BE_A_LIST = ("intermediate_size",)
OWN_HEAD_SIZES = ("head_dim", "qk_nope_head_dim", "kv_lora_rank", "d_kv", "kv_channels", "attention_head_dim")
LARGEST = {
    **dict.fromkeys(HIDDEN_SIZES, 1_000_000),
    **dict.fromkeys(LAYER_COUNTS, 10_000),
    **dict.fromkeys((*HEAD_COUNTS, *KEY_VALUE_HEAD_COUNTS, "head_dim"), 100_000),
    **dict.fromkeys(VOCABULARY_SIZES, 100_000_000),
    **dict.fromkeys(INNER_SIZES, 10_000_000),
}
ENCODERS = (
    *("albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert"),
    *("electra", "ernie", "esm", "funnel", "longformer", "megatron-bert", "modernbert", "mpnet", "nomic_bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Kinds of model that read text in both directions, unless their configuration makes a decoder of them."""
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def validate_config(config: object, where: str) -> None:
    """Raise BadFacts, in one line, for the first reason why this Hugging Face configuration cannot be planned."""
    if not isinstance(config, Mapping):
        raise BadFacts(f"{where}: a configuration is a JSON object ({{...}}), not {shown(config)}")
    for check in (_kind_problems, _architecture_problems, _size_problems, _head_problems, _layer_problems):
        for problem in check(config):
            raise BadFacts(f"{where}: {problem}")


def shown(value: object, limit: int = 60) -> str:
    """A value as JSON writes it, on one line and short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _kind_problems(config: Config) -> Iterator[str]:
    model_type = config.get("model_type")
    if model_type is None:
        yield 'no model_type: give the model\'s own config.json, which names it, such as "llama"'
    elif not isinstance(model_type, str) or not model_type:
        yield f'model_type = {shown(model_type)} is not a name such as "llama"'
    elif model_type in ENCODERS and config.get("is_decoder") is not True and not config.get("architectures"):
        yield f"model_type = {shown(model_type)} is an encoder, not a causal language model: give a decoder-only model"


def _architecture_problems(config: Config) -> Iterator[str]:
    architectures = config.get("architectures")
    kind = shown(config.get("model_type"))
    if isinstance(config.get("text_config"), Mapping) and _first(config, HIDDEN_SIZES) is None:
        yield (
            f"model_type = {kind} keeps its language model under text_config, so it is not a causal language model "
            "by itself: give a text-only model, or the text_config as a config.json of its own"
        )
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        yield f'architectures = {shown(architectures)} is not a list of names such as ["LlamaForCausalLM"]'
    elif architectures and not any(name.endswith(CAUSAL_ENDINGS) for name in architectures):
        yield (
            f"architectures = {shown(architectures)} is not a causal language model: "
            "give one whose architecture ends in ForCausalLM or LMHeadModel"
        )
    if config.get("is_encoder_decoder") is True:
        yield "is_encoder_decoder = true is not a causal language model: give a decoder-only one"


def _size_problems(config: Config) -> Iterator[str]:
    for spellings in (HIDDEN_SIZES, LAYER_COUNTS, VOCABULARY_SIZES):
        if _first(config, spellings) is None:
            yield f"no {spellings[0]} (nor {', '.join(spellings[1:])}): give the model's own, whole config.json"
    for key, largest in LARGEST.items():
        if key not in config or (config[key] is None and key in MAY_BE_NULL):
            continue
        value = config[key]
        for size in value if key in MAY_BE_A_LIST and isinstance(value, list) else [value]:
            yield from _size_problem(key, size, largest)


def _size_problem(key: str, size: object, largest: int) -> Iterator[str]:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        yield f"{key} = {shown(size)} is not a positive whole number: write it as a plain integer from 1 to {largest:,}"
    elif size > largest:
        yield f"{key} = {shown(size)} is beyond any model: at most {largest:,} is plausible, so look for extra digits"


def _head_problems(config: Config) -> Iterator[str]:
    hidden, heads, shared = (_first(config, keys) for keys in (HIDDEN_SIZES, HEAD_COUNTS, KEY_VALUE_HEAD_COUNTS))
    if heads is None:
        return
    if shared is not None and config[heads] % config[shared]:
        yield (
            f"{heads} = {config[heads]} is not divisible by {shared} = {config[shared]}: "
            f"each key-value head serves as many query heads as any other; {shared} = {config[heads]} would work"
        )
    if hidden is not None and _first(config, OWN_HEAD_SIZES) is None and config[hidden] % config[heads]:
        yield (
            f"{hidden} = {config[hidden]} is not divisible by {heads} = {config[heads]} and there is no head_dim: "
            f"correct one of them, or state head_dim"
        )


def _layer_problems(config: Config) -> Iterator[str]:
    layers, kinds = _first(config, LAYER_COUNTS), config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        yield f"layer_types = {shown(kinds)} is not a list with one entry for each layer"
    elif kinds is not None and layers is not None and len(kinds) != config[layers]:
        yield (
            f"layer_types has {len(kinds)} entries but {layers} = {config[layers]}: "
            f"one entry for each layer, so {config[layers]} would work"
        )
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            yield f'{key} = {shown(config[key])} is not an object such as {{"rope_type": "default"}}, nor null'


def _first(config: Config, spellings: tuple[str, ...]) -> str | None:
    """The first of several spellings that this configuration uses and fills."""
    return next((key for key in spellings if config.get(key) is not None), None)
