"""Durable file operations: read with a limit, publish whole files, sweep what a crash left.

A file appears under its final name complete or not at all: it is written to a hidden ``.partial`` file on the same
file system, flushed to disk, linked to its name, and the folder is flushed. The link is the commit; it fails when the
name exists, so of two writers the first wins. No lock is relied on: network file systems often grant them to everybody.

Where a path is that of an object store, its partial files are local, the condition of the write is the commit, and
there are no folders and no locks (``cache_schema.objects``).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cache_schema import descriptors
from cache_schema.errors import CacheCorrupt
from cache_schema.objects import ObjectPath, StorePath

MAX_METADATA_BYTES = 1 << 20  # zarr.json
MAX_PLAN_BYTES = 1 << 30  # one generation of a plan: about 100 bytes a video
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_FIRST_NAMESPACE = "pid:[4026531836]"  # of processes, on every Linux; a container has another one
_PARTIAL = re.compile(r"^\..+\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d{1,10})\.[0-9a-f]{8}\.partial$")
_ours: set[Path] = set()  # partial files this process is working on
STALE_LOOKS = 8  # at a file that is replaced on another machine again and again
VISIBLE_S = 90.0  # a name made on another machine is seen by then: NFS keeps what it knows of a folder for up to 60 s

Answer = TypeVar("Answer")


def fresh(look: Callable[[], Answer]) -> Answer:
    """What ``look`` gives; it looks again where NFS says that the file was replaced on another machine (ESTALE)."""
    for _ in range(STALE_LOOKS):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return look()


def _host() -> str:
    """Where the numbers of processes mean the same: this boot of this machine, in this container.

    The name alone would not do: containers on different machines often share one.
    """
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "localhost"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return name
    return f"{name}-{boot}" if namespace == _FIRST_NAMESPACE else f"{name}-{boot}-{namespace[5:-1]}"


HOST = _host()


def partial_path(folder: StorePath, name: str) -> Path:
    """A fresh hidden name beside the final file: ``.{name}.{host}.{pid}.{random}.partial``. Give it to ``discard``."""
    place = folder.scratch() if isinstance(folder, ObjectPath) else folder
    path = place / f".{name}.{HOST}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    _ours.add(path)
    return path


def discard(path: Path) -> None:
    """Remove a partial file or folder, if it is still there."""
    _ours.discard(path)  # first: what cannot be removed now is swept later
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may sweep it too
    else:
        path.unlink(missing_ok=True)


def remove(path: StorePath) -> None:
    """Remove a file or a folder with what is in it, or an object; it is no error when it has gone."""
    if isinstance(path, ObjectPath):
        path.delete()
    else:
        discard(path)


def names_in(folder: StorePath) -> list[str]:
    """Names of what lies in a folder; none when there is no such folder."""
    if isinstance(folder, ObjectPath):
        return [entry.name for entry in folder.iterdir()]
    return os.listdir(folder) if folder.is_dir() else []


def modified(path: StorePath) -> float:
    """When a file or object was written, in seconds since 1970. Raises FileNotFoundError."""
    return path.modified() if isinstance(path, ObjectPath) else fresh(lambda: os.lstat(path).st_mtime)


def folders_in(folder: StorePath) -> list[StorePath]:
    """The folders, or prefixes of objects, one step below; links are not followed."""
    if isinstance(folder, ObjectPath):
        return list(folder.folders())
    return [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]


def files_below(path: StorePath) -> Iterator[StorePath]:
    """A file itself, or every file in a folder and its folders; links are not followed."""
    if isinstance(path, ObjectPath):
        yield from [path] if path.is_file() else path.files_below()
    elif not path.is_dir() or path.is_symlink():
        yield from [path] if os.path.lexists(path) else []
    else:
        for folder, _, names in os.walk(path):
            yield from (Path(folder) / name for name in sorted(names))


def sweep(folder: StorePath) -> list[StorePath]:
    """Remove partial files of dead writers of this host from one folder; those of living writers stay.

    A file of another host stays as well: whether its writer lives cannot be known from here.
    """
    swept = [path for path, host, dead in partials(folder) if host == HOST and dead]
    for path in swept:
        remove(path)
    return swept


def partials(folder: StorePath) -> list[tuple[StorePath, str, bool]]:
    """Partial files in one folder: path, host of the writer, and whether the writer is known to be dead."""
    found: list[tuple[StorePath, str, bool]] = []
    # An upload is named like the local file that goes up.
    place = folder.scratch() if isinstance(folder, ObjectPath) else folder
    for name in sorted(names_in(folder)):
        match = _PARTIAL.match(name)
        if match:
            pid, host = int(match["pid"]), match["host"]
            ours = pid == os.getpid() and place / name in _ours  # a restarted container gives the same number again
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


def open_regular(path: StorePath) -> int:
    """File descriptor for reading. Raises FileNotFoundError, or CacheCorrupt for anything but a regular file.

    Of an object, all of it is downloaded first.
    """
    if isinstance(path, ObjectPath):
        return path.snapshot()
    while True:
        try:
            descriptor = fresh(lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
            break
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise CacheCorrupt(f"{path} is a symbolic link; a cache holds its own files", file=path) from error
            if error.errno != errno.EMFILE:
                raise
            if not descriptors.relieve():
                raise descriptors.too_many(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CacheCorrupt(f"{path} is not a regular file", file=path)
    return descriptor


def refuse_links(path: StorePath, store: StorePath) -> None:
    """Raise CacheCorrupt when a folder between the store and ``path`` is a link: it could lead out of the store."""
    if isinstance(path, ObjectPath):  # there are no links in an object store
        return
    top = str(store)  # text: a scan of 10,000 shards would spend a second in pathlib
    folder = str(path).rpartition("/")[0]
    while folder and folder != top:
        if os.path.islink(folder):
            raise CacheCorrupt(f"{folder} is a symbolic link; a cache holds its own files", file=Path(folder))
        folder = folder.rpartition("/")[0]


def read_bytes(path: StorePath, limit: int) -> bytes:
    """The whole file. Raises FileNotFoundError, or CacheCorrupt when it is larger than ``limit`` or no regular file."""
    if isinstance(path, ObjectPath):
        data = path.read_bytes(limit)
    else:
        data = fresh(functools.partial(_read_file, path, limit + 1))
    if len(data) > limit:
        raise CacheCorrupt(f"{path} is larger than {limit} bytes", file=path)
    return data


def _read_file(path: Path, limit: int) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit)


def read_json(path: StorePath, limit: int) -> dict[str, object]:
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
        document = _strict.decode(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("the JSON is not an object")
    return document


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_strict = json.JSONDecoder(parse_constant=_refuse_constant)


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
        try:
            os.mkdir(path)
        except FileExistsError:
            _wait_for(path)
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


def start_flush(descriptor: int, start: int, stop: int) -> None:
    """Have the system begin to bring these bytes of a file to disk, without waiting. Only ``fsync`` makes them safe."""
    if hasattr(os, "posix_fadvise"):
        # "Not needed" writes back what is dirty and forgets what is clean; what was just written is dirty, so it stays.
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def publish(partial: Path, final: StorePath) -> bool:
    """Give a finished, flushed partial file its name unless the name is taken. True when this call did it.

    Where the file system has no hard links, the check and the rename are made under a lock of the folder.
    """
    if isinstance(final, ObjectPath):
        return _upload(partial, final, "")
    make_folder(final.parent)
    try:
        try:
            os.link(partial, final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with _locked(final.parent):
                if os.path.lexists(final):
                    return False
                os.rename(partial, final)
    except FileExistsError:
        _wait_for(final)
        return _is_same(partial, final)  # the answer to a first try was lost on the network
    else:
        sync_folder(final.parent)
        return True
    finally:
        discard(partial)


def _wait_for(path: Path) -> None:
    """Until a name that exists can be seen from this machine. Raises FileNotFoundError when it never can."""
    deadline = time.monotonic() + VISIBLE_S
    while not os.path.lexists(path):
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "It exists but cannot be seen; somebody removes it again", str(path))
        time.sleep(0.01)


def _is_same(path: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.lstat(other))
    except FileNotFoundError:
        return False


def _upload(partial: Path, final: ObjectPath, replaced: str) -> bool:
    try:
        return (final.exchange(partial, replaced) if replaced else final.create(partial)) is not None
    finally:
        discard(partial)


def publish_bytes(final: StorePath, data: bytes) -> bool:
    """Publish a small file; first writer wins. True when this call did it."""
    if isinstance(final, ObjectPath):
        return final.create(data) is not None
    make_folder(final.parent)
    partial = partial_path(final.parent, final.name)
    write_partial(partial, data)
    return publish(partial, final)


def replace(partial: Path, final: StorePath) -> bool:
    """Put a finished, flushed partial file in the place of an existing one; readers see the old or the new.

    False when the final object is pinned to a version that is not there any more; a local file is always replaced.
    """
    if isinstance(final, ObjectPath):
        return _upload(partial, final, final.e_tag)
    try:
        os.replace(partial, final)
    finally:
        discard(partial)
    sync_folder(final.parent)
    return True


def publish_or_replace(partial: Path, final: StorePath) -> None:
    """Give a finished, flushed partial file its name, whatever bears it now; readers see the old or the new."""
    if isinstance(final, ObjectPath):
        try:
            final = final.pinned(final.head()[1])
        except FileNotFoundError:
            publish(partial, final)
        else:
            replace(partial, final)  # in the place of this very version: what another writer put there is as good
    elif os.path.lexists(final):
        replace(partial, final)
    else:
        publish(partial, final)


def replace_bytes(final: StorePath, data: bytes) -> bool:
    """``replace`` with a small file."""
    if isinstance(final, ObjectPath):
        return final.exchange(data, final.e_tag) is not None
    partial = partial_path(final.parent, final.name)
    write_partial(partial, data)
    return replace(partial, final)


def write_bytes(final: StorePath, data: bytes, store: StorePath) -> None:
    """Make or replace a small file or object; readers see the old or the new. Its partial file lies in ``store``."""
    if isinstance(final, ObjectPath):
        final.write(data)
        return
    make_folder(final.parent)
    partial = partial_path(store, final.name)
    write_partial(partial, data)
    replace(partial, final)


def update(path: StorePath, limit: int, change: Callable[[bytes], bytes | None]) -> None:
    """Replace a small file by what ``change`` makes of it; None leaves it. Readers see the old or the new.

    An object is exchanged for the very version that was read. A file is not: of two changes at the same moment one may
    be lost, so whoever needs his looks again.
    """
    if isinstance(path, ObjectPath):
        while True:
            tail = path.tail(limit)
            new = change(bytes(tail.data))
            if new is None or replace_bytes(tail.file, new):
                return
    new = change(read_bytes(path, limit))
    if new is not None:
        replace_bytes(path, new)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's advisory lock, where there are such locks; it ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
