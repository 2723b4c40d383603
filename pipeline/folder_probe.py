"""What a folder must be able to do before a cache or a run is put there, tried on the folder itself.

The same question that cache_schema/probe.py asks of an object store. It says what each thing costs that a network disk
lacks; only what would lose work makes the folder unfit.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOW_DISK = 10 * 10**9  # bytes: the miniature needs less, any real cache more
NETWORK = (
    "nfs",
    "lustre",
    "cifs",
    "smb",
    "beegfs",
    "gpfs",
    "ceph",
    "fuse",
    "9p",
    "afs",
    "panfs",
    "wekafs",
    "glusterfs",
)
BLOCK = 4096
FINE = "as it must be"


@dataclass(frozen=True)
class Probe:
    """One thing that was tried. ``ok`` is False only where work would be lost."""

    name: str
    ok: bool
    detail: str


def probe(folder: Path) -> list[Probe]:
    """Try everything in a folder of its own below ``folder``, which is removed again. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as made:
        place = Path(made)
        return [
            _kind(folder),
            _try("rename", _rename, place, "no checkpoint or shard could be replaced as a whole", needed=True),
            _try("fsync", _fsync, place, "a power failure could lose what was said to be saved", needed=True),
            _try(
                "hard links",
                _link,
                place,
                "shards are published under a lock instead; two that extract may do one twice",
            ),
            _try(
                "locks", _lock, place, "two repairs or growths of one store at once could lose one; run one at a time"
            ),
            _try("O_DIRECT", _direct, place, "data.io=direct is not available; features go through the page cache"),
            _space(folder),
        ]


def _try(name: str, attempt: Callable[[Path], str], place: Path, without: str, *, needed: bool = False) -> Probe:
    try:
        wrong = attempt(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        wrong = f"{error.strerror}"
    return Probe(name, not (wrong and needed), f"{wrong}: {without}" if wrong else FINE)


def _kind(folder: Path) -> Probe:
    """The file system, by the longest mount point above the folder."""
    path, best, kind = str(folder.resolve()), "", "unknown"
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    for line in lines:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if len(point) >= len(best) and (path == point or path.startswith(point.rstrip("/") + "/")):
            best, kind = point, name
    if kind.startswith(NETWORK):
        advice = "; a network disk: copies of features on a local disk train faster"
        return Probe("file system", True, f"{kind} at {best}{advice}")
    return Probe("file system", True, f"{kind} at {best}")


def _rename(place: Path) -> str:
    old, new = place / "old", place / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)
    return "" if old.read_text() == "new" and not new.exists() else "a file does not take another one's place"


def _fsync(place: Path) -> str:
    (place / "flushed").write_text("x")
    for path in (place / "flushed", place):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return ""


def _link(place: Path) -> str:
    one, other = place / "one", place / "other"
    one.write_text("x")
    os.link(one, other)
    try:
        os.link(one, other)
    except FileExistsError:
        return ""
    return "a second link to one name was accepted"


def _lock(place: Path) -> str:
    """Between two processes, on a descriptor that may write."""
    file = place / "locked"
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other = subprocess.run([sys.executable, "-I", "-c", code, str(file)], capture_output=True, check=False)
    finally:
        os.close(descriptor)
    return "" if other.returncode else "two processes hold one lock"


def _direct(place: Path) -> str:
    if not hasattr(os, "O_DIRECT"):
        return "this system has none"
    file = place / "direct"
    file.write_bytes(bytes(BLOCK))
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as page:  # aligned, as it must be
            count = os.preadv(descriptor, [page], 0)
    finally:
        os.close(descriptor)
    return "" if count == BLOCK else f"{count} of {BLOCK} bytes came"


def _space(folder: Path) -> Probe:
    from pipeline.printing import size

    free = shutil.disk_usage(folder).free
    advice = "; a real cache needs more: see --dry-run of extract" if free < LOW_DISK else ""
    return Probe("space", True, f"{size(free)} free{advice}")
