"""One pass for both extractors, three threads that do not wait for each other, and a clean end whatever ends it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from cache_schema import files
from cache_schema.store import FeatureStore
from pipeline.errors import guard
from stages.data.sources.video_files import VideoFiles
from stages.data.sources.video_process import DecoderProcess
from stages.extract.clip import FrozenClip
from stages.extract.conveyor import Channel, Stopped
from stages.extract.dit import FrozenDiT
from stages.extract.run import Job, extract
from tests.extract.conftest import tree, wanted

MakeJob = Callable[..., Job]
WAIT_S = 60.0  # for what must happen; a failing test takes this long


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("extract-")]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that the two single commands make, one after the other."""
    from tests.extract.conftest import make_job

    make: Any = make_job.__wrapped__()  # type: ignore[attr-defined]
    store = tmp_path_factory.mktemp("whole") / "store"
    for which in ("clip", "teacher"):
        extract(make(world / "videos", store, which=which), wanted(world / "videos"))
    return tree(store)


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, before: Callable[..., None]) -> None:
    """Call ``before(number of the call, *arguments)`` ahead of every call of a method."""
    real, calls = getattr(owner, method), [0]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        before(calls[0], *args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, call)


def frames_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of frames that are asked of the source."""
    read: list[int] = []
    counted(monkeypatch, VideoFiles, "frames", lambda _n, _video, index: read.append(len(index)))
    return read


# ---------------------------------------------------------------- both in one pass


def test_one_pass_writes_the_bytes_of_the_two_commands_and_reads_every_frame_once(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = frames_read(monkeypatch)
    report = extract(make_job(world / "videos", tmp_path / "store", which="both"), wanted(world / "videos"))
    assert (report.videos, report.frames, report.failures) == (8, 40, {})
    assert tree(tmp_path / "store") == whole
    assert sum(read) == 40


@pytest.mark.parametrize(("first", "idle"), [("clip", FrozenClip), ("teacher", FrozenDiT)])
def test_where_one_is_complete_only_the_other_is_done(
    world: Path,
    make_job: MakeJob,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    idle: type,
) -> None:
    extract(make_job(world / "videos", tmp_path / "store", which=first), wanted(world / "videos"))
    used: list[int] = []
    counted(monkeypatch, idle, "encode", lambda n, *_: used.append(n))
    counted(monkeypatch, idle, "view", lambda n, *_: used.append(n))
    extract(make_job(world / "videos", tmp_path / "store", which="both"), wanted(world / "videos"))
    assert not used
    assert tree(tmp_path / "store") == whole
    read = frames_read(monkeypatch)
    extract(make_job(world / "videos", tmp_path / "store", which="both"), wanted(world / "videos"))
    assert not read


def test_each_encoder_resumes_where_it_was(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(world / "videos", tmp_path / "store", which="both")
    extract(job, wanted(world / "videos"))
    for modality, shard in (("tokens", 0), ("pooled/layer8", 2)):
        FeatureStore.open(tmp_path / "store", modality).layout.info.shard_file(shard).unlink()
    read = frames_read(monkeypatch)
    extract(job, wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole
    assert 0 < sum(read) < 40


@pytest.mark.parametrize("parts", [2, 5])
def test_the_parts_of_an_extraction_do_every_video_once_and_end_in_the_same_store(
    world: Path,
    make_job: MakeJob,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    parts: int,
) -> None:
    read = frames_read(monkeypatch)
    job, lacking, done = make_job(world / "videos", tmp_path / "store", which="both"), [], 0
    for number in range(parts, 0, -1):  # 40 frames are three tasks of 16 frames: of five parts, two have nothing to do
        report = extract(job, wanted(world / "videos"), part=(number, parts))
        assert report.failures == {}
        assert len(report.elsewhere) == 8 - report.videos
        lacking.append(report.lacking)
        done += report.frames
    assert lacking == {2: [5, 0], 5: [8, 8, 6, 3, 0]}[parts]
    assert (done, sum(read)) == (40, 40)
    assert tree(tmp_path / "store") == whole


def test_a_retry_reads_the_failed_video_only(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    broken = sorted(videos.iterdir())[2]
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    job = make_job(videos, tmp_path / "store", which="both")
    assert list(extract(job, wanted(videos)).failures) == [broken.stem]
    broken.write_bytes(good)
    asked: list[str] = []
    counted(monkeypatch, VideoFiles, "frames", lambda _n, video, _index: asked.append(video))
    assert extract(job, wanted(videos), retry_failed=True).failures == {}
    assert asked == [broken.stem]
    extract(make_job(videos, tmp_path / "never-broken", which="both"), wanted(videos))
    assert tree(tmp_path / "store") == tree(tmp_path / "never-broken")


def test_a_video_whose_features_overflow_fails_alone_and_the_line_goes_on(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = FrozenClip.encode, [0]

    def encode(self: FrozenClip, pictures: Any) -> dict[str, np.ndarray]:
        calls[0] += 1
        features = real(self, pictures)
        if calls[0] == 4:  # the first of three batches of the second video: two more come along and are dropped
            features["tokens"][0] = np.inf
        return features

    monkeypatch.setattr(FrozenClip, "encode", encode)
    names = sorted(wanted(world / "videos"))
    job = make_job(world / "videos", tmp_path / "store", "extract.batch_size=2", which="clip")
    assert list(extract(job, wanted(world / "videos")).failures) == [names[1]]
    done = FeatureStore.open(tmp_path / "store", "tokens").missing(wanted(world / "videos"))
    assert list(done) == [names[1]]


# ---------------------------------------------------------------- nobody waits


def test_the_next_video_is_read_while_one_is_encoded(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_asked = threading.Event()
    counted(monkeypatch, VideoFiles, "frames", lambda n, *_: second_asked.set() if n == 2 else None)
    seen: list[bool] = []
    counted(monkeypatch, FrozenClip, "encode", lambda n, *_: seen.append(second_asked.wait(WAIT_S)) if n == 1 else None)
    extract(make_job(world / "videos", tmp_path / "store"), wanted(world / "videos"))
    assert seen == [True]


def test_a_shard_is_published_while_the_next_is_encoded(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing, encoding, seen, real = threading.Event(), threading.Event(), list[bool](), files.publish

    def publish(partial: Path, final: Path) -> bool:
        if final.name == "c.0.0.0":
            publishing.set()
            seen.append(encoding.wait(WAIT_S))
        return real(partial, final)

    def encode(number: int, *_: object) -> None:
        if number == 4:  # the first video of the second shard
            seen.append(publishing.wait(WAIT_S))
            encoding.set()

    monkeypatch.setattr(files, "publish", publish)
    counted(monkeypatch, FrozenClip, "encode", encode)
    extract(make_job(world / "videos", tmp_path / "store"), wanted(world / "videos"))
    assert seen == [True, True]


def test_a_channel_holds_no_more_than_its_size_and_wakes_both_sides_when_stopped() -> None:
    channel, sent, ends = Channel(2), [], []

    def send() -> None:
        try:
            for number in range(9):
                channel.put(number)
                sent.append(number)
        except Stopped:
            ends.append("sender")

    sender = threading.Thread(target=send)
    sender.start()
    assert channel.get() == 0
    deadline = time.monotonic() + WAIT_S
    while len(sent) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sent == [0, 1, 2]
    channel.stop()
    sender.join(WAIT_S)
    with pytest.raises(Stopped):
        channel.get()
    assert ends == ["sender"]


# ---------------------------------------------------------------- a clean end


def partial_files(store: Path) -> list[str]:
    return [name for name in tree(store) if name.endswith(".partial")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("after", [1, 5])
def test_a_signal_ends_it_cleanly_and_the_same_command_goes_on(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes], number: int, code: int, after: int
) -> None:
    def kill(done: int, _total: int, _video: str) -> None:
        if done == after:
            os.kill(os.getpid(), number)

    job = make_job(world / "videos", tmp_path / "store", which="both")
    with pytest.raises(typer.Exit) as ended, guard():
        extract(job, wanted(world / "videos"), progress=kill)
    assert ended.value.exit_code == code
    assert partial_files(tmp_path / "store") == []
    extract(job, wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole


def test_ctrl_c_does_not_wait_for_a_decoder_that_hangs(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[DecoderProcess] = []
    start = DecoderProcess.__init__

    def remember(self: DecoderProcess) -> None:
        start(self)
        decoders.append(self)

    def hang(number: int, *_: object) -> None:
        if number == 3:
            decoders[-1].popen.send_signal(signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(DecoderProcess, "__init__", remember)
    counted(monkeypatch, VideoFiles, "frames", hang)
    started = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            extract(make_job(world / "videos", tmp_path / "store"), wanted(world / "videos"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60
    assert partial_files(tmp_path / "store") == []


def test_an_error_of_the_encoder_names_its_video_and_what_came_before_is_kept(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int, *_: object) -> None:
        if number == 6:
            raise RuntimeError("of the device")

    job, names = make_job(world / "videos", tmp_path / "store"), sorted(wanted(world / "videos"))
    with monkeypatch.context() as patch:
        counted(patch, FrozenClip, "encode", fail)
        with pytest.raises(RuntimeError, match="of the device") as caught:
            extract(job, wanted(world / "videos"))
    assert caught.value.__notes__ == [f"It happened at video {names[5]!r}."]
    assert partial_files(tmp_path / "store") == []
    missing = FeatureStore.open(tmp_path / "store", "tokens").missing(wanted(world / "videos"))
    assert sorted(missing) == names[3:]  # 16 frames are a shard, 5 a video
    extract(make_job(world / "videos", tmp_path / "store", which="both"), wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole


def test_an_error_of_the_source_names_its_video(
    world: Path, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int, *_: object) -> None:
        if number == 5:
            raise PermissionError(errno.EACCES, "no more", "the disk of videos")

    counted(monkeypatch, VideoFiles, "frames", fail)
    names = sorted(wanted(world / "videos"))
    with pytest.raises(PermissionError, match="the disk of videos") as caught:
        extract(make_job(world / "videos", tmp_path / "store"), wanted(world / "videos"))
    assert caught.value.__notes__ == [f"It happened at video {names[4]!r}."]
    missing = FeatureStore.open(tmp_path / "store", "tokens").missing(wanted(world / "videos"))
    assert sorted(missing) == names[3:]


def test_a_full_disk_ends_the_line_and_loses_nothing_that_was_published(
    world: Path, make_job: MakeJob, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.publish

    def publish(partial: Path, final: Path) -> bool:
        if final.name == "c.1.0.0":
            raise OSError(errno.ENOSPC, "No space left on device", str(final))
        return real(partial, final)

    job = make_job(world / "videos", tmp_path / "store", which="both")
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        with pytest.raises(typer.Exit) as ended, guard():
            extract(job, wanted(world / "videos"))
    assert ended.value.exit_code == 75
    assert partial_files(tmp_path / "store") == []
    assert FeatureStore.open(tmp_path / "store", "tokens").shard(0) is not None
    extract(job, wanted(world / "videos"))
    assert tree(tmp_path / "store") == whole
