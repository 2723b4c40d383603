"""The decoder process: it is replaced when it hangs or dies, outlives nothing, and knows nothing it should not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.data.frames import VideoFiles
from stages.data.sources import video_process
from stages.data.sources.frame_grid import Rejected
from stages.data.sources.limits import Limits
from stages.data.sources.picture_batches import DEFAULT_LIMITS
from stages.data.sources.video_process import DecoderProcess, VideoDecoder, VideoPart
from stages.types import VideoRejected
from tests.data.barcode import MILLISECONDS, number_in, write_video

PROJECT = Path(__file__).resolve().parents[2]
CFR = [k * 3600 for k in range(60)]  # 24 grid frames at 10 fps
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.fixture
def videos(tmp_path: Path) -> Iterator[VideoFiles]:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", CFR)
    source = VideoFiles(tmp_path, fps=10, limits=replace(DEFAULT_LIMITS, timeout_s=30.0))
    yield source
    source.close()


def numbers(source: VideoFiles, video_id: str) -> list[int]:
    return [number_in(rgb) for batch in source.frames(video_id, np.arange(3), batch_size=2) for rgb in batch]


def idle(source: VideoFiles) -> list[DecoderProcess]:
    return source._reader.decoder.idle


def wait_until(true: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_one_process_serves_many_videos(videos):
    numbers(videos, "a")
    (process,) = idle(videos)
    assert numbers(videos, "b") == [0, 2, 5]
    assert videos.count_frames("b") == 24
    assert idle(videos) == [process]


def test_a_rejected_video_does_not_cost_the_process(videos, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    numbers(videos, "b")
    (process,) = idle(videos)
    with pytest.raises(VideoRejected):
        numbers(videos, "a")
    assert idle(videos) == [process]


def test_a_process_that_hangs_is_killed_in_time_and_the_next_video_works(videos):
    numbers(videos, "a")
    (process,) = idle(videos)
    videos._reader.decoder.limits = Limits(10**8, 100.0, timeout_s=0.5)
    os.kill(process.popen.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(VideoRejected, match=r"takes more than 0.5 s \(data.decode_timeout_s\)") as caught:
        numbers(videos, "a")
    assert caught.value.kind == "timeout"
    assert time.monotonic() - began < 5
    assert process.popen.returncode == -signal.SIGKILL
    videos._reader.decoder.limits = Limits(10**8, 100.0, timeout_s=30.0)
    assert numbers(videos, "b") == [0, 2, 5]


def test_a_slow_reader_does_not_use_up_the_decoders_time(videos):
    videos._reader.decoder.limits = Limits(10**8, 100.0, timeout_s=3.0)
    numbers(videos, "a")  # the process is there
    seen = []
    for batch in videos.frames("a", np.arange(24), batch_size=8):
        time.sleep(1.2)
        seen += [number_in(rgb) for rgb in batch]
    assert len(seen) == 24


def test_a_process_that_dies_on_a_video_is_replaced(videos, tmp_path):
    write_video(tmp_path / "a.mp4", CFR, size=(960, 540))  # more than a pipe holds
    numbers(videos, "a")
    (process,) = idle(videos)
    frames = iter(videos.frames("a", np.arange(24), batch_size=1))
    next(frames)
    os.kill(process.popen.pid, signal.SIGSEGV)
    with pytest.raises(VideoRejected, match="the decoder process died on it") as caught:
        list(frames)
    assert caught.value.kind == "decoder_crashed"
    assert numbers(videos, "b") == [0, 2, 5]


def test_a_process_that_died_between_videos_costs_no_video(videos):
    numbers(videos, "a")
    idle(videos)[0].popen.kill()
    idle(videos)[0].popen.wait()
    assert numbers(videos, "b") == [0, 2, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_to_the_whole_job_do_not_end_the_process_under_its_parent(number, videos):
    numbers(videos, "a")
    (process,) = idle(videos)
    os.kill(process.popen.pid, number)
    assert numbers(videos, "b") == [0, 2, 5]
    assert idle(videos) == [process]


@linux
def test_close_leaves_no_process(videos):
    numbers(videos, "a")
    pid = idle(videos)[0].popen.pid
    videos.close()
    assert not running(pid)


@linux
@pytest.mark.parametrize("moment", ["idle", "in the middle of a video"])
def test_a_parent_that_is_killed_leaves_no_process(moment, tmp_path):
    write_video(tmp_path / "v.mp4", CFR, size=(960, 540))
    program = f"""
        import time
        import numpy as np
        from stages.data.frames import VideoFiles
        source = VideoFiles({str(tmp_path)!r}, fps=25)
        frames = iter(source.frames("v", np.arange(60), batch_size=1))
        source.count_frames("v")
        pid = source._reader.decoder.idle[0].popen.pid
        if {moment != "idle"}:
            next(frames)
        print(pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=PROJECT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not running(child))


def test_the_kernels_timer_ends_a_process_that_never_returns_to_python():
    program = """
        import ctypes
        from stages.data.sources.video_child import Timer
        Timer(0.3)
        ctypes.PyDLL(None).sleep(30)  # PyDLL keeps the interpreter lock, as a hanging decoder may
    """
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=PROJECT, check=False)
    assert ended.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 20


