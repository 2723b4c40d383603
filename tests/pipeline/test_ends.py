"""How commands end: every long one hears every stop signal, has its folder for itself, and knows a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app
from pipeline.runs import RunFolder
from stages.stopping import STOP
from tests.conftest import PROJECT
from tests.pipeline.conftest import options_of

pytestmark = pytest.mark.slow

SHORT = {"compare", "ablate-status", "doctor", "cache ls", "cache gc", "cache inspect"}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def run_folder(seeded: list[str], seeded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "done"
    words = ["train-student", *options_of([*seeded, "train.max_steps=2"]), "--cache", str(seeded_cache)]
    done = call(*words, "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def words_of(seeded: list[str], seeded_cache: Path, run_folder: Path) -> Callable[[str, Path, int], list[str]]:
    """The words of a long command that works below a folder; its runs take so many steps."""

    def words(command: str, folder: Path, steps: int = 2) -> list[str]:
        sets = options_of([*seeded, f"train.max_steps={steps}", "train.save_every=1000"])
        store, cpu = ["--cache", str(seeded_cache)], ["--device", "cpu"]
        new = ["--cache", str(folder / "new"), *cpu]
        if command in ("evaluate", "diagnose", "report") and not (folder / "run").exists():
            shutil.copytree(run_folder, folder / "run")
        table: dict[str, list[str]] = {
            "extract": [*sets, *new],
            "extract-clip": [*sets, *new],
            "extract-teacher": [*sets, *new],
            "train-student": [*sets, *store, *cpu, "--out", str(folder / "out")],
            "evaluate": ["--run", str(folder / "run"), *store, *cpu],
            "baselines": [*sets, *store, "--out", str(folder / "out"), "--probe", "majority", "--probe", "clip_mean"],
            "ablate": ["--vary", "train.lambda_kd=0,1", *sets, *store, *cpu, "--out", str(folder / "out")],
            "tour": [*sets, *store, "--out", str(folder / "out"), "--processes", "2"],
            "diagnose": ["--run", str(folder / "run"), *store, *cpu, "--samples", "8"],
            "report": [str(folder / "run"), "--out", str(folder / "page" / "page.html")],
            "synth": ["--out", str(folder / "drawn"), "--videos", "60"],
            "cache verify": [*sets, *store, *cpu, "--semantic", "500", "--full"],
            "cache repair": [*sets, *store, *cpu],
            "cache copy": [str(seeded_cache), str(folder / "copy")],
            "cache export": [*sets, *store, "--out", str(folder / "tars")],
        }
        return [*command.split(), *table[command]]

    return words


LONG = (
    *("extract", "extract-clip", "extract-teacher", "train-student", "evaluate", "baselines", "ablate", "tour"),
    *("diagnose", "report", "synth", "cache verify", "cache repair", "cache export", "cache copy"),
)


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words], env=environment(), capture_output=True, text=True
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(command, env=environment(), start_new_session=True, **pipes))
        return children[-1]

    yield begin
    for child in children:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def test_every_command_is_in_one_of_the_tables() -> None:
    commands: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    names = {f"cache {name}" for name in commands.pop("cache").commands} | commands.keys()
    assert names == SHORT | set(LONG)


# One place hears all four: each command is sent one of them, and a training all.
ROWS = [(command, STOP[place % len(STOP)]) for place, command in enumerate(LONG)]
ROWS += [("train-student", number) for number in STOP if ("train-student", number) not in ROWS]


@pytest.mark.parametrize(("command", "number"), ROWS)
def test_a_stop_signal_ends_every_long_command_with_75(
    command: str, number: int, words_of: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    child = start(*words_of(command, tmp_path, 400))
    wait_until(lambda: hears(child.pid, number), child)
    time.sleep(0.1)
    os.killpg(child.pid, number)  # as a batch system does: all processes of the step
    _, err = child.communicate(timeout=120)
    assert child.returncode == 75, err
    assert err.endswith(
        f"error: interrupted by {signal.Signals(number).name}.\n"
        "What is finished is kept. The same command, given again, goes on from there.\n"
    ), err


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGHUP], ids=["SIGUSR2", "SIGHUP"])
@pytest.mark.parametrize("command", ["train-student", "ablate", "tour"])
def test_a_training_saves_the_very_step(
    command: str, number: int, words_of: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    child = start(*words_of(command, tmp_path, 4000))

    def steps() -> list[Path]:
        return [path for path in tmp_path.rglob("metrics.jsonl") if path.read_bytes().count(b"\n") >= 3]

    wait_until(lambda: bool(steps()), child)
    os.killpg(child.pid, number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 75, err
    for path in steps():
        run = RunFolder.open(path.parent)
        assert run.step_at("latest") == run.metrics()[-1]["step"] >= 3, path


@pytest.mark.parametrize("command", ["train-student", "ablate", "tour"])
def test_the_second_of_two_is_told_and_changes_nothing_and_a_killed_one_is_followed(
    command: str, words_of: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    words = words_of(command, tmp_path, 60)
    first = start(*words)
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")), first)
    os.killpg(first.pid, signal.SIGSTOP)  # slower than this it cannot be, and it lives
    second = call(*words)
    assert second.returncode == 75, second.stderr
    assert f"{tmp_path / 'out'} is being written by process {first.pid} on " in second.stderr
    assert f"kill -USR1 {first.pid}" in second.stderr
    run = next(path.parent for path in tmp_path.rglob("metrics.jsonl"))
    assert call("evaluate", "--run", str(run), "--device", "cpu").returncode == 75
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    third = call(*words)
    assert third.returncode == 0, third.stderr
    for path in tmp_path.rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, 61))
    assert not list(tmp_path.rglob(".lock*"))


ROOM = {  # kB left on the disk: enough to begin, too little for what is made
    "train-student": 200,
    "ablate": 300,
    "evaluate": 4,
    "baselines": 8,
    "tour": 200,
    "diagnose": 8,
    "report": 8,
    "synth": 40,
    "extract": 200,
    "cache export": 8,
}


@pytest.mark.parametrize("command", ROOM)
def test_a_full_disk_is_75_with_the_path_and_with_room_the_same_command_ends(
    command: str, words_of: Callable[..., list[str]], small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("64m")
    words = words_of(command, disk, 2)
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - 1024 * ROOM[command]))
    full = call(*words)
    assert full.returncode == 75, full.stderr
    assert "no space left on the device" in full.stderr
    assert "free some space" in full.stderr
    assert str(disk) in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(disk.rglob(".lock*"))
    filler.unlink()
    again = call(*words)
    assert again.returncode == 0, again.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    if command not in ("synth", "cache export", "extract"):  # these have nothing left to write
        shut = call(*words)
        assert shut.returncode == 5, shut.stderr
        assert f"Read-only file system: {disk}" in shut.stderr
