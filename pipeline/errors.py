"""The one place where an exception becomes a message and an exit code.

====  =====================================================================
code  meaning
====  =====================================================================
0     done
1     a defect of this program (nothing the user did)
2     wrong usage, config or annotation file
3     finished, but some videos failed: their list is printed
4     cache missing, stale or corrupt
5     environment: weights, packages, CUDA, permissions, memory
75    interrupted (SIGTERM, SIGUSR1) or disk full: the same command resumes
130   Ctrl-C
====  =====================================================================
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from pipeline.progress import printable

DONE, DEFECT, USAGE, FAILURES, CACHE, ENVIRONMENT, INTERRUPTED, CTRL_C = 0, 1, 2, 3, 4, 5, 75, 130

RESUME = "What is finished is kept. The same command, given again, goes on from there."
DEBUG = "The same command with --debug shows where it happened."

# Dotted names instead of classes: naming a class here must not import torch. The first match on the class's bases wins.
CODES = {
    "cache_schema.errors.CacheError": CACHE,
    "stages.weights.WeightsMissing": ENVIRONMENT,
    "stages.weights.WeightsRefused": ENVIRONMENT,
    "stages.types.VideoRejected": FAILURES,
    "torch.OutOfMemoryError": ENVIRONMENT,
    "builtins.ImportError": ENVIRONMENT,
    "builtins.MemoryError": ENVIRONMENT,
    "builtins.FileNotFoundError": USAGE,
    "builtins.NotADirectoryError": USAGE,
    "builtins.OSError": ENVIRONMENT,
    "builtins.ValueError": USAGE,  # the family of errors that a user can mend (AnnotationError, ConfigError, …)
}


class ConfigError(ValueError):
    """A setting, preset, option or run folder that does not fit. The message says what to type instead."""


class NotAvailable(OSError):
    """Something this machine lacks: a GPU, a package, a program."""


class Interrupted(BaseException):
    """SIGTERM or SIGUSR1 arrived (a batch system wants the node back).

    Not an ``Exception``: nothing that records per-video failures may swallow it.
    """


def exit_code(error: BaseException) -> int:
    """The exit code for ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    if isinstance(error, Interrupted) or _disk_full(error):
        return INTERRUPTED
    for cls in type(error).__mro__:
        if (code := CODES.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return code
    return DEFECT


def _disk_full(error: BaseException) -> OSError | None:
    """The ENOSPC or EDQUOT among ``error`` and what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def message(error: BaseException) -> str:
    """What happened, where, and what to do next, without the leading ``error:``."""
    code = exit_code(error)
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by Ctrl-C.\n{RESUME}"
    if isinstance(error, Interrupted):
        return f"interrupted by {error}.\n{RESUME}"
    if (full := _disk_full(error)) is not None:
        where = f": {full.filename}" if full.filename else ""
        return f"no space left on the device{where}.\n{RESUME}\nBefore that, free some space; --dry-run says how much."
    if code == DEFECT:
        return f"{type(error).__name__}: {error}\nThis is a defect of diff-lmm, not of your input. {DEBUG}"
    return "\n".join([_text(error), *getattr(error, "__notes__", [])])


def _text(error: BaseException) -> str:
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return f"{error}.\nInstall what is missing (pip install {package}), or ./run.sh for the versions known to work."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        sizes = "--set extract.batch_size=1, --set train.micro_batch=1 or --set decode.batch_size=1"
        return f"out of memory. {error}\nSmaller pieces give the same numbers: {sizes}."
    if isinstance(error, OSError) and error.errno is not None:
        path = f": {error.filename}" if error.filename else ""
        todo = "Check the path." if exit_code(error) == USAGE else "Check that the path can be read and written."
        return f"{error.strerror}{path}.\n{todo} {DEBUG}"
    if type(error) is ValueError:  # no room of ours raised it on purpose, so the text alone may be too little
        return f"{error}\n{DEBUG}"
    return str(error) or type(error).__name__


@contextmanager
def guard(*, debug: bool = False, as_json: bool = False) -> Iterator[None]:
    """Runs a command's body: turns signals into exceptions, and exceptions into a message and an exit code."""
    try:
        with _signals():
            yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader of our output has left, as in `pipeline … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        code, text = exit_code(error), printable(message(error))
        if debug:
            traceback.print_exc()
        print(f"error: {text}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": text, "exit_code": code}))
        raise typer.Exit(code) from None


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Interrupted, Ctrl-C raises KeyboardInterrupt; the second signal leaves at once.

    Leaving at once is safe: a store or a checkpoint changes only by a rename.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def arrived(number: int, _frame: FrameType | None) -> None:
        if seen:
            os._exit(CTRL_C if number == signal.SIGINT else INTERRUPTED)
        seen.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, arrived) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
