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


__all__ = ["MOST_GPUS", "Int", "Meta", "Number"]

MOST_BYTES = 2**62
Int = Annotated[int, Meta(ge=-MOST_BYTES, le=MOST_BYTES)]
"""A whole number that every reader of JSON knows."""
MOST_GPUS = 1024
"""That a plan may be for: far more than pay for what this plans."""
Number = Annotated[int, Meta(ge=1, le=MOST_GPUS)]
"""Of GPUs, of machines that they are in, of stages that they hold."""
