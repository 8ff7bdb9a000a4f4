"""Charts of characters: every point is where its numbers say, and the steps are what nothing beats."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from shallowflow.planner.charts import HEIGHT, LABEL, LETTERS, SEVERAL, WIDTH, Axis, Chart, chart

numbers = st.integers(-1000, 1000).map(float)
points = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=len(LETTERS)).map(tuple)
charts = st.builds(
    Chart,
    across=st.just(Axis("memory", "{:.0f} GiB")),
    up=st.just(Axis("seconds", "{:.0f} s")),
    points=points,
    falls=st.booleans(),
)


def drawn(made: Chart) -> list[str]:
    """What is inside the axes."""
    _, *lines = chart(made).plain.split("\n")
    return [line[LABEL + 2 :] for line in lines[:HEIGHT]]


def seen(made: Chart) -> dict[str, tuple[int, int]]:
    """Where each letter stands, if it stands alone: column, and height above the bottom."""
    return {
        cell: (column, HEIGHT - 1 - row)
        for row, line in enumerate(drawn(made))
        for column, cell in enumerate(line)
        if cell in LETTERS
    }


@given(charts)
def test_every_point_is_drawn_in_its_place(made: Chart) -> None:
    """Letters lie left and right, above and below of each other as their points do; what is missing lies together."""
    places = seen(made)

    for one, other in combinations(places, 2):
        for axis in (0, 1):
            first, second = (made.points[LETTERS.index(letter)][axis] for letter in (one, other))
            here, there = places[one][axis], places[other][axis]
            assert (here <= there) if first <= second else (here >= there)
    hidden = len(made.points) - len(places)
    stars = sum(line.count(SEVERAL) for line in drawn(made))
    assert hidden >= 2 * stars
    assert bool(hidden) == bool(stars)


@given(charts)
def test_a_chart_keeps_to_its_size(made: Chart) -> None:
    """Whatever the numbers, a title, HEIGHT lines and two for the axis, none wider than the axis and its labels."""
    lines = chart(made).plain.split("\n")

    assert len(lines) == HEIGHT + 3
    assert max(map(len, lines[1:])) <= LABEL + 2 + WIDTH
    assert lines[0] == "seconds over memory"
    heights = [height for _, height in made.points]
    assert lines[1].startswith(f"{max(heights):.0f} s".rjust(LABEL))
    assert lines[HEIGHT].startswith(f"{min(heights):.0f} s".rjust(LABEL))


@given(points)
def test_steps_are_what_nothing_beats(given_points: tuple[tuple[float, float], ...]) -> None:
    """The line goes, from left to right, through each point that no other equals or beats in both numbers."""
    made = Chart(across=Axis("", "{}"), up=Axis("", "{}"), points=given_points)

    line = [given_points[number] for number in made.steps()]

    assert set(line) == {
        (x, y) for x, y in given_points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in given_points)
    }
    assert len(set(line)) == len(line)
    assert line == sorted(line)


def test_a_chart_is_drawn_as_shown() -> None:
    """Steps fall from point to point, a point above them stands alone, and the last one's line goes on."""
    made = Chart(
        across=Axis("memory", "{:.0f} GiB"),
        up=Axis("seconds", "{:.0f} s"),
        points=((0.0, 8.0), (7.0, 4.0), (14.0, 0.0), (14.0, 6.0), (21.0, 0.0)),
    )

    assert chart(made).plain.split("\n") == [
        "seconds over memory",
        "     8 s │a──────╮              ",
        "         │       │              ",
        "         │       │      d       ",
        "         │       │              ",
        "         │       b──────╮       ",
        "         │              │       ",
        "         │              │       ",
        "         │              │       ",
        "     0 s │              c──────e",
        "         ╰──────────────────────",
        "          0 GiB           21 GiB",
    ]
