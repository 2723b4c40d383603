"""One budget of open shards for all stores of a process, from the limit that the system sets on file descriptors."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import sys
import threading
import weakref
from typing import Any, Generic, Protocol, TypeVar

PER_SHARD = 1 if sys.version_info >= (3, 13) else 2  # its own, and before 3.13 that of its map
MOST = 4096  # whatever the limit: each is a map, and a process may have 65,530 of those
_lock = threading.Lock()
_clock = itertools.count()


class Held(Protocol):
    """Something that is open, and when it was last used (by ``_clock``)."""

    used: int


Item = TypeVar("Item", bound=Held)


class OpenFiles(Generic[Item]):
    """What one store holds open, by shard number. Every other store of the process counts towards the same budget.

    Nothing is closed by hand: what is dropped closes when the last thread that reads it lets go.
    """

    def __init__(self) -> None:
        self._held: dict[int, Item] = {}
        with _lock:
            _all.add(self)

    def get(self, number: int) -> Item | None:
        """The open shard, from now on the one used last."""
        item = self._held.get(number)
        if item is not None:
            item.used = next(_clock)
        return item

    def put(self, number: int, item: Item) -> None:
        """Hold it; those of any store that were not used for longest go where there are too many."""
        item.used = next(_clock)
        most = limit()
        with _lock:
            self._held[number] = item
            total = sum(len(files._held) for files in _all)
            if total > most:
                _drop_oldest(total - most + most // 16)

    def drop(self, number: int) -> None:
        """Forget it, if it is held."""
        self._held.pop(number, None)


_all: weakref.WeakSet[OpenFiles[Any]] = weakref.WeakSet()


def limit() -> int:
    """How many shards may be open: half of the descriptors, the soft limit raised to the hard one."""
    return max(1, min(MOST, _allowed() // 2 // PER_SHARD))


def relieve() -> bool:
    """Close half of the open shards, for one who was told that there are too many open files. False: there are none."""
    with _lock:
        total = sum(len(files._held) for files in _all)
        _drop_oldest(-(-total // 2))
    return total > 0


def too_many(path: object) -> OSError:
    """The error that names the limit."""
    allowed = _allowed()
    what = f"Too many open files: this process may have {allowed}, and other things than features hold them"
    return OSError(errno.EMFILE, f"{what} (allow more with: ulimit -n {max(4096, 4 * allowed)})", str(path))


def _allowed() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):
            pass
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def _drop_oldest(count: int) -> None:
    held = [(item.used, files, number) for files in _all for number, item in list(files._held.items())]
    for _, files, number in sorted(held, key=lambda entry: entry[0])[:count]:
        files._held.pop(number, None)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
