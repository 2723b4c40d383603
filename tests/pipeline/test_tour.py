"""``pipeline tour`` at small size: its table is that of its run folders, and any start goes on from there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.runs import RunFolder
from pipeline.tour import ARMS, BASELINES, TASKS
from stages.decode.evaluate import rescore
from tests.conftest import PROJECT
from tests.pipeline.conftest import options_of

FOLDERS = {"MA-LMM (λ = 0)": "lambda-0", "Diff-LMM (λ = 1)": "lambda-1"} | {
    row: f"baselines/{name}/{name}" for row, name in BASELINES.items()
}


@pytest.fixture(scope="module")
def words(seeded: list[str], seeded_cache: Path) -> list[str]:
    sets = [*seeded, "train.max_steps=2", "train.warmup_steps=1", "train.save_every=1"]
    return ["tour", *options_of(sets), "--cache", str(seeded_cache), "--processes", "1"]


@pytest.fixture(scope="module")
def toured(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One whole tour: where it is, and what it says to machines."""
    out = tmp_path_factory.mktemp("tour") / "out"
    done = run(*words, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return out, json.loads(done.stdout)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_the_numbers_of_the_table_are_those_of_the_run_folders(toured: tuple[Path, dict[str, Any]]) -> None:
    out, result = toured
    assert list(result["table"]) == list(TASKS)
    for task, rows in result["table"].items():
        assert list(rows) == [*BASELINES, *ARMS]
        for row, told in rows.items():
            kept = rescore(out / task / FOLDERS[row] / "predictions.jsonl", "exact").to_json()
            assert told == {key: kept[key] for key in ("n", "correct", "top1", "videos", "by_video")}
    assert (result["jobs"], result["done_before"]) == (10, 0)


def test_every_arm_is_the_run_that_the_settings_ask_for(toured: tuple[Path, dict[str, Any]]) -> None:
    out, _ = toured
    for task in TASKS:
        for value in (0, 1):
            folder = RunFolder.open(out / task / f"lambda-{value}")
            train = folder.config.train
            assert (folder.config.data.task, folder.config.data.num_frames, train.lambda_kd) == (task, 3, value)
            assert (train.max_steps, train.max_samples) == (2, 8)  # what is typed goes before what a task sets
            assert folder.step_at("final") == 2


def test_a_second_start_does_nothing_and_prints_the_same_table_within_80_columns(
    toured: tuple[Path, dict[str, Any]], words: list[str]
) -> None:
    out, result = toured
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    done = run(*words, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "10 of 10 were done before; nothing to do" in done.stdout
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before
    lines = done.stdout.splitlines()
    for row in (*BASELINES, *ARMS):
        (line,) = [line for line in lines if line.strip().startswith(row)]
        cells = [f"{100 * result['table'][task][row]['top1']:.1f}" for task in TASKS]
        intervals = [result["table"][task][row]["by_video"]["interval"] for task in TASKS]
        told = [
            f"{cell} ({100 * low:.1f} to {100 * high:.1f})" for cell, (low, high) in zip(cells, intervals, strict=True)
        ]
        assert line.split() == f"{row} {' '.join(told)}".split()
        assert len(line) <= 80
    (command, _) = [line for line in lines if line.startswith("  pipeline report ")]
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert (out / "scene" / "report.html").is_file()


def test_a_tour_that_was_interrupted_and_killed_ends_with_the_same_table(
    toured: tuple[Path, dict[str, Any]], words: list[str], tmp_path: Path
) -> None:
    _, whole = toured
    out = tmp_path / "out"
    child = start(words, out)
    wait_for((out / "scene" / "lambda-0" / "checkpoints" / "latest.json").exists, child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, "The same command" in err) == (75, True), err
    assert not list(out.glob("*/baselines"))  # what was waiting did not begin

    child = start(words, out)
    wait_for((out / "scene" / "lambda-1" / "config.json").exists, child)
    workers = children_of(child.pid)
    assert workers
    child.kill()
    child.communicate()
    wait_for(lambda: not any(map(is_running, workers)))  # nobody writes there when the next start begins

    done = run(*words, "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["table"] == whole["table"]


def test_without_features_it_names_the_command_that_makes_them(words: list[str], tmp_path: Path) -> None:
    done = run(*words, "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert done.exit_code == 4
    assert "pipeline extract-clip --preset miniature" in done.stderr


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", *words, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str] | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child is None or child.poll() is None, "the child ended"
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
