"""Signals, a full or read-only disk, two extractions of one store, too little memory: real videos, a real encoder."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import typer
from torch import Tensor

from cache_schema import verify
from cache_schema.store import FeatureStore
from pipeline.errors import guard
from stages.extract import run as run_module
from stages.extract.fitting import Fitting
from stages.extract.run import Job, extract
from tests.extract.conftest import tree, wanted

MakeJob = Callable[..., Job]
CONTEXT = multiprocessing.get_context("forkserver")  # children start from a clean process that has the imports
CONTEXT.set_forkserver_preload(["zarr", "stages.extract.clip", "stages.extract.run", "tests.extract.test_interrupted"])


def command(job: Job, started: Any, seen: Any, slow: float = 0.0) -> None:
    """What a command does with a job: exit codes are those of the command line."""

    def progress(_done: int, _total: int, video: str) -> None:
        if video in wanted(Path(job.config.data.videos)):
            seen.put(video)
            started.set()
            time.sleep(slow)

    try:
        with guard():
            extract(job, wanted(Path(job.config.data.videos)), progress=progress)
    except typer.Exit as end:
        os._exit(end.exit_code)


def start(job: Job, slow: float = 0.0) -> tuple[Any, Any, Any]:
    started, seen = CONTEXT.Event(), CONTEXT.Queue()
    child = CONTEXT.Process(target=command, args=(job, started, seen, slow))
    child.start()
    return child, started, seen


def names(seen: Any) -> list[str]:
    found = []
    while not seen.empty():
        found.append(seen.get())
    return found


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of a run that nothing disturbed."""
    from pipeline import presets
    from pipeline.overrides import apply
    from tests.extract.conftest import BUILDERS

    sets = ["data.name=clips", f"data.videos={world / 'videos'}", "data.annotations=", "extract.shard_frames=16"]
    store = tmp_path_factory.mktemp("whole") / "store"
    extract(Job(apply(presets.get("miniature"), sets), (BUILDERS["clip"],), store, "cpu"), wanted(world / "videos"))
    return tree(store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_02_a_signal_lets_the_shard_at_hand_be_finished_and_exits_75_and_the_next_run_ends_the_same(
    number: int, world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    job = make_job(world / "videos", tmp_path / "store")
    child, started, videos = start(job, slow=0.5)
    assert started.wait(120)
    for _ in range(2):  # a launcher may pass on what its process group has heard
        os.kill(child.pid, number)
    child.join(120)
    assert child.exitcode == 75
    done = {video for video, entry in FeatureStore.open(tmp_path / "store", "tokens").status().items() if entry.ok}
    assert set(names(videos)) == done, "the features of a video were thrown away"
    left = {name for name in tree(tmp_path / "store") if Path(name).name.startswith(".")}
    assert not left, "a partial file was left"
    assert {problem.kind for problem in verify.full(FeatureStore.open(tmp_path / "store", "tokens"))} == {"missing"}
    extract(job, wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole


def test_02_ctrl_c_drops_the_shard_at_hand(world: Path, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(world / "videos", tmp_path / "store")
    child, started, _ = start(job, slow=0.5)
    assert started.wait(120)
    os.kill(child.pid, signal.SIGINT)
    child.join(120)
    assert child.exitcode == 130
    assert not FeatureStore.open(tmp_path / "store", "tokens").status()


def test_03_a_second_ctrl_c_leaves_at_once_and_the_store_is_readable_and_goes_on(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    job = make_job(world / "videos", tmp_path / "store")
    for pause in (0.0, 0.01, 0.1):
        child, started, _ = start(job, slow=0.5)
        assert started.wait(120)
        for _ in range(2):
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGINT)
            time.sleep(pause)
        child.join(60)
        assert child.exitcode == 130
        assert {p.kind for p in verify.full(FeatureStore.open(tmp_path / "store", "tokens"))} <= {"missing"}
    extract(job, wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB: one shard of 180 kB, and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_04_a_full_disk_exits_75_harms_nothing_and_the_next_run_with_room_ends_the_same(
    small_disk: Path, world: Path, make_job: MakeJob, whole: dict[str, bytes]
) -> None:
    job = make_job(world / "videos", small_disk / "store")
    child, _, seen = start(job)
    child.join(240)
    assert child.exitcode == 75
    assert names(seen), "the disk was full before the first video"
    store = FeatureStore.open(small_disk / "store", "tokens")
    assert {problem.kind for problem in verify.full(store)} == {"missing"}
    assert store.status(), "nothing was committed before the disk was full"
    assert not list(small_disk.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    extract(job, wanted(world / "videos"))
    assert tree(small_disk / "store") == whole


def test_05_a_disk_that_cannot_be_written_exits_5_with_the_path_and_harms_nothing(
    small_disk: Path, world: Path, make_job: MakeJob, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    job = make_job(world / "videos", small_disk / "store")
    extract(job, wanted(world / "videos"))
    shard = FeatureStore.open(small_disk / "store", "tokens").layout.info.shard_file(1)
    shard.unlink()
    left = tree(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(typer.Exit) as caught, guard():
        extract(job, wanted(world / "videos"))
    assert caught.value.exit_code == 5
    said = capsys.readouterr().err
    assert re.search(rf"error: .*Read-only file system: {small_disk}/store", said), said
    assert tree(small_disk / "store") == left
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    extract(job, wanted(world / "videos"))
    assert tree(small_disk / "store") == whole


def test_06_two_extractions_that_meet_make_one_store_and_neither_fails(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    job = make_job(world / "videos", tmp_path / "store")
    children = [start(job, slow=0.1) for _ in range(2)]
    for child, _, _ in children:
        child.join(240)
        assert child.exitcode == 0
    assert tree(tmp_path / "store") == whole


class Small:
    """A real encoder on a device with room for ``limit`` frames at once."""

    def __init__(self, encoder: Any, limit: int, error: Callable[[str], Exception]) -> None:
        self.encoder, self.limit, self.error = encoder, limit, error
        self.specs, self.view, self.sizes = encoder.specs, encoder.view, list[int]()

    def __call__(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return self.encode(self.view(frames))

    def encode(self, pictures: Tensor) -> dict[str, np.ndarray]:
        self.sizes.append(len(pictures))
        if len(pictures) > self.limit:
            raise self.error("tried to allocate 2.00 GiB: can't allocate memory")
        result: dict[str, np.ndarray] = self.encoder.encode(pictures)
        return result

    def weights_digest(self) -> str:
        return str(self.encoder.weights_digest())


class NoRoom:
    """What is asked of an encoder before it is run."""

    specs: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def view(frames: np.ndarray) -> Tensor:
        return torch.from_numpy(frames)


def out_of_memory(text: str) -> Exception:
    return torch.OutOfMemoryError(text)


@pytest.mark.parametrize("error", [out_of_memory, RuntimeError, MemoryError])
def test_42_a_batch_too_large_is_halved_once_for_the_whole_run_and_the_store_is_the_same(
    error: Callable[[str], Exception],
    world: Path,
    make_job: MakeJob,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(world / "videos", tmp_path / "store")
    source, (fitting,) = run_module.tools(job)
    assert isinstance(fitting, Fitting)
    small = Small(fitting.encoder, 3, error)
    monkeypatch.setattr(run_module, "tools", lambda _: (source, (Fitting(small),)))
    monkeypatch.setattr(run_module, "release", lambda _: source.close())
    run_module.worker.cache_clear()
    extract(job, wanted(world / "videos"))
    assert small.sizes[:4] == [5, 2, 2, 1]
    assert max(small.sizes[1:]) == 2, "a batch met the end of the memory again"
    run_module.worker.cache_clear()
    assert tree(tmp_path / "store").keys() == whole.keys()
    tokens = FeatureStore.open(tmp_path / "store", "tokens")
    assert verify.full(tokens) == []


@pytest.mark.parametrize("error", [out_of_memory, RuntimeError, MemoryError])
def test_one_frame_that_is_too_much_says_so_with_its_size(error: Callable[[str], Exception]) -> None:
    other = Fitting(Small(NoRoom(), 0, error))
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        other.encode(torch.zeros(5, 3, 40, 40, dtype=torch.uint8))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "one frame of 40x40" in text
    assert isinstance(caught.value, MemoryError | torch.OutOfMemoryError)
