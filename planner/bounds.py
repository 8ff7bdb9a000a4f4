"""Bounds on the numbers of requests and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from msgspec import Meta
else:
    try:
        from msgspec import Meta
    except ModuleNotFoundError:  # as on a bare machine with a GPU, which measures and reads no plan

        def Meta(**bounds: Any) -> tuple[tuple[str, Any], ...]:  # noqa: N802
            """Bounds that nobody checks."""
            return tuple(bounds.items())


__all__ = ["Int", "Meta"]

MOST_BYTES = 2**62
Int = Annotated[int, Meta(ge=-MOST_BYTES, le=MOST_BYTES)]
"""A whole number that every reader of JSON knows."""
