"""Signals that ask a long command to stop: which they are, and how the piece of work at hand is finished first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A batch system wants the node back (SLURM and submitit send any of the first three), or the terminal was lost.
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SIGNALS = (*STOP, signal.SIGINT)
REPEAT_S = 2.0
Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Register ``handler`` for SIGNALS, but for those that are ignored already: nohup has asked to outlive a hang-up.

    The one place where handlers are registered. Only the main thread gets signals, so elsewhere this does nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in map(int, SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def is_repeated(number: int, *, since: float) -> bool:
    """Whether this stop signal, after one that came at ``since`` (monotonic), means the same request.

    A batch system signals every process of a job step and its launcher passes the signal on, so it may come twice.
    """
    return number != signal.SIGINT and time.monotonic() - since < REPEAT_S


def ignore_stop_signals() -> None:
    """For helper processes: their parent hears the signals and tells them when to end."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def whole_steps(signals: Sequence[int] = SIGNALS) -> Iterator[Callable[[], bool]]:
    """Hold back the first of ``signals`` that would end the process by a handler; the value says whether one waits.

    It goes to that handler at the end of the block, and another one after it goes there at once. Signals without a
    handler are left alone, and so is everything outside the main thread, which gets no signals.
    """
    waiting: list[int] = []
    since = 0.0
    before: dict[int, Any] = {}

    def deliver(frame: FrameType | None) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before[waiting[0]](waiting[0], frame)

    def arrived(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if waiting and is_repeated(number, since=since):
            return
        since = time.monotonic()
        waiting.append(number)
        if len(waiting) > 1:
            deliver(frame)

    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in signals if callable(handler := signal.getsignal(number))}
        for number in before:
            signal.signal(number, arrived)
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if len(waiting) == 1:
        deliver(None)
