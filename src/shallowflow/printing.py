"""JSON as commands print it."""

from __future__ import annotations

from typing import Any

import click
import msgspec


def echo_json(told: Any) -> None:
    """Print *told* as indented JSON; a number that is not finite becomes null."""
    click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
