"""Who is at work on which task, so that several extractors on one store share it instead of doing it twice.

A claim is a hint and never trusted: the link that publishes a shard decides who wins, with or without claims. A claim
that is lost, stale or taken over costs double work and nothing else. It is a hidden file beside the shards,
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

log = logging.getLogger(__name__)

LEASE_S = 900.0  # longer than the 600 s that one video may take to decode
TOUCH_S = 10.0
MAX_CLAIM_BYTES = 4096
_CLAIM = re.compile(r"^\.shard-(?P<shard>\d+)\.claim$")
_held: set[Path] = set()  # claims of this process
_seen: dict[Path, tuple[object, float]] = {}  # others' claims: what they looked like, and since when (monotonic)


@dataclass
class Claim:
    """A claim that this process holds; it is given up at the end of a ``with`` block, or by ``give_up``."""

    file: Path
    content: bytes
    _touched: float = field(default_factory=time.monotonic)

    def touch(self) -> None:
        """There was progress. Cheap: the file is touched every TOUCH_S only."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.file)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Remove the file, unless somebody has taken the claim over."""
        _held.discard(self.file)
        with suppress(OSError, CacheCorrupt), files.locked(self.file.parent):
            if files.read_bytes(self.file, MAX_CLAIM_BYTES) == self.content:  # else it was taken over
                self.file.unlink()


def claim_file(folder: Path, shard: int) -> Path:
    """Where the claim on the task of this first shard lies, in the array's folder."""
    return folder / f".shard-{shard}.claim"


def take(folder: Path, shard: int, *, lease_s: float | None = None) -> Claim | None:
    """Claim the task whose first shard this is; None while somebody else is at it. Raises OSError."""
    file = claim_file(folder, shard)
    me = {"host": files.HOST, "pid": os.getpid(), "started": _started(os.getpid()), "token": secrets.token_hex(8)}
    content = files.canonical_json(me)
    while not files.publish_bytes(file, content):
        with files.locked(folder):
            why = _expired(file, LEASE_S if lease_s is None else lease_s)
            if why is None:
                return None
            if why:
                files.replace_bytes(file, content)
                log.warning("shard %d of %s was claimed by %s; going on with it here", shard, folder, why)
                break
    _held.add(file)
    _seen.pop(file, None)
    return Claim(file, content)


def sweep(folder: Path) -> list[Path]:
    """Remove claims of dead processes of this host from an array's folder."""
    swept = []
    for file, why in found(folder):
        if why:
            file.unlink(missing_ok=True)
            swept.append(file)
    return swept


def found(folder: Path) -> list[tuple[Path, str]]:
    """The claims in an array's folder, each with why its holder is known to be dead ('' when it is not)."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [(folder / name, _dead(folder / name, holder_of(folder / name))) for name in names if _CLAIM.match(name)]


def holder_of(file: Path) -> dict[str, object]:
    """What a claim says of its holder; empty when it cannot be read."""
    try:
        return files.parse_json(files.read_bytes(file, MAX_CLAIM_BYTES))
    except (OSError, ValueError):  # CacheCorrupt is one: too large, a link, no regular file
        return {}


def _expired(file: Path, lease_s: float) -> str | None:
    """Why this claim counts no longer, '' when it has just been given up; None while it counts."""
    try:
        status = os.lstat(file)
    except FileNotFoundError:
        return ""
    look = (status.st_ino, status.st_size, status.st_mtime_ns)
    if why := _dead(file, holder_of(file)):
        return why
    before, since = _seen.get(file, (None, 0.0))
    if before != look:
        _seen[file] = (look, time.monotonic())
    elif time.monotonic() - since >= lease_s:
        return f"a process that has not moved for {lease_s:g} s ({_name(holder_of(file))})"
    return None


def _dead(file: Path, holder: dict[str, object]) -> str:
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
