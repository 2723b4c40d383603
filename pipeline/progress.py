"""Progress on stderr: a live bar on a terminal, plain lines at growing intervals elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from stages.urls import without_credentials

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

WINDOW_S = 60.0  # the rate is that of the last minute
FIRST_INTERVAL_S, LAST_INTERVAL_S = 2.0, 60.0  # between plain lines: a tenth of the time so far, within these

# CSI, OSC (ended by BEL or ESC \), two-character escapes, then any other control character but newline and tab.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` without terminal escapes, control and direction characters, and without the credentials of URLs.

    Names come from files of strangers.
    """
    return without_credentials(_CONTROLS.sub("", _ESCAPES.sub("", text)))


def clock(seconds: float) -> str:
    """Seconds as ``0:07``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Stopwatch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._begun = time.monotonic(), time.process_time()

    def cost(self) -> dict[str, float]:
        """Seconds on the clock, and of this process's threads, since then."""
        seconds, cpu_seconds = self._begun
        return {"seconds": time.monotonic() - seconds, "cpu_seconds": time.process_time() - cpu_seconds}


class OnProgress(Protocol):
    """The callback that the stages receive."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


class Progress:
    """Shows calls of ``update(done, total, what)``; use as a context manager and pass the object as callback.

    Work that was done before the first call (a resumed run) does not count for the rate. A smaller ``done`` or another
    ``total`` starts a new phase.
    """

    def __init__(
        self, stream: TextIO | None = None, *, live: bool | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() if live is None else live
        self._now = now
        self._samples: deque[tuple[float, int]] = deque()
        self._total = -1
        self._started = self._printed = 0.0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self.update(done, total, what)

    def update(self, done: int, total: int, what: str = "") -> None:
        """Shows ``done`` of ``total``; ``what`` names the phase or the item at hand."""
        now = self._now()
        fresh = total != self._total or (bool(self._samples) and done < self._samples[-1][1])
        if fresh:
            self._samples.clear()
            self._total, self._started, self._printed = total, now, float("-inf")
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()
        line = self._line(done, total, " ".join(printable(what).split()))
        if self._live:
            self._draw(done, total, line, fresh)
        elif fresh or done >= total or now - self._printed >= self._interval(now):
            self._printed = now
            print(line, file=self._stream, flush=True)

    def _interval(self, now: float) -> float:
        return min(max((now - self._started) / 10, FIRST_INTERVAL_S), LAST_INTERVAL_S)

    def _line(self, done: int, total: int, what: str) -> str:
        (start, first), (now, last) = self._samples[0], self._samples[-1]
        parts = [f"{done}/{total}"]
        if total:
            parts.append(f"{100 * done // total} %")
        if last > first and now > start:
            rate = (last - first) / (now - start)
            parts.append(f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            parts.append(
                f"ETA {clock((total - done) / rate)}" if done < total else f"{clock(now - self._started)} in all"
            )
        return " · ".join([*parts, what] if what else parts)

    def _draw(self, done: int, total: int, line: str, fresh: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        if self._bar is None:
            columns = (BarColumn(bar_width=30), TextColumn("{task.description}", markup=False))
            self._bar = RichProgress(*columns, console=Console(file=self._stream, highlight=False))
            self._bar.start()
        if fresh or self._task is None:
            self._task = self._bar.add_task(line, total=total)
        self._bar.update(self._task, completed=done, description=line)
