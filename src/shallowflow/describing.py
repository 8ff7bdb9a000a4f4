"""The words in JSON Schemas: what the docstrings of the types say that the schemas were made from."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect as shapes

SECTION, INDENT = "Attributes:", " " * 4
IN_JSON = {"None": "null", "True": "true", "False": "false"}
"""What docstrings call by Python's words."""


def described(definitions: Mapping[str, Mapping[str, Any]], types: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """*definitions* as made from *types*, each with its class's first paragraph, each property with its own text."""
    classes = classes_of(types)
    return {name: _described(definition, classes[name]) for name, definition in definitions.items()}


def _described(definition: Mapping[str, Any], cls: type) -> dict[str, Any]:
    texts = attributes(cls)
    properties = {
        name: {**made, "description": in_json(texts[name])} if name in texts else made
        for name, made in definition.get("properties", {}).items()
    }
    return {**definition, "description": in_json(summary(cls)), "properties": properties}


def in_json(text: str) -> str:
    """*text* in the words of JSON."""
    return re.sub(rf"\b({'|'.join(IN_JSON)})\b", lambda found: IN_JSON[found[0]], text)


def summary(cls: type) -> str:
    """The first paragraph of the docstring of *cls*, on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def attributes(cls: type) -> dict[str, str]:
    """By name, what the docstrings of *cls* and of what it is derived from say of its attributes."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        for entry in _entries(vars(each).get("__doc__") or ""):
            names, _, text = entry.partition(": ")
            found |= dict.fromkeys(names.split(", "), text)
    return found


def _entries(docstring: str) -> list[str]:
    """The entries of its section of attributes, ``name, other: text``, each on one line."""
    lines = iter(inspect.cleandoc(docstring).splitlines())
    entries: list[str] = []
    if SECTION not in lines:  # which leaves the lines after it
        return entries
    for line in itertools.takewhile(lambda line: line.startswith(INDENT), lines):
        if line.startswith(INDENT + " "):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line.strip())
    return entries


def classes_of(types: Iterable[Any]) -> dict[str, type]:
    """By name, every class whose values are anywhere in values of *types*."""
    found: dict[str, type] = {}
    waiting: list[Any] = list(shapes.multi_type_info(types))
    while waiting:
        shape = waiting.pop()
        cls = getattr(shape, "cls", None)
        if cls is not None:
            if cls.__name__ in found:
                continue
            found[cls.__name__] = cls
        waiting += _parts(shape)
    return found


def _parts(shape: msgspec.Struct) -> Iterator[Any]:
    """What a shape is made of: its fields, or the types of its items."""
    for name in shape.__struct_fields__:
        value = getattr(shape, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, shapes.Type | shapes.Field):
                yield part
