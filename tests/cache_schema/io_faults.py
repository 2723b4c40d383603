"""File layers that behave badly: one that fails at the n-th call, and one that behaves like a network disk."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cache_schema import files

# Everything that the cache does to files goes through these. Reads of whole small files begin with an open.
CALLS = ("open", "pwrite", "pread", "preadv", "fsync", "ftruncate", "link", "unlink", "rename", "replace", "mkdir")


class Killed(BaseException):
    """The process is gone: from here on no file operation works, so nothing can be cleaned up."""


class FileLayer:
    """Counts the calls, and does ``fault`` at number ``at``: an errno, "short" (half of a write), or "kill"."""

    def __init__(self, at: int = -1, fault: int | str = errno.EIO) -> None:
        self.at, self.fault, self.calls, self.hit = at, fault, 0, ""

    def call(self, name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if self.fault == "kill" and self.hit:
            raise Killed
        if number != self.at:
            return real(*args, **kwargs)
        self.hit = name
        if self.fault == "kill":
            if name == "pwrite":
                real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
            raise Killed
        if self.fault == "short":
            return (
                real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)], args[2])
                if name == "pwrite"
                else real(*args, **kwargs)
            )
        raise OSError(self.fault, os.strerror(int(self.fault)))

    @contextmanager
    def installed(self) -> Iterator[FileLayer]:
        real = {name: getattr(os, name) for name in CALLS}
        try:
            for name, function in real.items():
                setattr(os, name, lambda *a, n=name, f=function, **k: self.call(n, f, *a, **k))
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            if self.fault == "kill":  # a new process knows nothing of what the old one was at
                files._ours.clear()


class NetworkDisk:
    """A disk as NFS shows it to several machines: each thread is one (``on(name)``), and the others see all at once.

    Advisory locks are granted to everybody; reads may be short; every seventh open file is stale (ESTALE), as after a
    replacement on another machine; and a name that another machine made is unseen for the first few looks, although it
    cannot be made again.
    """

    LOOKS = 3  # that miss a new name
    STALE_EVERY = 7  # of the files that are opened to be read

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("short", "stale", "unseen", "locks"), 0)
        self._machine = threading.local()
        self._lock = threading.RLock()
        self._made: dict[str, str] = {}  # path -> machine
        self._looks: dict[tuple[str, str], int] = {}
        self._opens, self._stale, self._real = 0, set[int](), {}

    @contextmanager
    def on(self, machine: str) -> Iterator[None]:
        self._machine.name = machine
        yield
        del self._machine.name

    @contextmanager
    def installed(self) -> Iterator[NetworkDisk]:
        names = ("link", "rename", "replace", "mkdir", "open", "stat", "lstat", "pread", "preadv")
        self._real, flock = {name: getattr(os, name) for name in names}, fcntl.flock
        for name in ("link", "rename", "replace"):
            setattr(os, name, lambda a, b, n=name, **k: self._move(n, a, b, **k))
        os.mkdir = self._mkdir
        for name in ("open", "stat", "lstat"):
            setattr(os, name, lambda path, *a, n=name, **k: self._look(n, path, *a, **k))
        os.pread, os.preadv = self._pread, self._preadv
        fcntl.flock = lambda *_: self.counts.update(locks=self.counts["locks"] + 1)
        try:
            yield self
        finally:
            fcntl.flock = flock
            for name, function in self._real.items():
                setattr(os, name, function)

    def _here(self) -> str:
        return getattr(self._machine, "name", "")

    def _move(self, name: str, a: Any, b: Any, **options: Any) -> None:
        with self._lock:  # nobody sees a name before it is known who made it
            self._real[name](a, b, **options)
            self._made.setdefault(os.fspath(b), self._here())

    def _mkdir(self, path: Any, *rest: Any, **options: Any) -> None:
        with self._lock:
            self._real["mkdir"](path, *rest, **options)
            self._made.setdefault(os.fspath(path), self._here())

    def _look(self, name: str, path: Any, *rest: Any, **options: Any) -> Any:
        with self._lock:
            if isinstance(path, (str, os.PathLike)):
                self._refuse_what_is_unseen(os.fspath(path))
            result = self._real[name](path, *rest, **options)
            if name == "open":
                self._stale.discard(result)
                if rest[0] & os.O_NOFOLLOW:
                    self._opens += 1
                    if not self._opens % self.STALE_EVERY:
                        self._stale.add(result)
            return result

    def _refuse_what_is_unseen(self, path: str) -> None:
        machine = self._here()
        key = (machine, path)
        if machine and self._made.get(path, machine) != machine and self._looks.get(key, 0) < self.LOOKS:
            self._looks[key] = self._looks.get(key, 0) + 1
            self.counts["unseen"] += 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _check(self, descriptor: int) -> None:
        if descriptor in self._stale:
            self.counts["stale"] += 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _pread(self, descriptor: int, count: int, offset: int) -> bytes:
        self._check(descriptor)
        self.counts["short"] += count > 1
        return self._real["pread"](descriptor, max(1, count - count // 3), offset)

    def _preadv(self, descriptor: int, targets: Any, offset: int, flags: int = 0) -> int:
        if flags:
            return self._real["preadv"](descriptor, targets, offset, flags)
        self._check(descriptor)
        (target,) = targets
        size = len(target)
        self.counts["short"] += size > 1
        return self._real["preadv"](descriptor, [memoryview(target)[: max(1, size - size // 3)]], offset)
