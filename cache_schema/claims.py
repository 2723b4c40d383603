"""Who is at work on which task, so that several extractors on one store share it instead of doing it twice.

A claim is a hint and never trusted: the link that publishes a shard decides who wins, with or without claims. A claim
that is lost, stale or taken over costs double work and nothing else. It is a hidden file or object beside the shards,
``.shard-17.claim``, that names host, process and the process's start; it goes when the task is done.

A claim ends when its process is dead (known on the same host only), or when it was not touched for LEASE_S as measured
by the clock of the one who waits: no clock is compared with another machine's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.objects import ObjectPath, StorePath

log = logging.getLogger(__name__)

LEASE_S = 900.0  # longer than the 600 s that one video may take to decode
TOUCH_S = 10.0
MAX_CLAIM_BYTES = 4096
_CLAIM = re.compile(r"^\.shard-(?P<shard>\d+)\.claim$")
_held: set[StorePath] = set()  # claims of this process
_seen: dict[StorePath, tuple[object, float]] = {}  # others' claims: what they looked like, and since when (monotonic)


@dataclass
class Claim:
    """A claim that this process holds; it is given up at the end of a ``with`` block, or by ``give_up``."""

    file: StorePath
    content: bytes
    _touched: float = field(default_factory=time.monotonic)

    def touch(self) -> None:
        """There was progress. Cheap: the file is touched every TOUCH_S only."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with suppress(OSError, ValueError):
                if isinstance(self.file, ObjectPath):
                    self._count(self.file)
                else:
                    os.utime(self.file)

    def _count(self, file: ObjectPath) -> None:
        """An object has no time that can be set, so its content changes: it counts up."""
        before = self.content
        document = files.parse_json(before)
        counted = files.canonical_json({**document, "touched": int(str(document.get("touched", 0))) + 1})
        # Known as ours before it is there: another thread may give the claim up at any moment.
        self.content = counted
        files.update(file, MAX_CLAIM_BYTES, lambda found: counted if found == before else None)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Remove the file, unless somebody has taken the claim over."""
        _held.discard(self.file)
        with suppress(OSError, ValueError), files.locked(self.file.parent):
            if holder_of(self.file).get("token") == files.parse_json(self.content)["token"]:  # else it was taken over
                files.remove(self.file)


def claim_file(folder: StorePath, shard: int) -> StorePath:
    """Where the claim on the task of this first shard lies, in the array's folder."""
    return folder / f".shard-{shard}.claim"


def take(folder: StorePath, shard: int, *, lease_s: float | None = None) -> Claim | None:
    """Claim the task whose first shard this is; None while somebody else is at it. Raises OSError."""
    file = claim_file(folder, shard)
    me = {"host": files.HOST, "pid": os.getpid(), "started": _started(os.getpid()), "token": secrets.token_hex(8)}
    content = files.canonical_json(me)
    while not files.publish_bytes(file, content):
        with files.locked(folder), suppress(FileNotFoundError):  # it has just been given up
            there, found, look = _look(file)
            why = _expired(file, found, look, LEASE_S if lease_s is None else lease_s)
            if not why:
                return None
            if files.replace_bytes(there, content):
                log.warning("shard %d of %s was claimed by %s; going on with it here", shard, folder, why)
                break
    _held.add(file)
    _seen.pop(file, None)
    return Claim(file, content)


def sweep(folder: StorePath) -> list[StorePath]:
    """Remove claims of dead processes of this host from an array's folder."""
    swept = []
    for file, why in found(folder):
        if why:
            files.remove(file)
            swept.append(file)
    return swept


def found(folder: StorePath) -> list[tuple[StorePath, str]]:
    """The claims in an array's folder, each with why its holder is known to be dead ('' when it is not)."""
    names = sorted(files.names_in(folder))
    return [(folder / name, _dead(folder / name, holder_of(folder / name))) for name in names if _CLAIM.match(name)]


def holder_of(file: StorePath) -> dict[str, object]:
    """What a claim says of its holder; empty when it cannot be read."""
    try:
        return _parsed(_look(file)[1])
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, object]:
    try:
        return files.parse_json(content)
    except ValueError:
        return {}


def _look(file: StorePath) -> tuple[StorePath, bytes, object]:
    """The claim as it is now (an object pinned to this version), its content, and what changes with any progress."""
    if isinstance(file, ObjectPath):
        tail = file.tail(MAX_CLAIM_BYTES)
        return tail.file, bytes(tail.data), bytes(tail.data)
    status = os.lstat(file)
    try:
        content = files.read_bytes(file, MAX_CLAIM_BYTES)
    except CacheCorrupt:  # too large, a link, no regular file
        content = b""
    return file, content, (status.st_ino, status.st_size, status.st_mtime_ns)


def _expired(file: StorePath, content: bytes, look: object, lease_s: float) -> str:
    """Why this claim counts no longer; "" while it counts."""
    holder = _parsed(content)
    if why := _dead(file, holder):
        return why
    before, since = _seen.get(file, (None, 0.0))
    if before != look:
        _seen[file] = (look, time.monotonic())
    elif time.monotonic() - since >= lease_s:
        return f"a process that has not moved for {lease_s:g} s ({_name(holder)})"
    return ""


def _dead(file: StorePath, holder: dict[str, object]) -> str:
    pid = holder.get("pid")
    if holder.get("host") != files.HOST or type(pid) is not int:
        return ""
    if pid == os.getpid() and file in _held:
        return ""
    if pid != os.getpid() and files.alive(pid) and _started(pid) == holder.get("started"):
        return ""
    return f"a process that is gone ({_name(holder)})"


def _name(holder: dict[str, object]) -> str:
    return json.dumps({key: holder.get(key) for key in ("host", "pid")})


def _started(pid: int) -> int:
    """When a process began, in ticks since boot: tells it from a later one of the same number. 0 where not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])
