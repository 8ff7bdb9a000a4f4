"""What a shell offers where a name is wanted: ``_SFPLAN_COMPLETE=bash_source sfplan`` tells bash how to ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from shallowflow.profiles.load import gpu_names, instance_names, model_names

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def among(names: Callable[[], Iterable[str]], *, or_files: bool = False) -> Completer:
    """Offers those of *names* that begin with what was typed, whatever its case; else files, if they will do."""

    def offered(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names() if name.lower().startswith(typed.lower())]
        return found or ([CompletionItem(typed, type="file")] if or_files else [])

    return offered


def _models() -> list[str]:
    """With their owners and without."""
    return [name for full in model_names() for name in (full, Path(full).name)]


models = among(_models, or_files=True)
gpus = among(gpu_names)
instances = among(instance_names)
