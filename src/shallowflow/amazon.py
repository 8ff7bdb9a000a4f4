"""What the commands that talk to AWS share: that boto3 is there, and that no account's number is printed."""

from __future__ import annotations

import importlib.util
from typing import Any

import msgspec

from shallowflow import printing
from shallowflow.session import RequestError


def needs_boto3(what: str) -> None:
    """Refuse *what* where the package is missing.

    Raises:
        RequestError: it is.
    """
    if importlib.util.find_spec("boto3") is None:
        raise RequestError(f"{what} needs the package boto3; install it with: pip install boto3")


def masked(value: Any) -> Any:
    """*value* with no text in it that holds what may be an account's number, as names of buckets like to."""
    from shallowflow.runtime.aws.s3 import shown

    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {masked(key): masked(one) for key, one in value.items()}
    return [masked(one) for one in value] if isinstance(value, list | tuple) else value


def echo_json(told: Any) -> None:
    """Print *told* as JSON, masked."""
    printing.echo_json(masked(msgspec.to_builtins(told)))
