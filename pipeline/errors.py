"""The one place where an exception becomes a message and an exit code.

====  ==============================================================================
code  meaning
====  ==============================================================================
0     done
1     a defect of this program (nothing the user did)
2     wrong usage, config or annotation file
3     finished, but some videos failed: their list is printed
4     cache missing, stale or corrupt
5     environment: weights, packages, CUDA, permissions, memory, a disk that fails
75    the same command resumes: after SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP, when there
      is room on a full disk, or when another process no longer writes to the folder
130   Ctrl-C
====  ==============================================================================

A reader of the output that leaves (``| head``, a closed pager, a lost terminal) is no end: the work goes on, unheard.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from pipeline.progress import printable
from stages.stopping import handling, is_repeated
from stages.urls import without_credentials

DONE, DEFECT, USAGE, FAILURES, CACHE, ENVIRONMENT, INTERRUPTED, CTRL_C = 0, 1, 2, 3, 4, 5, 75, 130

RESUME = "What is finished is kept. The same command, given again, goes on from there."
WRITING = "It happened while "
DEBUG = "The same command with --debug shows where it happened."

# Dotted names instead of classes: naming a class here must not import torch. The first match on the class's bases wins.
CODES = {
    "cache_schema.errors.CacheError": CACHE,
    "pipeline.locks.FolderBusy": INTERRUPTED,
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
    """A signal asked for the end: a batch system wants the node back, or the terminal is gone.

    Not an ``Exception``: nothing that records per-video failures may swallow it.
    """


def exit_code(error: BaseException) -> int:
    """The exit code for ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    if isinstance(error, Interrupted) or _disk_full(error):
        return INTERRUPTED
    code = _code_of_class(error)
    if code == DEFECT and (failure := system_error(error)) is not None:
        return _code_of_class(failure)
    return code


def _code_of_class(error: BaseException) -> int:
    for cls in type(error).__mro__:
        if (code := CODES.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return code
    return DEFECT


def system_error(error: BaseException) -> OSError | None:
    """What the system refused: ``error`` itself, what caused it, or what a library written in Rust says of it."""
    return next(filter(None, map(_as_os_error, _chain(error, handled=False))), None)


def _disk_full(error: BaseException) -> OSError | None:
    """The ENOSPC or EDQUOT among ``error``, what caused it, and what was being handled when it came."""
    failures = filter(None, map(_as_os_error, _chain(error, handled=True)))
    return next((failure for failure in failures if failure.errno in (errno.ENOSPC, errno.EDQUOT)), None)


def _chain(error: BaseException, *, handled: bool) -> Iterator[BaseException]:
    at: BaseException | None = error
    passed: list[BaseException] = []
    while at is not None and not any(at is other for other in passed):
        yield at
        passed.append(at)
        at = at.__cause__ or (at.__context__ if handled else None)


def _as_os_error(error: BaseException) -> OSError | None:
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    number = re.search(r"\(os error (\d+)\)", str(error))  # how Rust's std::io::Error ends
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Adds to a failure of the system that names no path (a write to an open file does not) what was being written."""
    try:
        yield
    except Exception as error:
        failure = system_error(error)
        named = any(note.startswith(WRITING) for note in getattr(error, "__notes__", []))
        if failure is not None and failure.filename is None and not named:
            error.add_note(f"{WRITING}{place} was being written.")
        raise


def message(error: BaseException) -> str:
    """What happened, where, and what to do next, without the leading ``error:``."""
    code = exit_code(error)
    notes = getattr(error, "__notes__", [])
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by Ctrl-C.\n{RESUME}"
    if isinstance(error, Interrupted):
        return f"interrupted by {error}.\n{RESUME}"
    if (full := _disk_full(error)) is not None:
        where = f": {full.filename}" if full.filename else ""
        todo = "Before that, free some space; --dry-run says how much."
        return "\n".join([f"no space left on the device{where}.", *notes, RESUME, todo])
    if code == DEFECT:
        return f"{type(error).__name__}: {error}\nThis is a defect of diff-lmm, not of your input. {DEBUG}"
    if _code_of_class(error) == DEFECT:
        error = system_error(error) or error
    return "\n".join([_text(error), *notes])


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
        if error.errno in (errno.EMFILE, errno.ENFILE):
            todo = "Raise the limit before the same command:  ulimit -n 65536"
        return f"{error.strerror}{path}.\n{todo} {DEBUG}"
    if type(error) is ValueError:  # no room of ours raised it on purpose, so the text alone may be too little
        return f"{error}\n{DEBUG}"
    return str(error) or type(error).__name__


@contextmanager
def guard(*, debug: bool = False, as_json: bool = False) -> Iterator[None]:
    """Runs a command's body: turns signals into exceptions, and exceptions into a message and an exit code."""
    try:
        with raising_on_signals():
            yield
            sys.stdout.flush()  # a disk that is full under a redirected output is told here, not while Python ends
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        code, text = exit_code(error), printable(message(error))
        if debug:
            print(without_credentials(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {text}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": text, "exit_code": code}))
        raise typer.Exit(code) from None


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Stop signals raise Interrupted, Ctrl-C raises KeyboardInterrupt; another signal after that leaves at once.

    Leaving at once is safe: a store or a checkpoint changes only by a rename.
    """
    first: list[float] = []

    def arrived(number: int, _frame: FrameType | None) -> None:
        if first and is_repeated(number, since=first[0]):
            return
        if first:
            os._exit(CTRL_C if number == signal.SIGINT else INTERRUPTED)
        first.append(time.monotonic())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(signal.Signals(number).name)

    with handling(arrived):
        yield


class _Outlet(io.TextIOWrapper):
    """Standard output or error. Once its reader has left, or its terminal is gone, what is written goes nowhere."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._go_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._go_nowhere(error)
            super().flush()

    def _go_nowhere(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # so that libraries find nothing broken either


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Both outputs of this process survive their readers. What cannot be written at the end changes no exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(io.FileIO(stream.fileno(), "w", closefd=False))
            lines = name == "stderr" or stream.isatty()
            setattr(sys, name, _Outlet(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=lines))
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: ``guard`` has said so
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
