"""``sfplan schema``: what the JSON of plans, runs and records holds, as JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import msgspec

from shallowflow import __version__

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS = {
    "plan": "sfplan plan, and the file that it writes",
    "run": "sfplan train, and run.json",
    "memory": "sfplan simulate and sfplan measure",
    "profile": "sfplan profile",
    "frontier": "sfplan frontier",
    "gpus": "sfplan gpus",
}
"""What has a schema, and which commands print it with ``--json``."""


@click.command("schema")
@click.argument("document", type=click.Choice(list(DOCUMENTS)), required=False)
def schema_command(document: str | None) -> None:
    """Print the JSON Schema of DOCUMENT, or, without one, what has a schema.

    It is made from the types that write and read these files. Plans, runs and memory records carry a format_version: it
    changes whenever a field changes its meaning or goes.

    \b
    sfplan schema
    sfplan schema plan
    """
    if document is None:
        for name, printed_by in DOCUMENTS.items():
            click.echo(f"{name:<10}{printed_by}")
        return
    click.echo(msgspec.json.format(msgspec.json.encode(schema(document)), indent=2).decode())


def schema(document: str) -> Mapping[str, Any]:
    """The JSON Schema of one of DOCUMENTS."""
    described: dict[str, Any] = msgspec.json.schema(_type(document))
    about = {"$schema": DIALECT, "title": f"shallowflow {__version__}: {document}", "description": DOCUMENTS[document]}
    return {**about, **described}


def _type(document: str) -> Any:
    from shallowflow.planner.frontier import FrontierPoint
    from shallowflow.planner.layer_cost import ModelProfile
    from shallowflow.planner.memory_record import MemoryRecord
    from shallowflow.planner.plan import Plan
    from shallowflow.profiles import GpuSpec
    from shallowflow.runtime.record import RunRecord

    found: dict[str, Any] = {
        "plan": Plan,
        "run": RunRecord,
        "memory": MemoryRecord,
        "profile": ModelProfile,
        "frontier": list[FrontierPoint],
        "gpus": list[GpuSpec],
    }
    return found[document]