def test_the_process_imports_nothing_that_is_not_needed_to_decode():
    program = """
        import sys
        import stages.data.sources.video_child
        heavy = {"torch", "zarr", "pydantic", "jaxtyping", "PIL", "webdataset", "stages.types", "stages.config"}
        sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_importing_frames_does_not_load_a_video_library():
    program = "import sys, stages.data.frames; sys.exit('av' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False).returncode == 0


@linux
def test_the_process_gets_no_secrets_and_cannot_write_files(videos, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a")
    numbers(videos, "a")
    pid = idle(videos)[0].popen.pid
    assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = {line[:25].strip(): line[26:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max address space"] == str(video_process.MEMORY_BYTES)


@linux
def test_a_video_that_needs_more_memory_than_allowed_is_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mkv", [0], codec="mjpeg", pixels="yuvj420p", size=(8192, 6000), time_base=MILLISECONDS)
    source = VideoFiles(tmp_path, fps=10)
    # What is mapped before anything is decoded differs by machine; RGB alone is another 147 MB.
    process = DecoderProcess()
    mapped = int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    process.kill()
    monkeypatch.setattr(video_process, "MEMORY_BYTES", mapped + (20 << 20))
    with pytest.raises(VideoRejected) as caught:
        numbers(source, "v")
    assert caught.value.kind == "out_of_memory"
    source.close()


def test_a_process_that_cannot_start_says_how_to_see_why(monkeypatch, tmp_path):
    monkeypatch.setattr(video_process, "PROJECT", tmp_path)
    monkeypatch.setattr(video_process, "START_S", 20)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"does not start \(exit code 1\). See why:\n  /bin/false -m stages.data"):
        DecoderProcess()


class Fake:
    """Stands for a process that was taken over: it says whatever a test wants."""

    alive, waited = True, 0.0

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages, self.killed = list(messages), False

    def ask(self, request: object, *, timeout_s: float) -> None:
        pass

    def receive(self) -> dict[str, Any]:
        return self.messages.pop(0)

    def read_into(self, target: np.ndarray) -> None:
        target[:] = 7

    def gone(self, why: str) -> Exception:
        self.kill()
        return video_process.DecoderGone(why)

    def kill(self) -> None:
        self.killed = True


PICTURE = {"is": "picture", "index": [0], "pts": 0.0, "height": 2, "width": 3, "bytes": 18}
DONE = {"is": "done", "size": 1, "sha256": "", "clamped": 0}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"is": "picture"},
        DONE,
        PICTURE | {"index": [1]},
        PICTURE | {"index": []},
        PICTURE | {"index": "0"},
        PICTURE | {"height": 10**6, "width": 10**6, "bytes": 3 * 10**12},
        PICTURE | {"height": -2, "width": -3},
        PICTURE | {"bytes": 17},
        PICTURE | {"pts": None},
    ],
)
def test_nonsense_from_the_process_is_never_believed(message):
    decoder = VideoDecoder(Limits(10**6, 100.0, 30.0), fps=10.0)
    fake = Fake(message)
    decoder.idle.append(fake)  # type: ignore[arg-type]
    with pytest.raises(Rejected, match="it sent nonsense") as caught:
        list(decoder.pictures(VideoPart("v"), [0]))
    assert caught.value.kind == "decoder_crashed"
    assert fake.killed
    assert decoder.idle == []


def test_a_reason_is_kept_to_one_printable_line():
    decoder = VideoDecoder(Limits(10**6, 100.0, 30.0), fps=10.0)
    decoder.idle.append(Fake({"is": "rejected", "kind": "x", "reason": "a\n\x1b[31mb" * 400}))  # type: ignore[arg-type]
    with pytest.raises(Rejected) as caught:
        list(decoder.pictures(VideoPart("v"), [0]))
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) <= video_process.MAX_REASON


def read_in_daemon(folder: Path, answers: multiprocessing.Queue[list[int]]) -> None:
    source = VideoFiles(folder, fps=10)
    answers.put(numbers(source, "v"))
    source.close()


def test_it_works_inside_a_daemonic_process_as_dask_has_them(tmp_path):
    write_video(tmp_path / "v.mp4", CFR)
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[int]] = context.Queue()
    worker = context.Process(target=read_in_daemon, args=(tmp_path, answers), daemon=True)
    worker.start()
    assert answers.get(timeout=60) == [0, 2, 5]
    worker.join()


def test_a_forked_copy_of_the_parent_takes_a_process_of_its_own(videos):
    numbers(videos, "a")
    (process,) = idle(videos)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if numbers(videos, "b") == [0, 2, 5] and idle(videos) != [process] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert process.alive
    assert numbers(videos, "b") == [0, 2, 5]


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    write_video(tmp_path / "v.mp4", CFR, size=(960, 540))
    source = VideoFiles(tmp_path, fps=25)
    with pytest.raises(VideoRejected) as caught:  # noqa: PT012 - the file changes inside
        for _ in source.frames("v", np.arange(60), batch_size=1):
            with (tmp_path / "v.mp4").open("ab") as file:
                file.write(b"\0" * 8)
    assert caught.value.kind == "changed"
    source.close()


@pytest.mark.slow
@linux
def test_memory_stays_bounded_over_six_minutes_of_1080p(shared_data):
    source = VideoFiles(shared_data / "nasty", fps=2)
    count = source.count_frames("all_black_362s_1080p")
    assert count == 726
    pid, seen, peak = idle(source)[0].popen.pid, 0, 0
    for batch in source.frames("all_black_362s_1080p", np.arange(count), batch_size=16):
        seen += len(batch)
        assert batch.shape[1:] == (1080, 1920, 3)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        peak = max(peak, int(status["VmHWM"].split()[0]))
    assert seen == count
    assert peak < 200_000  # KiB; all 726 pictures would be 4.5 GB
    source.close()
