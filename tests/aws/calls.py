"""Every call to AWS that boto3 makes, noted as it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import botocore.session

from tests.aws.rented import Asked


@contextmanager
def noted() -> Iterator[list[Asked]]:
    """The calls of every client that is made within, with their parameters as they were given."""
    found: list[Asked] = []
    make: Callable[..., Any] = botocore.session.Session.create_client

    def create_client(self: Any, service_name: str, *args: Any, **options: Any) -> Any:
        client = make(self, service_name, *args, **options)
        asked: list[Any] = []

        def given(params: Any, **_: Any) -> None:
            asked.append(dict(params))

        def leaves(model: Any, **_: Any) -> None:
            from botocore import xform_name

            found.append(Asked(service_name, xform_name(model.name), asked.pop()))

        client.meta.events.register_first("provide-client-params.*.*", given)
        client.meta.events.register_first("before-call.*.*", leaves)
        return client

    botocore.session.Session.create_client = create_client  # type: ignore[method-assign]
    try:
        yield found
    finally:
        botocore.session.Session.create_client = make  # type: ignore[method-assign]
