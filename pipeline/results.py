"""What a finished command says on stdout, for people. ``--json`` prints the same dictionary as one line instead."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.progress import clock, printable

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]
SHOWN = 20  # failures, classes or missing videos listed before "and n more"
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def as_json(result: Result) -> str:
    """One line of strict JSON: numbers that are not finite become null."""
    return json.dumps(_strict(result), default=str, allow_nan=False)


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: ``20.3 GB``."""
    unit = 0
    while count >= 999.95 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count:.0f} bytes"


def parse_size(text: str) -> int:
    """Bytes of ``800MB``, ``1.5 TB`` or ``4096``, the inverse of ``size``. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bytes|[kKMGT]?B)?\s*", text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: expected a number with kB, MB, GB or TB, such as 50GB")
    unit = (match[2] or "bytes").replace("K", "k")
    return int(float(match[1]) * 1000 ** (0 if unit == "B" else UNITS.index(unit)))


def show_estimate(command: str, result: Result) -> None:
    """``--dry-run``: what would be done, and what it needs."""
    table = _table("", "")
    for key, value in result.items():
        if key == "bytes":
            table.add_row("disk", size(value))
        elif key == "bytes_per_modality":
            for modality, count in value.items():
                table.add_row(f"  {printable(str(modality))}", size(count))
        elif not isinstance(value, Mapping | list | tuple) and value is not None:
            table.add_row(_words(key), size(value) if key.startswith("bytes_") else _cell(value))
    _print(f"{command} would do this:", table)


def show_extraction(result: Result) -> None:
    """Counts, coverage per split, and the videos that failed with their reasons."""
    table = _table("", "")
    for key in ("videos", "frames", "failed", "skipped"):
        table.add_row(_words(key), _cell(result[key]))
    table.add_row("time", clock(result["seconds"]))
    _print("In the cache now:", table)
    if coverage := result.get("coverage"):
        _print("Videos per split:", _coverage(coverage))
    failures = result["failures"]
    for failure in failures[:SHOWN]:
        _say(f"failed: {failure['video']}: {failure['reason']}")
    if len(failures) > SHOWN:
        _say(f"… and {len(failures) - SHOWN} more; --json lists all")
    if failures:
        _say("Once they are mended, the same command with --retry-failed tries these videos again.")
    if result["skipped"] == result["videos"]:
        _say(f"{result['skipped']} of {result['videos'] + result['failed']} videos cached; nothing to do")


def show_training(result: Result) -> None:
    """The last losses, and where the run is. What is logged per level (``kd/8``) is in metrics.jsonl."""
    table = _table("", "")
    for key, value in result.items():
        if key == "seconds":
            table.add_row("time", clock(value))
        elif "/" not in key and not isinstance(value, Mapping | list | tuple):
            table.add_row(_words(key), _cell(value))
    _print("The student:", table)
    if result.get("first_step") == result.get("steps") is not None:
        _say(f"{result['steps']} of {result['steps']} steps were done before; nothing to do")


def show_evaluation(result: Result) -> None:
    """The result table: accuracy with its interval beside the majority baseline, per class and per question type."""
    table = _table("", "n", "correct", "top-1", "95 % interval", "top-5", "majority")
    _tally(table, "all", result)
    for title in ("per_group", "per_class"):
        parts: Mapping[str, Result] = result.get(title, {})
        if len(parts) < 2 and title == "per_group":
            continue  # one task: the same line again
        table.add_section()
        for name, part in list(parts.items())[:SHOWN]:
            _tally(table, printable(name), part)
        if len(parts) > SHOWN:
            table.add_row(f"… and {len(parts) - SHOWN} more")
    _print("Accuracy in %:", table)
    if "seed" in result:
        _say(
            f"One seed ({result['seed']}), {result['videos']} videos. "
            "The interval takes samples for independent; windows or questions of one video are not."
        )
    if missing := result.get("missing_samples"):
        _say(f"{missing} of {missing + result['n']} samples are left out: the cache lacks their frames")
    if published := result.get("published_n"):
        same = "that of the published figures" if published == result["n"] else f"not the published {published}"
        _say(f"n = {result['n']} is {same}.")
    if (before := result.get("resumed", 0)) and before == result["n"]:
        _say(f"{before} of {before} answers were there before; nothing to do")


def show_synth(result: Result) -> None:
    """What was drawn, and where."""
    now = f"{result['written']} drawn now" if result["written"] else "all drawn before; nothing to do"
    _say(f"{result['videos']} videos, {result['frames']:,} frames in {result['folder']} ({now})")


def show_doctor(result: Result) -> None:
    """One line per thing that was looked at."""
    table = _table("", "", "")
    for check in result["checks"]:
        table.add_row(check["name"], "ok" if check["ok"] else "NO", printable(check["detail"]))
    _print("What is here:", table)


def _tally(table: Table, name: str, part: Result) -> None:
    interval = part.get("interval")
    span = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    shares = [_percent(part.get(key)) for key in ("top1", "top5", "majority")]
    table.add_row(name, _cell(part["n"]), _cell(part["correct"]), shares[0], span, *shares[1:])


def _coverage(coverage: Mapping[str, Result]) -> Table:
    table = _table("", *next(iter(coverage.values())))
    for split, counts in coverage.items():
        table.add_row(
            printable(split), *(str(len(part) if hasattr(part, "__len__") else part) for part in counts.values())
        )
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _print(title: str, table: Table) -> None:
    from rich.console import Console

    _say(title)
    # Off a terminal the width is fixed, so that a log does not depend on who reads it.
    width = None if sys.stdout.isatty() else 100
    Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(table)


def _say(text: str) -> None:
    print(" ".join(printable(text).split()))


def _words(key: str) -> str:
    return printable(key.replace("_", " "))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


def _strict(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(part) for part in value]
    return value
