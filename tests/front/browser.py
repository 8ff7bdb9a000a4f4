"""A page as a browser shows it, at the widths and in the colours that people have."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
SCREENS = [(380, "light"), (800, "dark"), (1280, "light")]


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Run *test* at each width, or skip it where there is no browser."""
    at_each = pytest.mark.parametrize(("width", "scheme"), SCREENS)(test)
    made: Callable[..., None] = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")(at_each)
    return made


@contextlib.contextmanager
def opened(width: int, scheme: Any) -> Iterator[Any]:
    """A page to go to; in the end nothing may be wider than the window, and no error may have been told."""
    playwright = pytest.importorskip("playwright.sync_api")
    told: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.on("console", lambda line: told.append(line.text) if line.type == "error" else None)
        shown.on("pageerror", lambda error: told.append(str(error)))
        yield shown
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert told == []
