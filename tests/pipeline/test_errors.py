"""Exit codes and messages, for every kind of end a command can have."""

from __future__ import annotations

import errno
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import typer

from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheMissing
from pipeline import errors
from pipeline.errors import ConfigError, Interrupted, NotAvailable, exit_code, guard, message
from stages.data.annotations import AnnotationError
from stages.types import VideoRejected
from stages.weights import WeightsMissing


class Stranger(Exception):
    """An exception that no rule knows."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (AnnotationError("file", ["x"]), 2),
        (ValueError("x"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data"), 2),
        (VideoRejected("v", "truncated", "x"), 3),
        (CacheMissing("x"), 4),
        (CacheMismatch("x"), 4),
        (CacheCorrupt("x"), 4),
        (WeightsMissing("x"), 5),
        (NotAvailable("x"), 5),
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 5),
        (OSError(errno.EIO, "Input/output error", "/data"), 5),
        (MemoryError(), 5),
        (OSError(errno.ENOSPC, "No space left on device", "/data"), 75),
        (Interrupted("SIGTERM"), 75),
        (KeyboardInterrupt(), 130),
        (Stranger("x"), 1),
        (KeyError("x"), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("name", [name for name in errors.CODES if not name.startswith("builtins.")])
def test_every_named_class_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), attribute), Exception)


def test_running_out_of_gpu_memory_is_the_environment() -> None:
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory")
    assert exit_code(error) == 5
    assert "--set train.micro_batch=1" in message(error)


def test_a_full_disk_is_found_behind_another_error() -> None:
    error = RuntimeError("write failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/cache/shard")
    assert exit_code(error) == 75
    assert "/cache/shard" in message(error)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), ["Permission denied: /data/x", "--debug"]),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), ["No module named", "pip install a", "./run.sh"]),
        (Interrupted("SIGUSR1"), ["SIGUSR1", "The same command"]),
        (KeyboardInterrupt(), ["Ctrl-C", "The same command"]),
        (Stranger("odd"), ["Stranger: odd", "defect", "--debug"]),
        (CacheMissing("nothing here.\nExtract:  pipeline extract-clip"), ["nothing here", "pipeline extract-clip"]),
    ],
)
def test_messages_say_what_and_what_next(error: BaseException, parts: list[str]) -> None:
    for part in parts:
        assert part in message(error)


def test_notes_on_an_error_are_shown() -> None:
    error = ConfigError("what")
    error.add_note("and where")
    assert message(error) == "what\nand where"


def test_the_guard_prints_one_error_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, guard():
        raise CacheMissing("nothing here")
    assert caught.value.exit_code == 4
    assert capsys.readouterr() == ("", "error: nothing here\n")


def test_the_guard_lets_an_exit_code_through() -> None:
    with pytest.raises(typer.Exit) as caught, guard():
        raise typer.Exit(3)
    assert caught.value.exit_code == 3


def test_the_guard_restores_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with guard():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


# ---------------------------------------------------------------- signals, in a process of their own

CHILD = """
import contextlib, sys, time, typer
from pipeline.errors import guard
app = typer.Typer()
@app.command()
def work(stubborn: bool = False):
    with guard():
        try:
            print("ready", flush=True)
            with contextlib.suppress(Exception):  # as code does that notes the failure of one video and goes on
                for _ in range(600):  # a signal just before one long sleep would only be seen after it
                    time.sleep(0.1)
            print("went on", flush=True)
        finally:
            print("cleaned", flush=True)
            if stubborn:
                time.sleep(60)
                print("never", flush=True)
app()
"""


@pytest.fixture
def start() -> object:
    """Starts the child above and waits until it is at work; kills what is left at the end."""
    children: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield begin
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_after_its_clean_up(
    start: Callable[..., subprocess.Popen[str]], number: int, code: int
) -> None:
    child = start()
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (code, "cleaned\n")
    assert err.startswith("error: ")
    assert "The same command" in err
    assert "Traceback" not in err


def test_a_second_ctrl_c_leaves_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    child = start("--stubborn")
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleaned\n"
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert child.wait(timeout=20) == 130
    assert time.monotonic() - began < 10


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from pipeline.errors import guard\nwith guard():\n    for _ in range(100_000): print('line')"
    command = f'"{sys.executable}" -c "$CODE" | head -1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command], env={"CODE": code, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.stdout == "line\n"
    assert "error:" not in done.stderr
    assert done.returncode != 0
