"""Models' own configurations: what is read, and the one line that says what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowflow.profiles.check import LARGEST, MAY_BE_NULL
from shallowflow.profiles.load import (
    BadFacts,
    validate_config,
)
from tests.profiles.configs import GPT2, LLAMA, SIZES, complaint, one_line


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_sound_config_passes(config: Mapping[str, Any]) -> None:
    """Also without architectures, with null where null means the default, and with a head_dim of its own."""
    validate_config(config, "config.json")
    validate_config({**config, "architectures": None, "layer_types": None, "rope_scaling": None}, "config.json")
    validate_config({**config, **dict.fromkeys(MAY_BE_NULL)}, "config.json")
    validate_config({**LLAMA, "hidden_size": 2304, "num_attention_heads": 24, "head_dim": 256}, "config.json")
    validate_config({**LLAMA, "hidden_size": 1000, "head_dim": 128}, "config.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": None}, ["no model_type", "config.json"]),
        ({"model_type": 7}, ["model_type = 7"]),
        ({"architectures": ["BertForMaskedLM"]}, ['architectures = ["BertForMaskedLM"]', "ForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ['architectures = "LlamaForCausalLM"', "list"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder = true", "decoder-only"]),
        ({"hidden_size": None, "text_config": LLAMA}, ["text_config", "not a causal language model by itself"]),
        ({"hidden_size": None}, ["no hidden_size", "n_embd"]),
        ({"num_hidden_layers": None}, ["no num_hidden_layers", "n_layer"]),
        ({"num_key_value_heads": 7}, ["num_attention_heads = 32", "num_key_value_heads = 7", "32 would work"]),
        ({"hidden_size": 4097}, ["hidden_size = 4097", "num_attention_heads = 32", "head_dim"]),
        ({"layer_types": ["full_attention"] * 31}, ["layer_types has 31", "num_hidden_layers = 32"]),
        ({"layer_types": "full_attention"}, ['layer_types = "full_attention"', "list"]),
        ({"rope_scaling": 4.0}, ["rope_scaling = 4.0", "object"]),
        ({"intermediate_size": [14336, 0]}, ["intermediate_size = 0"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_told_in_one_line(change: dict[str, Any], told: list[str]) -> None:
    """The message names the key and the value, and what would work."""
    message = complaint({**LLAMA, **change})

    assert message.startswith("config.json: ")
    assert all(part in message for part in told), message


@pytest.mark.parametrize(("config", "key"), SIZES, ids=[f"{config['model_type']}-{key}" for config, key in SIZES])
@given(
    value=st.integers(max_value=0)
    | st.booleans()
    | st.floats()
    | st.text(max_size=8)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
def test_a_size_is_a_positive_whole_number(config: dict[str, Any], key: str, value: object) -> None:
    """Also true is not 1, and 4096.0 is not 4096."""
    message = complaint({**config, key: value})

    assert f"{key} = {json.dumps(value)[:20]}" in message
    assert "positive whole number" in message


@pytest.mark.parametrize(("config", "key"), SIZES, ids=[f"{config['model_type']}-{key}" for config, key in SIZES])
def test_a_size_stays_within_reason(config: dict[str, Any], key: str) -> None:
    """What no model reaches is taken for a slip of the keyboard."""
    message = complaint({**config, key: LARGEST[key] + 1})

    assert f"{key} = {LARGEST[key] + 1} is beyond any model: at most {LARGEST[key]:,}" in message


@given(
    st.dictionaries(
        st.sampled_from(
            ["architectures", "model_type", "text_config", "layer_types", "rope_scaling", "rope_parameters", *LARGEST]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
    )
)
def test_any_config_is_answered(config: dict[str, Any]) -> None:
    """No configuration, however odd, fails in any other way than by one line."""
    try:
        validate_config(config, "config.json")
    except BadFacts as error:
        one_line(error)
