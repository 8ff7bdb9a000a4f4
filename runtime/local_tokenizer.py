"""A model's tokenizer where it lies on this machine, kept in the cache so that later calls load no torch."""

from __future__ import annotations

import contextlib
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from shallowflow.planner.profiler import cache

from .sources import PACKAGED, WeightsSource, find_weights

PARTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges*",
    "config.json",
)
"""Files of a model's folder that its tokenizer is made from."""


class Kept(msgspec.Struct, frozen=True):
    """A tokenizer as transformers made it from a model's files, before the first text."""

    backend: str
    special_tokens: dict[str, Any]
    chat_template: str | dict[str, str] | None


def local_tokenizer(given: str, model_name: str) -> Any | None:
    """The tokenizer of a model, as training would load it, or None where that would take a network.

    Args:
        given: the model as it was asked for; a folder, or a config.json in one, is looked into.
        model_name: what it is called, for a package's weights and what the Hub's client has downloaded.

    Raises:
        WeightsError: there is one, and it is broken.
    """
    source = _source(given, model_name)
    if source is None:
        return None
    name = cache.key("tokenizer", {"files": _facts(source), "tokenizers": version("tokenizers")})
    known = cache.read_text(name)
    if known is not None:
        with contextlib.suppress(Exception):  # a damaged entry counts as none
            return _made(msgspec.json.decode(known, type=Kept))
    from .weights import load_tokenizer

    loaded = load_tokenizer(source)
    if getattr(loaded, "is_fast", False):
        kept = Kept(loaded.backend_tokenizer.to_str(), dict(loaded.special_tokens_map), loaded.chat_template)
        cache.write_text(name, msgspec.json.encode(kept).decode())
    return loaded


def _source(given: str, model_name: str) -> WeightsSource | None:
    path = Path(given).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if (folder / "tokenizer.json").is_file():
        return WeightsSource(str(folder))
    if model_name in PACKAGED:
        found = find_weights(model_name)
        return found if found.gguf_file else None
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(model_name, file) for file in ("tokenizer.json", "tokenizer_config.json")]
    if not all(isinstance(file, str) for file in files):
        return None
    return WeightsSource(str(Path(str(files[0])).parent))


def _facts(source: WeightsSource) -> dict[str, Any]:
    folder = Path(source.location)
    if source.gguf_file:
        status = (folder / source.gguf_file).stat()
        return {source.gguf_file: (status.st_size, status.st_mtime_ns), "folder": source.location}
    paths = sorted({path for part in PARTS for path in folder.glob(part) if path.is_file()})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _made(kept: Kept) -> Any:
    from tokenizers import Tokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    backend = Tokenizer.from_str(kept.backend)
    return TokenizersBackend(tokenizer_object=backend, chat_template=kept.chat_template, **kept.special_tokens)
