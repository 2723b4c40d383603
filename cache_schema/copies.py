"""Whole shards of an object store kept on a local disk, within a budget of bytes.

A copy is named by what it is a copy of: URL, entity tag and size. So a shard that was replaced in the store has no
copy, and a store that was deleted and made again shares none. What a copy holds is checked when it is made and again at
every read; the store is what counts, and a copy that does not fit is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_schema import files
from cache_schema.connections import StoreUnavailable
from cache_schema.errors import CacheCorrupt
from cache_schema.objects import ObjectPath


def open_copy(shard: ObjectPath, size: int, check: Callable[[int], None]) -> int | None:
    """Descriptor of a copy of this version of a shard, made now if there is none.

    Args:
        check: raises CacheCorrupt unless the file of this descriptor holds the shard's frames.

    None where no copies are kept, the shard is larger than the budget, or the disk fails: then the store is read.
    """
    local = shard.local
    if local is None or size > local.budget:
        return None
    try:
        with _alone(_file(shard, size)) as file:
            descriptor = _open(file, size)
            if descriptor is None:
                _download(shard, size, file, check)
                descriptor = _open(file, size)
            return descriptor
    except StoreUnavailable:
        raise
    except OSError:
        return None


def adopt(partial: Path, shard: ObjectPath) -> None:
    """Keep a shard that was just written to the store; the partial file stays where it is."""
    local = shard.local
    if local is None or not shard.e_tag or (size := partial.stat().st_size) > local.budget:
        return
    with suppress(OSError):
        _make_room(local.folder, local.budget - size)
        os.link(partial, _file(shard, size))  # the same folder, so the same file system


def drop(shard: ObjectPath, size: int) -> None:
    """Remove the copy; who reads it now can go on."""
    if shard.local is not None:
        _file(shard, size).unlink(missing_ok=True)


def _file(shard: ObjectPath, size: int) -> Path:
    if shard.local is None:
        raise AssertionError("no copies are kept of this store")
    digest = hashlib.sha256(f"{shard}\n{shard.e_tag}\n{size}".encode()).hexdigest()
    return shard.local.folder / f"{digest[:40]}.shard"


def _open(file: Path, size: int) -> int | None:
    try:
        descriptor = files.open_regular(file)
    except (FileNotFoundError, CacheCorrupt):
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        file.unlink(missing_ok=True)
        return None
    os.utime(file)  # the time of the last use decides what is removed first
    return descriptor


def _download(shard: ObjectPath, size: int, file: Path, check: Callable[[int], None]) -> None:
    if shard.local is None:
        raise AssertionError("no copies are kept of this store")
    _make_room(file.parent, shard.local.budget - size)
    partial = files.partial_path(file.parent, file.stem)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            shard.download(descriptor, size)
            check(descriptor)
        finally:
            os.close(descriptor)
        files.publish(partial, file)
    finally:
        files.discard(partial)


def _make_room(folder: Path, budget: int) -> None:
    """Remove the copies that were not used for longest until the others take at most ``budget`` bytes."""
    files.sweep(folder)
    with files.locked(folder):
        entries = []
        for entry in folder.glob("*.shard"):
            with suppress(FileNotFoundError):  # another process removes it too
                status = entry.stat(follow_symlinks=False)
                entries.append((status.st_mtime_ns, status.st_size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= budget:
                break
            entry.unlink(missing_ok=True)
            total -= size


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """One reader of all processes and threads downloads a shard; the others wait and then find it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = file.with_suffix(".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield file
    finally:
        lock.unlink(missing_ok=True)  # whoever waits on the old file finds the copy made
        os.close(descriptor)
