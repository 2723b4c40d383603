"""The parent's side of the decoder process: start it, wait for it no longer than allowed, replace it when it fails.

``subprocess`` and not ``multiprocessing``: Dask workers are daemons and may not have multiprocessing children, and a
fork would copy locks and threads. The process stays for the next video; importing PyAV costs more than most clips.
What it sends is checked here, because a process that reads hostile files may say anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from stages.data.sources.frame_grid import Rejected
from stages.data.sources.limits import Limits
from stages.data.sources.video_wire import Message, header_of, receive
from stages.types import Extent, Runs

PROJECT = Path(__file__).resolve().parents[3]
START_S = 120.0  # to import PyAV on a slow, busy network disk
MEMORY_BYTES = 8 << 30  # address space: 8K video with 16 reference and 16 held pictures fits
KNOWN_PYAV = ("18.", "19.")
PIPE_BYTES = 1 << 20
MAX_REASON = 500
# Names the process needs; the rest of the environment (keys, tokens) is not for a program that reads hostile files.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


class DecoderGone(Exception):
    """The process ended, or talked nonsense and was ended."""


class OutOfTime(Exception):
    """The process did not answer within its time."""


@dataclass(frozen=True)
class VideoPart:
    """A video on disk: a whole file, or ``size`` bytes from ``offset`` of a tar."""

    path: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class ReadFacts:
    """What the process knows of a file that it read to the last wanted frame."""

    size: int
    sha256: str
    clamped: int
    count: int
    damaged: Runs
    hdr: str


class DecoderProcess:
    """One running decoder process."""

    def __init__(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError where it cannot start."""
        kept = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith("PYTHON")}
        paths = [str(PROJECT), *filter(None, [kept.get("PYTHONPATH")])]
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "stages.data.sources.video_child", str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env=kept | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.requests, self.answers = self.popen.stdin.fileno(), self.popen.stdout.fileno()
        os.set_blocking(self.requests, False)  # a process that is stopped must not stop us
        self.owner = os.getpid()
        self.finalizer = weakref.finalize(self, end, self.popen, self.owner)
        with contextlib.suppress(AttributeError, OSError):  # Linux: fewer wake-ups for a picture
            fcntl.fcntl(self.answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.waited, self.budget = 0.0, START_S
        try:
            ready = self.receive()
        except (DecoderGone, OutOfTime) as error:
            raise RuntimeError(
                f"the video decoder process does not start ({error}). See why:\n"
                f"  {sys.executable} -m stages.data.sources.video_child {MEMORY_BYTES} < /dev/null"
            ) from error
        self.libraries = {name: str(value) for name, value in ready.items()}
        if not self.libraries.get("pyav", "").startswith(KNOWN_PYAV):
            self.kill()
            raise RuntimeError(
                f"PyAV {self.libraries.get('pyav')} is installed, 18 or 19 is needed: older ones ignore colour matrices"
                " and crash on FLV and MPEG.\n  pip install 'av>=18,<20'"
            )

    def ask(self, request: Message, *, timeout_s: float) -> None:
        """Send a request; the time that is spent waiting for its answers counts from here. Raises DecoderGone."""
        self.waited, self.budget = 0.0, timeout_s
        left = memoryview(header_of(request))
        while left:
            self._wait(self.requests, select.POLLOUT)
            try:
                left = left[os.write(self.requests, left) :]
            except BrokenPipeError:
                raise self.gone() from None

    def receive(self) -> Message:
        """The next message without its raw bytes. Raises DecoderGone, OutOfTime."""
        try:
            return receive(self._read_exactly)
        except ValueError as error:
            raise self.gone(f"it sent {error}") from error

    def read_into(self, target: UInt8[np.ndarray, "h w 3"]) -> None:
        """Fill an array with the raw bytes of the last message. Raises DecoderGone, OutOfTime."""
        view = target.reshape(-1).data
        while view:
            self._wait(self.answers, select.POLLIN)
            count = os.readv(self.answers, [view])
            if not count:
                raise self.gone()
            view = view[count:]

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait(self.answers, select.POLLIN)
            block = os.read(self.answers, count - len(data))
            if not block:
                raise self.gone()
            data += block
        return bytes(data)

    def _wait(self, pipe: int, event: int) -> None:
        """Wait for a pipe. Only waiting counts: a slow reader does not use up the decoder's time."""
        poller = select.poll()
        poller.register(pipe, event)
        left = self.budget - self.waited
        started = time.monotonic()
        ready = poller.poll(max(0.0, left) * 1000)
        self.waited += time.monotonic() - started
        if not ready:
            self.kill()
            raise OutOfTime(f"no answer within {self.budget:g} s")

    def gone(self, why: str = "") -> DecoderGone | OutOfTime:
        """What to raise when the process is of no more use; it is dead afterwards."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(0 if why else 1.0)
        code = self.popen.poll()
        self.kill()
        if code == -signal.SIGALRM:
            return OutOfTime(f"no end within {self.budget:g} s")
        if code is not None and code < 0:
            why = f"signal {-code}, {signal.strsignal(-code)}"
        return DecoderGone(why or f"exit code {code}")

    def kill(self) -> None:
        """End it now and reap it."""
        self.finalizer()

    @property
    def alive(self) -> bool:
        """Whether it can take a request from this process (a forked copy of us must not share its pipes)."""
        return self.owner == os.getpid() and self.popen.poll() is None


def end(popen: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and reap; in a forked copy of the owner, only let go of the pipes."""
    if os.getpid() == owner:
        popen.kill()
        popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            pipe.close()


class VideoDecoder:
    """Decoder processes of one frame source: one for each video that is being read, kept for the next."""

    def __init__(self, limits: Limits, *, fps: float, around_damage: bool = False) -> None:
        self.limits, self.fps, self.around_damage = limits, fps, around_damage
        self.idle: list[DecoderProcess] = []
        self.busy: set[DecoderProcess] = set()

    @contextlib.contextmanager
    def process(self) -> Iterator[DecoderProcess]:
        """A process of one's own, kept if it ended well. Its failures are Rejected: ``timeout``, ``decoder_crashed``.

        A reader that stops in the middle leaves pictures in the pipe, so that process is ended.
        """
        process = self.idle.pop() if self.idle else DecoderProcess()
        while not process.alive:
            process.kill()
            process = self.idle.pop() if self.idle else DecoderProcess()
        self.busy.add(process)
        try:
            yield process
        except OutOfTime:
            seconds = self.limits.timeout_s
            reason = f"decoding it takes more than {seconds:g} s (data.decode_timeout_s); it may hang the decoder"
            raise Rejected("timeout", reason) from None
        except DecoderGone as error:
            raise Rejected("decoder_crashed", f"the decoder process died on it ({error})") from None
        except Rejected:
            self.idle.append(process)
            raise
        except BaseException:
            process.kill()
            raise
        finally:
            self.busy.discard(process)
        self.idle.append(process)

    def request(self, op: str, part: VideoPart, index: list[int]) -> Message:
        """A request message."""
        return {
            "op": op,
            "path": os.path.abspath(part.path),
            "offset": part.offset,
            "size": part.size,
            "index": index,
            "fps": self.fps,
            "around_damage": self.around_damage,
            "limits": asdict(self.limits),
        }

    def extent(self, part: VideoPart) -> Extent:
        """Which grid frames can be had: by packets, or ``around_damage`` by decoding. Raises Rejected."""
        with self.process() as process:
            process.ask(self.request("extent", part, []), timeout_s=self.limits.timeout_s)
            match answer := process.receive():
                case {"is": "rejected"}:
                    raise as_rejected(answer)
                case {"is": "extent", "count": int(count), "damaged": list(damaged)} if count > 0:
                    return Extent(count, self._runs(process, damaged))
            raise process.gone("it sent nonsense")

    def _runs(self, process: DecoderProcess, damaged: list[object]) -> Runs:
        """Checked (first, last) pairs, ascending. Raises DecoderGone."""
        runs: list[tuple[int, int]] = []
        for item in damaged:
            match item:
                case [int(first), int(last)] if (runs[-1][1] if runs else -1) < first <= last:
                    runs.append((first, last))
                case _:
                    raise process.gone("it sent nonsense")
        return tuple(runs)

    def pictures(
        self, part: VideoPart, wanted: list[int]
    ) -> Iterator[tuple[list[int], float, UInt8[np.ndarray, "h w 3"]] | ReadFacts]:
        """(indices, pts in seconds, RGB) in order, and the facts at the end. Raises Rejected."""
        with self.process() as process:
            process.ask(self.request("frames", part, wanted), timeout_s=self.limits.timeout_s)
            at = 0
            while True:
                answer = process.receive()
                match answer:
                    case {"is": "rejected"}:
                        raise as_rejected(answer)
                    case {
                        "is": "picture",
                        "index": list(index),
                        "pts": float(pts),
                        "height": int(height),
                        "width": int(width),
                        "bytes": int(count),
                    } if (
                        index
                        and index == wanted[at : at + len(index)]
                        and height > 0 < width
                        and height * width <= self.limits.max_pixels
                        and count == height * width * 3
                    ):
                        rgb = np.empty((height, width, 3), dtype=np.uint8)
                        process.read_into(rgb)
                        at += len(index)
                        yield index, pts, rgb
                    case {
                        "is": "done",
                        "size": int(size),
                        "sha256": str(digest),
                        "clamped": int(clamped),
                        "count": int(total),
                        "damaged": list(damaged),
                        "hdr": "" | "PQ" | "HLG" | "BT.2020" as hdr,
                    } if at == len(wanted):
                        yield ReadFacts(size, digest, clamped, total, self._runs(process, damaged), hdr)
                        return
                    case _:
                        raise process.gone("it sent nonsense")

    def versions(self) -> str:
        """PyAV and the libraries in it, as they decode: ``pyav 18.1.0 libavcodec 62.28.102 …``."""
        with self.process() as process:
            names = ("pyav", "libavcodec", "libavformat", "libswscale")
            return " ".join(f"{name} {process.libraries.get(name, '?')}" for name in names)

    def close(self) -> None:
        """End all processes. One that another thread reads from is gone for that thread (``decoder_crashed``)."""
        while self.idle:
            self.idle.pop().kill()
        for process in tuple(self.busy):
            if process.owner == os.getpid():  # in a forked copy of us it is not ours to end
                process.popen.kill()  # only that: the pipes are closed by whoever waits for them


def as_rejected(answer: Message) -> Rejected:
    """The rejection in a message; its words are data, so control characters and length are limited."""
    kind, reason = (str(answer.get(name, ""))[:MAX_REASON] for name in ("kind", "reason"))
    return Rejected(kind, "".join(char if char.isprintable() else " " for char in reason))
