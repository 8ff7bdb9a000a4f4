"""``sfplan schema``: what the JSON that commands print holds, as JSON Schema."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from shallowflow import __version__
from shallowflow.describing import classes_of, described
from shallowflow.printing import echo_json

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True)
class Document:
    """Something that is printed with ``--json``.

    Attributes:
        printed_by: the commands that print it, and when.
        types: of what is encoded, as ``module:name``; of several, one each time.
        is_list: whether it is any number of them.
    """

    printed_by: str
    types: tuple[str, ...]
    is_list: bool = False


DOCUMENTS = {
    "plan": Document("sfplan plan, and the file that it writes", ("planner.plan:Plan",)),
    "refusal": Document("sfplan plan and sfplan whatif, where nothing will do", ("told:NoPlan", "told:NoWay")),
    "verify": Document("sfplan verify", ("verify_command:Verified",)),
    "run": Document("sfplan train, and run.json", ("runtime.record:RunRecord",)),
    "rehearsal": Document("sfplan train --dry-run", ("training:Rehearsal",)),
    "machines": Document("sfplan train, of a plan for several machines", ("training:Machines",)),
    "merge": Document("sfplan merge", ("merge_command:Merged",)),
    "evaluate": Document("sfplan evaluate", ("runtime.harness:Score",), is_list=True),
    "launch": Document("sfplan launch", ("launch_command:Launched",)),
    "runs": Document("sfplan runs", ("runs_command:Told",), is_list=True),
    "stop": Document("sfplan stop", ("runs_command:Stopped",)),
    "cost": Document("sfplan cost", ("cost_command:Cost",)),
    "check": Document("sfplan check", ("told_runtime:Checked",)),
    "data": Document("sfplan data", ("data_command:DataFacts",)),
    "frontier": Document("sfplan frontier", ("planner.frontier:FrontierPoint",), is_list=True),
    "whatif": Document("sfplan whatif", ("told:RankedComparison",)),
    "prices": Document("sfplan prices, also with --reset", ("prices_command:PriceList", "prices_command:PricesReset")),
    "weigh": Document("sfplan weigh", ("planner.weighed:Weighed",)),
    "profile": Document("sfplan profile", ("planner.layer_cost:ModelProfile",)),
    "memory": Document("sfplan simulate and sfplan measure", ("planner.memory_record:MemoryRecord",)),
    "calibrate": Document("sfplan calibrate", ("told_runtime:KeptCalibration",)),
    "models": Document("sfplan models", ("inspection:KnownModel",), is_list=True),
    "gpus": Document("sfplan gpus", ("profiles:GpuSpec",), is_list=True),
}
"""By name, all that is printed with ``--json``."""

MAY_BE_INFINITE = {
    "StepRecord": ("loss", "gradient_norm"),
    "EvaluationRecord": ("loss", "perplexity"),
    "Score": ("trained",),
    "Outlook": (
        *("hours", "nine_of_ten_hours", "usd", "nine_of_ten_usd", "storage_usd", "low_usd", "high_usd"),
        *("interruptions", "tokens_per_usd"),
    ),
    "RankedOutlook": ("over_cheapest", "over_fastest"),
}
"""By type, numbers that may be infinite or none: JSON has no word for that, and null stands for it."""


@click.command("schema")
@click.argument("document", type=click.Choice(list(DOCUMENTS)), required=False)
def schema_command(document: str | None) -> None:
    """Print the JSON Schema of DOCUMENT, or, without one, what has a schema.

    It is made from the types that are written and read, and their documentation. Plans, runs and memory records carry a
    format_version: it changes whenever a field changes its meaning or goes.

    \b
    sfplan schema
    sfplan schema plan
    """
    if document is None:
        for name, one in DOCUMENTS.items():
            click.echo(f"{name:<11}{one.printed_by}")
        return
    echo_json(schema(document))


def schema(document: str) -> dict[str, Any]:
    """The JSON Schema of one of DOCUMENTS."""
    asked = DOCUMENTS[document]
    types = tuple(_found(path) for path in asked.types)
    roots, definitions = msgspec.json.schema_components(types)
    root = roots[0] if len(roots) == 1 else {"anyOf": list(roots)}
    if asked.is_list:
        root = {"type": "array", "items": root}
    about = {"$schema": DIALECT, "title": f"shallowflow {__version__}: {document}", "description": asked.printed_by}
    return {**about, **root, "$defs": described(_with_null(definitions, classes_of(types)), types)}


def _found(path: str) -> Any:
    """The type that ``module:name`` says, of a module that is loaded only when it is asked for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"shallowflow.{module}"), name)


def _with_null(
    definitions: Mapping[str, Mapping[str, Any]], classes: Mapping[str, type]
) -> dict[str, Mapping[str, Any]]:
    """*definitions* in which numbers that MAY_BE_INFINITE may be null."""
    found = dict(definitions)
    for name, definition in definitions.items():
        numbers = [number for each in classes[name].__mro__ for number in MAY_BE_INFINITE.get(each.__name__, ())]
        properties = definition["properties"]
        changed = {number: {**properties[number], "type": ["number", "null"]} for number in numbers}
        found[name] = {**definition, "properties": {**properties, **changed}}
    return found
