"""Exit codes and messages, for every kind of end a command can have."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheMissing
from pipeline import errors
from pipeline.errors import ConfigError, Interrupted, NotAvailable, exit_code, guard, message, naming
from pipeline.locks import FolderBusy
from stages.data.annotations import AnnotationError
from stages.stopping import REPEAT_S, SIGNALS, STOP
from stages.types import VideoRejected
from stages.weights import WeightsMissing
from tests.conftest import PROJECT


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
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data"), 75),
        (OSError(errno.EROFS, "Read-only file system", "/data"), 5),
        (OSError(errno.EMFILE, "Too many open files", "/data"), 5),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 5),
        (Stranger("Error while serializing: I/O error: No space left on device (os error 28)"), 75),
        (Stranger("I/O error: Read-only file system (os error 30)"), 5),
        (FolderBusy("x"), 75),
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
        (OSError(errno.EMFILE, "Too many open files", "/data/x"), ["Too many open files: /data/x", "ulimit -n"]),
        (Stranger("I/O error: Read-only file system (os error 30)"), ["Read-only file system"]),
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


def test_a_failure_that_names_no_path_says_what_was_being_written() -> None:
    with pytest.raises(OSError) as caught, naming("runs/mine"):  # noqa: PT011
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "while runs/mine was being written" in message(caught.value)
    with pytest.raises(Stranger) as other, naming("runs"), naming("runs/mine"):  # the nearest one is said
        raise Stranger("I/O error: Permission denied (os error 13)")
    assert "Permission denied" in message(other.value)
    assert message(other.value).count("was being written") == 1
    assert "while runs/mine was being written" in message(other.value)


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
    before = [signal.getsignal(number) for number in SIGNALS]
    with guard():
        assert not {signal.getsignal(number) for number in SIGNALS} & set(before)
    assert [signal.getsignal(number) for number in SIGNALS] == before


# ---------------------------------------------------------------- signals and readers, in a process of their own

CHILD = """
import contextlib, signal, sys, time, typer
from pipeline.errors import guard, outliving_readers
from stages.stopping import whole_steps
app = typer.Typer()
@app.command()
def work(stubborn: bool = False, steps: bool = False, chatty: bool = False):
    with guard():
        try:
            print("ready", flush=True)
            with whole_steps() if steps else contextlib.nullcontext(lambda: False) as asked_to_stop:
                with contextlib.suppress(Exception):  # as code does that notes the failure of one video and goes on
                    for step in range(600):  # a signal just before one long sleep would only be seen after it
                        time.sleep(0.1)
                        if chatty:
                            print("step", step, flush=True)
                            print("progress", step, file=sys.stderr)
                        if asked_to_stop():
                            open(sys.argv[-1], "w").write("saved")
                            break
                        if chatty and not steps and step == 10:
                            open(sys.argv[-1], "w").write("done")
                            return
            print("went on", flush=True)
        finally:
            print("cleaned", flush=True)
            if stubborn:
                time.sleep(60)
                print("never", flush=True)
with outliving_readers():
    app(sys.argv[1:-1])
"""


@pytest.fixture
def start(tmp_path: Path) -> object:
    """Starts the child above and waits until it is at work; kills what is left at the end."""
    children: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **how: Any) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", CHILD, *arguments, str(tmp_path / "saved")]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        child = subprocess.Popen(words, text=True, **streams)
        children.append(child)
        if child.stdout is not None:
            assert child.stdout.readline() == "ready\n"
        return child

    yield begin
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize(("number", "code"), [*((number, 75) for number in STOP), (signal.SIGINT, 130)])
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


def test_what_nohup_ignores_stays_ignored(start: Callable[..., subprocess.Popen[str]]) -> None:
    child = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    child.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert child.poll() is None
    child.send_signal(signal.SIGUSR2)
    assert child.wait(timeout=20) == 75


def test_a_stop_signal_that_comes_twice_is_one_request(start: Callable[..., subprocess.Popen[str]]) -> None:
    child = start("--stubborn")
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleaned\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None, "the second one cut the clean-up short"
    time.sleep(REPEAT_S)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 75


def test_a_second_ctrl_c_leaves_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    child = start("--stubborn")
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "cleaned\n"
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert child.wait(timeout=20) == 130
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_does_not_end_the_work(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, stream: str
) -> None:
    child = start("--chatty")
    getattr(child, stream).close()
    assert child.wait(timeout=20) == 0
    assert (tmp_path / "saved").read_text() == "done"
    if stream == "stdout":
        assert child.stderr is not None
        assert "error" not in child.stderr.read()


def test_a_lost_terminal_lets_the_step_be_saved_and_exits_75(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    terminal, end = os.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    child = start("--steps", "--chatty", stdin=end, stdout=end, stderr=end, preexec_fn=own_terminal)
    os.close(end)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)  # the window is closed: a hang-up, and every further write is an error
    assert child.wait(timeout=20) == 75
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("words", ["--help", "cache ls . --json", "doctor"])
def test_a_finished_command_whose_reader_has_left_ends_quietly(words: str, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m pipeline.cli {words} | true; exit "${{PIPESTATUS[0]}}"'
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_the_output_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "cache", "ls", "."],
            env=os.environ | {"PYTHONPATH": str(PROJECT)}, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 75
    assert "no space left" in done.stderr
