"""What commands print, held against the schemas that they publish."""

from __future__ import annotations

import functools
import json
from typing import Any

from jsonschema import Draft202012Validator

from tests.front.shell import sfplan


@functools.cache
def published(document: str) -> Any:
    """The schema of *document*, as a user gets it."""
    done = sfplan("schema", document)
    assert done.code == 0, done.errors
    found = json.loads(done.output)
    Draft202012Validator.check_schema(found)
    return found


def validator(document: str) -> Draft202012Validator:
    """What checks a document, in which nothing may be that its schema does not name."""
    schema = published(document)
    closed = {name: {**one, "additionalProperties": False} for name, one in schema["$defs"].items()}
    return Draft202012Validator({**schema, "$defs": closed})


def held(document: str, printed: str) -> Any:
    """What was *printed*, which is what the schema of *document* says."""
    told = json.loads(printed)
    validator(document).validate(told)
    return told
