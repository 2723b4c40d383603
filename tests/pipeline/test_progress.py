"""Progress lines: right numbers, at sensible intervals, and nothing that a name could do to a terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.progress import Progress, clock, printable


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def lines_of(updates: list[tuple[float, int, int, str]]) -> list[str]:
    """What is printed off a terminal for updates (seconds, done, total, what)."""
    stream, now = io.StringIO(), Clock()
    with Progress(stream, live=False, now=now) as progress:
        for seconds, done, total, what in updates:
            now.time = 1000 + seconds
            progress(done, total, what)
    return stream.getvalue().splitlines()


def test_rate_and_remaining_time_are_those_of_the_work_done() -> None:
    assert lines_of([(0, 0, 100, "a"), (10, 20, 100, "b")]) == ["0/100 · 0 % · a", "20/100 · 20 % · 2/s · ETA 0:40 · b"]


def test_work_of_an_earlier_start_does_not_count_for_the_rate() -> None:
    assert lines_of([(0, 900, 1000, ""), (5, 905, 1000, "")])[-1] == "905/1000 · 90 % · 1/s · ETA 1:35"


def test_the_rate_is_that_of_the_last_minute() -> None:
    updates = [(float(t), t, 10_000, "") for t in range(0, 600, 10)]  # 1/s
    updates += [(600.0 + t, 600 + 5 * t, 10_000, "") for t in range(0, 301, 10)]  # then 5/s
    assert "5/s" in lines_of([*updates, (901, 10_000, 10_000, "")])[-2]


def test_the_last_update_is_always_printed_with_the_time_in_all() -> None:
    assert lines_of([(0, 0, 3, ""), (0.5, 3, 3, "end")])[-1] == "3/3 · 100 % · 6/s · 0:00 in all · end"


def test_lines_become_rarer() -> None:
    lines = lines_of([(t / 10, t, 36_000, "") for t in range(36_000)])  # one hour, ten updates a second
    assert 60 < len(lines) < 120


def test_another_total_begins_a_new_phase() -> None:
    lines = lines_of([(0, 0, 10, "decode"), (1, 1, 10, ""), (1.1, 0, 5, "train"), (1.2, 1, 5, "")])
    assert lines == ["0/10 · 0 % · decode", "0/5 · 0 % · train"]


def test_nothing_to_do_does_not_divide_by_zero() -> None:
    assert lines_of([(0, 0, 0, "")]) == ["0/0"]


def test_a_terminal_gets_a_bar_that_ends() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress(1, 4, "[bold]v1[/bold] \x1b[31m")
        progress(4, 4, "v2")
    assert "4/4" in stream.getvalue()
    assert "\x1b[31mv" not in stream.getvalue()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07name", "name"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("a\rb\x08c\x7fd", "abcd"),
        ("\x9b31mx", "31mx"),
        ("fi\u202elmpm", "film" + "pm"),
        ("Ärger · 映画", "Ärger · 映画"),
        ("two\nlines\tkept", "two\nlines\tkept"),
    ],
)
def test_escapes_are_taken_out_and_letters_stay(raw: str, shown: str) -> None:
    assert printable(raw) == shown


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in shown)
    assert "\x1b" not in shown
    assert printable(shown) == shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_times_read_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
