"""How a result reaches stdout: the words and tables that every command prints with, and ``--json``."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.progress import printable
from stages.urls import without_credentials

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]
SHOWN = 20  # failures, classes or missing videos listed before "and n more"
UNITS = ("bytes", "kB", "MB", "GB", "TB")


def tell(result: Result, show: Callable[[Result], None], *, as_json: bool) -> None:
    """Notes go to stderr; the result to stdout, as one line of JSON or as ``show`` prints it."""
    for warning in result.get("warnings", ()):
        print(f"note: {printable(str(warning))}", file=sys.stderr)
    if as_json:
        print(to_json(result))
    else:
        show(result)


def to_json(result: Result) -> str:
    """One line of strict JSON: numbers that are not finite become null."""
    return json.dumps(_strict(result), default=str, allow_nan=False)


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: ``20.3 GB``."""
    unit = 0
    while count >= 999.95 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count:.0f} bytes"


def parse_size(text: str) -> int:
    """Bytes of ``800MB``, ``1.5 TB``, ``6GiB`` or ``4096``, the inverse of ``size``. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:bytes|([kKMGT]?)(i?)B?)\s*", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a size: expected a number with kB, MB, GB or TB, such as 8GB")
    power = " kMGT".index((match[2] or " ").replace("K", "k"))
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def new_table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def show_table(title: str, table: Table) -> None:
    from rich.console import Console

    say(title)
    # Off a terminal the width is fixed, so that a log does not depend on who reads it.
    width = None if sys.stdout.isatty() else 100
    Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(table)


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, its first line alone where that is a whole sentence, for a cell or a sentence of ours."""
    text = re.sub(r"[^.;:\n]*:  (--|pipeline ).*", "", str(error)).strip()  # a cell is no place to type from
    first, *rest = text.splitlines() or [type(error).__name__]
    line = " ".join([first, *map(str.strip, rest)]) if first.endswith(":") else first
    return line if len(line) <= limit else line[: limit - 1] + "…"


def say(text: str) -> None:
    """A sentence; on a terminal its lines end between words."""
    line = " ".join(printable(text).split())
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line) + 1
    print(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))


def to_type(command: str) -> None:
    """A command on one line, whatever the terminal's width: it is there to be pasted."""
    print(f"  {printable(command)}")


def say_all(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN]:
        say(line)
    if len(lines) > SHOWN:
        say(f"… and {len(lines) - SHOWN} more; --json lists all")


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def in_words(key: str) -> str:
    return printable(key.replace("_", " "))


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def cell(value: object) -> str:
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
    return without_credentials(value) if isinstance(value, str) else value
