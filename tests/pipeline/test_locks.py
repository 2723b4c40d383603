"""One writer a folder, between real processes: on one machine, on two, in two containers of one name, after kill -9."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import locks
from pipeline.locks import Holder, is_lock, replace_text, writing
from tests.conftest import PROJECT

CHILD = """
import os, sys, time, typer
from pathlib import Path
from pipeline import locks
from pipeline.errors import guard
locks.BEAT_S, locks.WATCH_S, locks.POLL_S = 0.1, 1.0, 0.02
folder, seconds, links = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if links == "no":
    def link(*_): raise PermissionError(1, "Operation not permitted")  # what FAT and some network disks answer
    os.link = link
log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
try:
    with guard(), locks.writing(folder):
        os.write(log, f"in {os.getpid()}\\n".encode())
        print("holds", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        os.write(log, f"out {os.getpid()}\\n".encode())
except typer.Exit as exit:
    sys.exit(exit.exit_code)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that holds ``run`` for some seconds; kills what is left at the end."""
    children: list[subprocess.Popen[str]] = []

    def begin(seconds: float = 60, *, machine: list[str] | None = None, links: str = "yes") -> subprocess.Popen[str]:
        words = [*(machine or []), sys.executable, "-c", CHILD, str(tmp_path / "run"), str(seconds), links]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        child = subprocess.Popen(words, env=environment, cwd=tmp_path, start_new_session=True, **pipes)
        children.append(child)
        return child

    yield begin
    for child in children:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str, str], list[str]]:
    """The words before a command that run it on another machine: own host name, boot and process numbers.

    With an empty ``boot`` it is another container of this machine.
    """
    if subprocess.run(["unshare", "-mpuf", "--mount-proc", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")

    def words(host: str, boot: str) -> list[str]:
        script = f"hostname {host}; "
        if boot:
            (tmp_path / "boot").write_text(boot + "\n")
            script += f"mount --bind {tmp_path}/boot /proc/sys/kernel/random/boot_id; "
        return ["unshare", "-mpuf", "--kill-child", "--mount-proc", "bash", "-c", script + 'exec "$@"', "bash"]

    return words


def wait_until_held(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "holds\n", child.stderr and child.stderr.read()


def overlaps(log: Path) -> int:
    """Most holders at once."""
    most = now = 0
    for line in log.read_text().splitlines():
        now += 1 if line.startswith("in ") else -1
        most = max(most, now)
    return most


def test_the_second_writer_is_told_who_holds_the_folder_and_the_command_that_it_names_works(
    start: Start, tmp_path: Path
) -> None:
    first = start()
    wait_until_held(first)
    second = start(0)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 75
    assert f"{tmp_path / 'run'} is being written by process {first.pid} on {os.uname().nodename}, this machine" in err
    assert re.search(r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", err)
    command = err.partition("Have it save and stop:  ")[2].splitlines()[0]
    assert subprocess.run(shlex.split(command)).returncode == 0
    assert first.wait(timeout=60) == 75
    third = start(0)
    assert third.wait(timeout=60) == 0
    assert not (tmp_path / "run").exists()  # made by a writer who wrote nothing


@pytest.mark.parametrize("links", ["yes", "no"])
def test_a_killed_writer_is_followed_at_once(start: Start, tmp_path: Path, links: str) -> None:
    first = start(links=links)
    wait_until_held(first)
    first.kill()  # not waited for: its entry in the table of processes stays
    time.sleep(0.3)
    began = time.monotonic()
    second = start(0.2, links=links)
    _, err = second.communicate(timeout=60)
    assert (second.returncode, err) == (0, "")
    assert time.monotonic() - began < 20
    assert [path for path in tmp_path.rglob("*") if is_lock(path.name)] == []


@pytest.mark.parametrize("links", ["yes", "no"])
def test_of_many_who_find_a_dead_writer_one_at_a_time_gets_the_folder(start: Start, tmp_path: Path, links: str) -> None:
    first = start(links=links)
    wait_until_held(first)
    first.kill()
    first.wait()
    (tmp_path / "log").unlink()
    newcomers = [start(0.5, links=links) for _ in range(8)]
    codes = [child.wait(timeout=120) for child in newcomers]
    assert set(codes) <= {0, 75}
    assert codes.count(0) >= 1
    assert overlaps(tmp_path / "log") == 1


def test_two_who_start_together_do_not_both_hold_it(start: Start, tmp_path: Path) -> None:
    for child in [start(0.5) for _ in range(8)]:
        assert child.wait(timeout=120) in (0, 75)
    assert overlaps(tmp_path / "log") == 1


@pytest.mark.parametrize(
    ("host", "boot"),
    [("node2", "11111111-2222-3333-4444-555555555555"), ("", "11111111-2222-3333-4444-555555555555"), ("", "")],
    ids=["another node", "another node of the same name", "another container of the same name"],
)
def test_a_living_twin_elsewhere_is_respected_and_a_dead_one_is_followed(
    start: Start, machine: Callable[[str, str], list[str]], tmp_path: Path, host: str, boot: str
) -> None:
    name = host or os.uname().nodename
    twin = start(machine=machine(name, boot))
    wait_until_held(twin)
    newcomer = start(0)
    _, err = newcomer.communicate(timeout=60)
    assert newcomer.returncode == 75
    assert f"on {name}, since" in err
    assert "kill" not in err  # the number means nothing here
    os.killpg(twin.pid, signal.SIGKILL)
    twin.wait()
    time.sleep(0.2)
    began = time.monotonic()
    follower = start(0.2)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 0, err
    assert "watching up to 1 s" in err
    assert time.monotonic() - began > 1
    assert [path for path in tmp_path.rglob("*") if is_lock(path.name)] == []


def test_a_writer_that_slept_while_another_machine_took_over_leaves_without_writing(
    start: Start, machine: Callable[[str, str], list[str]], tmp_path: Path
) -> None:
    sleeper = start(5)
    wait_until_held(sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    follower = start(20, machine=machine("node2", "11111111-2222-3333-4444-555555555555"))
    wait_until_held(follower)
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(timeout=60) == 75
    assert sleeper.stderr is not None
    assert "is not this process's any more" in sleeper.stderr.read()
    assert "out" not in (tmp_path / "log").read_text()
    assert Holder.parse((tmp_path / "run" / locks.FILE).read_bytes()).host == "node2"


def test_a_writer_whose_lock_was_removed_leaves(start: Start, tmp_path: Path) -> None:
    first = start()
    wait_until_held(first)
    (tmp_path / "run" / locks.FILE).unlink()
    assert first.wait(timeout=60) == 75


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../../x"}', '{"token": 3}', '{"pid": "1"}', "\0" * 5000])
def test_a_damaged_lock_is_watched_like_one_from_elsewhere(start: Start, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.FILE).write_text(text)
    assert start(0).wait(timeout=60) == 0
    assert os.listdir(tmp_path / "run") == []


def test_a_process_may_write_below_and_again_to_what_it_holds(tmp_path: Path) -> None:
    with writing(tmp_path / "a"), writing(tmp_path / "a" / "b"), writing(tmp_path / "a" / ".." / "a"):
        (tmp_path / "a" / "b" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


def test_a_job_of_slurm_is_named_with_the_command_that_signals_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    holder = Holder.this_process()
    other = json.dumps(vars(holder) | {"boot": "another", "host": "node7"}).encode()
    text = locks._Lock(tmp_path)._advice(Holder.parse(other))
    assert "on node7 (SLURM job 4711), since" in text
    assert text.endswith("scancel --signal=USR1 4711")


def test_of_two_texts_for_one_file_one_stays_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.locks import replace_text\n"
        "for _ in range(300): replace_text(Path(sys.argv[1]), sys.argv[2] * 5000)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "page")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    children = [subprocess.Popen([*words, letter], env=environment) for letter in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    assert set((tmp_path / "page").read_text()) in ({"a"}, {"b"})
    assert os.listdir(tmp_path) == ["page"]
    replace_text(tmp_path / "page", "c")
    assert (tmp_path / "page").read_text() == "c"
