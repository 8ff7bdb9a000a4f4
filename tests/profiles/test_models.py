"""The model facts: each config builds, and what it builds has as many parameters as were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

MODELS = Path(__file__).parents[2] / "profiles" / "models"
FILES = sorted(MODELS.glob("*.json"))
KEYS = ["name", "gated", "num_parameters", "num_parameters_source", "config"]


def load(path: Path) -> dict[str, Any]:
    """Read one model's facts."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def build(config: dict[str, Any]) -> torch.nn.Module:
    """Build the model on the meta device, so that no weight takes memory."""
    known = AutoConfig.for_model(**config)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(known)
    model.tie_weights()
    assert isinstance(model, torch.nn.Module)
    return model


def ident(path: Path) -> str:
    """Name a test after its file."""
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_file_is_well_formed(path: Path) -> None:
    """A file has the five keys in order, the name it is filed under, and a source exactly where it has a count."""
    facts = load(path)
    assert list(facts) == KEYS
    assert path.name == facts["name"].replace("/", "--") + ".json"
    assert isinstance(facts["gated"], bool)
    assert (facts["num_parameters"] is None) == (facts["num_parameters_source"] is None)
    if facts["num_parameters"] is not None:
        assert type(facts["num_parameters"]) is int
        assert facts["num_parameters_source"].strip()
    assert facts["config"]["model_type"]
    assert len(facts["config"]["architectures"]) == 1
    assert isinstance(facts["config"]["tie_word_embeddings"], bool)
    assert path.read_text(encoding="utf-8") == json.dumps(facts, indent=2) + "\n"


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_config_builds_the_published_number_of_parameters(path: Path) -> None:
    """The model that Transformers builds from the config holds the published count, a tied weight counted once."""
    facts = load(path)
    model = build(facts["config"])
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    assert all(parameter.is_meta for parameter in parameters.values())
    count = sum(parameter.numel() for parameter in parameters.values())
    assert count > 0
    if facts["num_parameters"] is not None:
        assert count == facts["num_parameters"]


def test_a_wrong_size_shows_in_the_count() -> None:
    """The count is no tautology: one wider feed-forward block changes it by the weights that were added."""
    facts = load(MODELS / "meta-llama--Llama-3.1-8B.json")
    config = facts["config"] | {"intermediate_size": facts["config"]["intermediate_size"] + 1}
    count = sum(parameter.numel() for parameter in build(config).parameters())
    assert count - facts["num_parameters"] == 3 * config["hidden_size"] * config["num_hidden_layers"]


def test_at_least_sixty_models_have_an_exact_count() -> None:
    """At least sixty models carry a published count, and names do not repeat."""
    models = [load(path) for path in FILES]
    assert len({model["name"] for model in models}) == len(models)
    assert sum(model["num_parameters"] is not None for model in models) >= 60


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_default_and_demo_models_are_there(name: str) -> None:
    """The tool's default model and the demo's model have files with exact counts."""
    facts = load(MODELS / (name.replace("/", "--") + ".json"))
    assert facts["name"] == name
    assert facts["num_parameters"] is not None
