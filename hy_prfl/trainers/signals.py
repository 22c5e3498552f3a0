"""Lets a run finish its step when a signal asks it to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_caught(on_signal: Callable[[], None]) -> Iterator[None]:
    """On SIGINT or SIGTERM call `on_signal`, and let a second signal stop the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        on_signal()
        signal.signal(number, previous[number])

    previous = {int(number): signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
