"""The decoder process: ``python -m stages.data.sources.video_child``, started by video_process.py, never by hand.

It reads hostile files with C libraries, so it holds nothing worth taking, may be killed at any moment, and says
everything by messages (video_wire.py). Requests come on stdin, answers go to stdout:

    ->  {"op": "frames", "path", "offset", "size", "index", "fps", "around_damage", "limits": {..}}
    <-  {"is": "picture", "index": [..], "pts", "height", "width", "bytes"} + RGB     as often as needed, in order
    <-  {"is": "done", "size", "sha256", "clamped", "count", "damaged", "hdr"}
        or   {"is": "rejected", "kind", "reason"}
    ->  {"op": "extent", ..}    <-  {"is": "extent", "count", "damaged"}   or rejected

It ends when stdin closes, which is also when its parent dies, whatever the parent died of. A decoder that hangs in C
without giving back the interpreter lock is ended by the kernel's timer instead.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import av
from av.error import FFmpegError

from stages.data.sources.frame_grid import Rejected, as_rate
from stages.data.sources.limits import Limits
from stages.data.sources.video_decode import Selection
from stages.data.sources.video_sniff import open_window, refuse_what_is_no_video, sha256_of
from stages.data.sources.video_wire import Message, receive, send

GRACE_S = 10.0  # the parent kills at timeout_s; the kernel's timer only has to end an orphan


def main() -> None:
    """Serve requests until stdin closes."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing else may write between messages
    # The scheduler's and the terminal's signals are for the parent; it closes stdin when it is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    limit_resources(int(sys.argv[1]))
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    with contextlib.suppress(BrokenPipeError):
        send(answers, {"is": "ready", "pyav": av.__version__, **libraries})
        while True:
            answer(requests.get(), answers)


def read_requests(requests: queue.SimpleQueue[Message]) -> None:
    """Pass requests on; end the process when the parent closes the pipe or is gone."""
    try:
        while True:
            requests.put(receive(read_stdin))
    except (EOFError, ValueError):
        os._exit(0)


def read_stdin(count: int) -> bytes:
    """Exactly ``count`` bytes of stdin. Raises EOFError."""
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        raise EOFError
    return data


def limit_resources(memory: int) -> None:
    """No file is written, no core is dumped, and address space is bounded, as far as the system supports it."""
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(what, (soft, hard))


class Timer:
    """The kernel's own alarm over working time. Its default action ends the process without asking the interpreter."""

    def __init__(self, seconds: float) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.left = seconds
        self.start()

    def start(self) -> None:
        """Go on counting."""
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))

    def pause(self) -> None:
        """Stop counting: from here on the process waits for its parent."""
        self.left, _ = signal.setitimer(signal.ITIMER_REAL, 0)


def answer(request: dict[str, Any], answers: int) -> None:
    """Do one request. Whatever the file is to blame for is answered with ``rejected``."""
    timer = Timer(float(request["limits"]["timeout_s"]) + GRACE_S)

    def reply(message: Message, payload: memoryview | None = None) -> None:
        timer.pause()
        send(answers, message, payload)
        timer.start()

    try:
        last = work(request, reply)
    except Rejected as error:
        last = {"is": "rejected", "kind": error.kind, "reason": error.reason}
    except MemoryError:
        last = {"is": "rejected", "kind": "out_of_memory", "reason": "decoding it needs more memory than is allowed"}
    except BrokenPipeError:
        raise
    except (FFmpegError, OSError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        last = {"is": "rejected", "kind": "decode_error", "reason": f"the decoder gives up on it ({what[:300]})"}
    timer.pause()
    send(answers, last)


def work(request: dict[str, Any], reply: Callable[..., None]) -> Message:
    """Open the file, check it, and do what the request asks. Returns the last message."""
    limits = Limits(**request["limits"])
    rate = as_rate(request["fps"])
    with open_window(request["path"], request["offset"], request["size"]) as window:
        before = os.fstat(window.fd)
        refuse_what_is_no_video(window)
        selection = Selection(window, request["index"], rate, limits, around_damage=request["around_damage"])
        if request["op"] == "extent":
            count, damaged = selection.extent()
            return {"is": "extent", "count": count, "damaged": damaged}
        for picture in selection:
            height, width, _ = picture.rgb.shape
            header: Message = {"is": "picture", "index": picture.index, "pts": picture.pts}
            reply(header | {"height": height, "width": width}, picture.rgb.reshape(-1).data)
        digest = sha256_of(window)
        after = os.fstat(window.fd)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise Rejected("changed", "the file was written to while it was read")
        facts = {"clamped": selection.clamped, "count": selection.count, "damaged": selection.damaged}
        return {"is": "done", "size": window.size, "sha256": digest, "hdr": selection.hdr, **facts}


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # at once: an interpreter that shuts down in order would wait for the thread that reads stdin
