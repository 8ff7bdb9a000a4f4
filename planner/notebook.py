"""How plans and comparisons look in a notebook: what a terminal shows, as HTML."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 100
_AROUND = '<pre style="white-space:pre; overflow-x:auto; line-height:1.35; background:none; color:inherit">{code}</pre>'


def html(what: RenderableType) -> str:
    """*what* with the columns and emphasis that it has on a terminal; in whatever colours the page has."""
    console = Console(  # which would show itself, too, where it finds a notebook around it
        record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_jupyter=False, _environ={}
    )
    console.print(what)
    return console.export_html(inline_styles=True, code_format=_AROUND)
