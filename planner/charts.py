"""Small charts of characters: points by letters over two axes, with what is best so far as a line of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

WIDTH, HEIGHT = 22, 9
"""Characters inside the axes."""
LABEL = 8
"""Characters for the numbers beside them."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEVERAL = "*"
"""Where points come to lie on each other."""

Place = tuple[int, int]
"""A column from the left and a row from the top."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis is of, and how its numbers are told, as by ``str.format``."""

    name: str
    form: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What to draw.

    Attributes:
        points: across and up, in the order of LETTERS.
        falls: less is better: the line is the least so far from left to right. Else it goes through all points, and is
            not drawn in characters.
    """

    across: Axis
    up: Axis
    points: tuple[tuple[float, float], ...]
    falls: bool = True

    def steps(self) -> list[int]:
        """Numbers of the points that the line goes through, from left to right."""
        order = sorted(range(len(self.points)), key=lambda number: self.points[number])
        if not self.falls:
            return order
        heights = [self.points[number][1] for number in order]
        return [number for i, number in enumerate(order) if heights[i] < min(heights[:i], default=float("inf"))]


def chart(drawn: Chart) -> Text:
    """*drawn* in characters, its title above and the ends of its axes beside and below."""
    widths, heights = zip(*drawn.points, strict=True)
    rows = [HEIGHT - 1 - row for row in _places(heights, HEIGHT)]
    places = list(zip(_places(widths, WIDTH), rows, strict=True))
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]
    if drawn.falls:
        _draw_steps(cells, [places[number] for number in drawn.steps()])
    for letter, (column, row) in zip(LETTERS, places, strict=False):
        cells[row][column] = SEVERAL if cells[row][column] in LETTERS + SEVERAL else letter
    told = [drawn.up.form.format(max(heights)), *[""] * (HEIGHT - 2), drawn.up.form.format(min(heights))]
    made = Text(f"{drawn.up.name} over {drawn.across.name}\n", style="bold")
    for height, line in zip(told, cells, strict=True):
        made.append(f"{height:>{LABEL}} │", style="dim")
        for cell in line:
            made.append(cell, style="bold" if cell in LETTERS + SEVERAL else "cyan")
        made.append("\n")
    least, most = (drawn.across.form.format(width) for width in (min(widths), max(widths)))
    ends = f"{least}{most:>{WIDTH - len(least)}}" if most != least else f"{least:<{WIDTH}}"
    return made.append(f"{'':>{LABEL}} ╰{'─' * WIDTH}\n{'':>{LABEL}}  {ends}", style="dim")


def _places(values: Sequence[float], size: int) -> list[int]:
    """Where each of *values* comes to lie on an axis of so many characters, from the least to the greatest."""
    least, span = min(values), max(values) - min(values)
    return [round((value - least) / span * (size - 1)) if span else 0 for value in values]


def _draw_steps(cells: list[list[str]], places: Sequence[Place]) -> None:
    """A line from each place to the right, and down to the next; the last one's goes on to the edge."""
    ends = [*places[1:], (WIDTH - 1, places[-1][1])]
    for (column, row), (to_column, to_row) in zip(places, ends, strict=True):
        cells[row][column : to_column + 1] = "─" * (to_column + 1 - column)
        if to_row > row:
            cells[row][to_column] = "╮"
            for between in range(row + 1, to_row):
                cells[between][to_column] = "│"
