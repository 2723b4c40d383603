"""A stop between two steps: a signal waits until the step is whole and can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Hold back the first signal that would end the process by a handler; what is given says whether one waits.

    It goes to that handler at the end of the block, and a second one sends it there at once. Signals that nobody
    handles are left alone, and so is everything outside the main thread, which gets no signals.
    """
    waiting: list[int] = []
    before: dict[int, Any] = {}

    def deliver(frame: FrameType | None) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before[waiting[0]](waiting[0], frame)

    def arrived(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            deliver(frame)

    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
        for number in before:
            signal.signal(number, arrived)
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if len(waiting) == 1:
        deliver(None)
