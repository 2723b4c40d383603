"""A file layer that fails at the n-th call: with an error, with a short write, or like a process that is killed."""

from __future__ import annotations

import errno
import os
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
