"""Ctrl-C and termination as a question asked at safe points, instead of an exception anywhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from .ranks import ALONE, STOP, WELL, Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred(
    ranks: Ranks = ALONE,
    asked: list[int] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
    waits: Callable[[], bool] = lambda: False,
    heard: Callable[[int], None] = lambda _number: None,
) -> Iterator[Callable[[], None]]:
    """Within, a first SIGINT or SIGTERM is kept until the function given is called, which raises KeyboardInterrupt.

    A second one raises it at once. Of several processes, all raise it at the same call when one of them was asked, and
    a second signal changes nothing: launchers pass on what a terminal may have sent already. *asked* gets every signal,
    for who leaves before it was obeyed, and *heard* is called at the first. What *must_stop* answers at such a call
    counts like a first signal. In any thread but the main one, signals stay as they are.
    """
    asked = [] if asked is None else asked

    def hear(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            heard(number)
        if len(asked) > 1 and not ranks.talks and not waits():
            raise KeyboardInterrupt

    def check() -> None:
        stops = must_stop()
        if ranks.vote(STOP if asked or stops else WELL) == STOP:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
