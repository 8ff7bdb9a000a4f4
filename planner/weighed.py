"""What storing a model's own weights does to them, layer by layer, as it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .bounds import Meta

MOST_ERROR = 1e3
"""Relative; far beyond any format's."""
Error = Annotated[float, Meta(ge=0, le=MOST_ERROR)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """What each format changes in one layer's weights: root mean squares, relative to the weights' own.

    Attributes:
        double_quantized: of nf4 whose constants are quantized, too.
    """

    int8: Error
    nf4: Error
    double_quantized: Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """The errors of a whole model.

    Attributes:
        digest: SHA-256 over the weights that were measured, layer by layer.
        layers: in order.
    """

    digest: str
    layers: tuple[LayerErrors, ...]
