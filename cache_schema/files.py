"""Durable file operations on one POSIX file system: read with a limit, publish whole files, sweep what a crash left.

A file appears under its final name complete or not at all: it is written to a hidden ``.partial`` file on the same
file system, flushed to disk, linked to its name, and the folder is flushed. The link is the commit; it fails when the
name exists, so of two writers the first wins.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache_schema.errors import CacheCorrupt

MAX_METADATA_BYTES = 1 << 20  # zarr.json
MAX_PLAN_BYTES = 1 << 30  # one generation of a plan: about 100 bytes a video
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "localhost"
_PARTIAL = re.compile(r"^\..+\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d{1,10})\.[0-9a-f]{8}\.partial$")
_ours: set[Path] = set()  # partial files this process is working on


def partial_path(folder: Path, name: str) -> Path:
    """A fresh hidden name beside the final file: ``.{name}.{host}.{pid}.{random}.partial``. Give it to ``discard``."""
    path = folder / f".{name}.{HOST}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    _ours.add(path)
    return path


def discard(path: Path) -> None:
    """Remove a partial file or folder, if it is still there."""
    _ours.discard(path)  # first: what cannot be removed now is swept later
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may sweep it too
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> list[Path]:
    """Remove partial files of dead writers of this host from one folder; those of living writers stay.

    A file of another host stays as well: whether its writer lives cannot be known from here.
    """
    swept = [path for path, host, dead in partials(folder) if host == HOST and dead]
    for path in swept:
        discard(path)
    return swept


def partials(folder: Path) -> list[tuple[Path, str, bool]]:
    """Partial files in one folder: path, host of the writer, and whether the writer is known to be dead."""
    found = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        match = _PARTIAL.match(name)
        if match:
            pid, host = int(match["pid"]), match["host"]
            ours = pid == os.getpid() and folder / name in _ours  # a restarted container gives the same number again
            living = ours or (pid != os.getpid() and alive(pid))
            found.append((folder / name, host, host == HOST and not living))
    return found


def alive(pid: int) -> bool:
    """Whether a process with this number runs on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def open_regular(path: Path) -> int:
    """File descriptor for reading. Raises FileNotFoundError, or CacheCorrupt for anything but a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise CacheCorrupt(f"{path} is a symbolic link; a cache holds its own files", file=path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CacheCorrupt(f"{path} is not a regular file", file=path)
    return descriptor


def refuse_links(path: Path, store: Path) -> None:
    """Raise CacheCorrupt when a folder between the store and ``path`` is a link: it could lead out of the store."""
    for folder in path.parents:
        if folder == store:
            return
        if folder.is_symlink():
            raise CacheCorrupt(f"{folder} is a symbolic link; a cache holds its own files", file=folder)


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file. Raises FileNotFoundError, or CacheCorrupt when it is larger than ``limit`` or no regular file."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CacheCorrupt(f"{path} is larger than {limit} bytes", file=path)
    return data


def read_json(path: Path, limit: int) -> dict[str, object]:
    """The JSON object in a file. Raises FileNotFoundError, or CacheCorrupt."""
    try:
        return parse_json(read_bytes(path, limit))
    except CacheCorrupt:
        raise
    except ValueError as error:
        raise CacheCorrupt(f"{path} is damaged: {error}", file=path) from error


def parse_json(data: bytes) -> dict[str, object]:
    """A JSON object from bytes that may be anything. Raises ValueError."""
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("the JSON is not an object")
    return document


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def canonical_json(document: object) -> bytes:
    """The one way this package writes JSON inside its own files: sorted keys, no spaces, ASCII. Raises ValueError."""
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"not JSON: {error}") from error
    return text.encode("ascii")


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that was written by somebody else's code to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_partial(path: Path, data: bytes) -> None:
    """Write and flush a new file. On any error (disk full) it is removed again and the error goes on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            pwrite(descriptor, memoryview(data), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        discard(path)
        raise


def pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``, however few bytes the system takes at a time."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def publish(partial: Path, final: Path) -> bool:
    """Give a finished, flushed partial file its name unless the name is taken. True when this call did it.

    Where the file system has no hard links, the check and the rename are made under a lock of the folder.
    """
    make_folder(final.parent)
    try:
        try:
            os.link(partial, final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with locked(final.parent):
                if os.path.lexists(final):
                    return False
                os.rename(partial, final)
    except FileExistsError:
        return False
    else:
        sync_folder(final.parent)
        return True
    finally:
        discard(partial)


def publish_bytes(final: Path, data: bytes) -> bool:
    """Publish a small file; first writer wins. True when this call did it."""
    make_folder(final.parent)
    partial = partial_path(final.parent, final.name)
    write_partial(partial, data)
    return publish(partial, final)


def replace(partial: Path, final: Path) -> None:
    """Put a finished, flushed partial file in the place of an existing one; readers see the old or the new."""
    try:
        os.replace(partial, final)
    finally:
        discard(partial)
    sync_folder(final.parent)


def replace_bytes(final: Path, data: bytes) -> None:
    """Replace a small file; readers see the old or the new."""
    partial = partial_path(final.parent, final.name)
    write_partial(partial, data)
    replace(partial, final)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's advisory lock; it ends with the process. Network file systems without locks go unlocked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
