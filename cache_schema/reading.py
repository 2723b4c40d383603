"""Bytes of committed shards into a caller's buffer: from a map of the file, by ``pread``, or by O_DIRECT.

What is in the page cache is copied from a map: one copy and no call into the kernel, as fast as memory is. What is not
must be asked for by its exact byte range, or the kernel's readahead fetches megabytes around every frame (a map alone
is six times slower on 20 of 100 frames). Which way is best then depends on the disk, so ``auto`` measures it once.

A map cannot report an error: it ends the process (SIGBUS). So on a network file system, which may lose a file under a
reader, ``auto`` is ``pread``.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.shard import Layout, Shard, identity_of

Io = Literal["auto", "mmap", "pread", "direct"]
Array = npt.NDArray[Any]
Slots = npt.NDArray[np.int64]

PAGE = 4096
MOUNTS = Path("/proc/self/mountinfo")
REMOTE = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "afs")  # kinds of file system
BOUNCE_BYTES = 8 << 20  # one O_DIRECT request
SEEN_SECONDS = 1.0
PROBE_SECONDS = 1.0
PROBE_BYTES = 6 << 20  # read by each way in one round of the probe
_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_byte = [bytearray(1)]
_thread = threading.local()
_best_way: dict[int, Io] = {}  # device -> what the probe found
_probing = threading.Lock()


def check_io(io: str) -> None:
    """Raise ValueError unless it is one of the ways of reading."""
    if io not in get_args(Io):
        raise ValueError(f"io must be one of {', '.join(get_args(Io))}, not {io!r}")


class OpenShard:
    """A committed shard that is held open: its checked footer, a descriptor, and its frames as a read-only array.

    Nothing is closed by hand: descriptor and map go when the last thread that reads lets go of it.
    """

    def __init__(self, layout: Layout, shard: Shard) -> None:
        self.layout, self.shard = layout, shard
        self.used = 0  # when: see cache_schema.descriptors
        self.descriptor = files.open_regular(shard.file)
        weakref.finalize(self, os.close, self.descriptor)
        # A read that must not wait still has the kernel fetch what is missing, and of a file that is read in order
        # megabytes around it; of one that is read at random, one page. ``_pread`` says when it reads in order.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._seen: dict[int, float] = {}  # slot -> when its frame was last found in the page cache
        status = os.fstat(self.descriptor)
        self.identity, self.device = identity_of(status), status.st_dev
        self.is_remote = is_remote(status.st_dev)
        self.present = shard.present.tobytes()  # the same, for one slot at a time
        used = int(np.flatnonzero(shard.present)[-1]) + 1 if shard.present.any() else 0
        content = self._map(used * layout.stride)
        self.rows = strided_rows(layout, content, used)  # [used, *row_shape]
        self.words = None  # the same as int64, where frames lie on pages
        if layout.stride % PAGE == 0 and layout.frame_bytes % 8 == 0:
            self.words = np.ndarray((used, layout.frame_bytes // 8), np.int64, content, 0, (layout.stride, 8))

    def holds(self, slots: Slots) -> bool:
        """Whether there is a frame in all of these slots."""
        return bool(self.shard.present[slots].all())

    def _map(self, size: int) -> mmap.mmap | bytes:
        options: dict[str, bool] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        return mmap.mmap(self.descriptor, size, access=mmap.ACCESS_READ, **options) if size else b""

    def is_current(self) -> bool:
        """Whether the file is unchanged and still has a name: a shard that is replaced or removed loses its last one.

        Asked of the descriptor, not of the path, which would take three times as long.
        """
        try:
            status = os.fstat(self.descriptor)
        except OSError as error:
            if error.errno == errno.ESTALE:
                return False
            raise
        return (status.st_ino, status.st_size, status.st_mtime_ns) == self.identity and status.st_nlink > 0

    def is_cached(self, slot: int, offset: int = 0) -> bool:
        """Whether a frame's page at this offset is in the page cache; False where that cannot be told.

        Where it is not, it will be soon: asking fetches that page. A frame that was there a moment ago is taken to be
        there still: if it has gone the map fetches it, with what lies around it.
        """
        now = time.monotonic()
        if not offset and now - self._seen.get(slot, -math.inf) < SEEN_SECONDS:
            return True
        if _NOWAIT is None:
            return False
        try:
            there = os.preadv(self.descriptor, _byte, slot * self.layout.stride + offset, _NOWAIT) == 1
        except OSError:  # EAGAIN: not there; EOPNOTSUPP: the file system cannot say
            return False
        if there and not offset:
            self._seen[slot] = now
        return there


@functools.lru_cache(maxsize=64)
def is_remote(device: int) -> bool:
    """Whether a device is a network file system or one of a user's program."""
    try:
        mounts = MOUNTS.read_text().splitlines()
    except OSError:  # no Linux
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == name]
    return any(kind.startswith(REMOTE) for kind in kinds)


def strided_rows(layout: Layout, buffer: mmap.mmap | bytes | memoryview, count: int) -> Array:
    """The frames in a buffer that has the layout of a shard: [count, *row_shape], without a copy."""
    one = np.ndarray(layout.row_shape, layout.row_dtype, bytes(layout.frame_bytes))
    return np.ndarray((count, *layout.row_shape), layout.row_dtype, buffer, 0, (layout.stride, *one.strides))


def new_buffer(layout: Layout, count: int) -> Array:
    """Rows [count, *row_shape] that lie as in a shard: on pages, with the file's stride. What is read fastest into.

    Its memory is touched already, in huge pages where the system gives them, and starts as zeros.
    """
    memory = np.zeros(count * layout.stride + PAGE, np.uint8)  # numpy asks for huge pages; an anonymous mmap is shared
    memory[:: mmap.PAGESIZE] = 0
    start = -memory.__array_interface__["data"][0] % PAGE
    return strided_rows(layout, memory[start:].data, count)


def fits(layout: Layout, out: Array, count: int) -> bool:
    """Whether ``out`` has the shape and type of that many rows, each contiguous, side by side or as in a shard."""
    if out.shape != (count, *layout.row_shape) or out.dtype != layout.row_dtype or not out.flags.writeable:
        return False
    if out.flags.c_contiguous:
        return True
    return out.strides[0] == layout.stride and bool(out[:1].flags.c_contiguous)


def read_rows(opened: OpenShard, slots: Slots, out: Array, io: Io) -> None:
    """Copy the rows of these slots, all of which hold a frame, into ``out`` [n, *row_shape] (one that ``fits``).

    Raises:
        CacheCorrupt: the file ends inside a frame.
        ValueError: ``direct`` where the file system has no O_DIRECT.
    """
    if io == "mmap":
        _copy_from_map(opened, slots, out)
    elif io == "pread" or (io == "auto" and opened.is_remote):
        _pread(opened, slots, out)
    elif io == "direct":
        _read_direct(opened, slots, out)
    elif is_warm(opened, slots):
        _copy(opened, slots, out)
    else:
        read_rows(opened, slots, out, best_way(opened))


def read_row(opened: OpenShard, slot: int, out: Array) -> None:
    """``read_rows`` of one row from the map: for a slot that holds a frame and ``is_cached``. ``out`` is [1, …]."""
    if _collides(opened, out):
        _copy_row(opened, slot, out[0])
    else:
        out[0] = opened.rows[slot]


def is_warm(opened: OpenShard, slots: Slots) -> bool:
    """Whether the first, a middle and the last frame are in the page cache: three calls of a microsecond."""
    count = len(slots)
    looked_at = (0,) if count == 1 else (0, count // 2, count - 1)
    return all(opened.is_cached(int(slots[at])) for at in looked_at)


def ask_for(opened: OpenShard, slots: Slots) -> None:
    """Have the kernel fetch exactly these frames, without waiting for them."""
    stride = opened.layout.stride
    for first, count in runs(slots):
        os.posix_fadvise(opened.descriptor, first * stride, count * stride, os.POSIX_FADV_WILLNEED)


def runs(slots: Slots, limit: int = 1 << 62) -> Iterator[tuple[int, int]]:
    """(first, count) of the stretches of consecutive slots, none longer than ``limit``, in the given order."""
    edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for begin, end in itertools.pairwise(edges):
        first = int(slots[begin]) if end > begin else 0
        for done in range(0, end - begin, limit):
            yield first + done, min(limit, end - begin - done)


def _copy(opened: OpenShard, slots: Slots, out: Array) -> None:
    """From the map. numpy copies outside the interpreter lock, so threads run beside each other."""
    rows, count = opened.rows, len(slots)
    if not count:
        return
    if _collides(opened, out):
        for at, slot in enumerate(slots.tolist()):
            _copy_row(opened, slot, out[at])
        return
    step = int(slots[1] - slots[0]) if count > 1 else 1
    if count > 1 and (step < 1 or (np.diff(slots) != step).any()):
        for at, slot in enumerate(slots.tolist()):
            out[at] = rows[slot]
    else:
        np.copyto(out, rows[slots[0] : slots[-1] + 1 : step])


def _collides(opened: OpenShard, out: Array) -> bool:
    """Whether a row of ``out`` lies 1 to 31 bytes past a page boundary while the frames of the file lie on pages.

    The string copy of some processors takes three times as long then (glibc bug 30994, before 2.39), and the first row
    of any large numpy array lies so.
    """
    if opened.words is None or out.strides[0] == opened.layout.stride:
        return False
    address: int = out.__array_interface__["data"][0]
    if len(out) == 1:
        return 0 < address % PAGE < 32
    return any(0 < (address + at * out.strides[0]) % PAGE < 32 for at in range(min(len(out), 16)))


def _copy_row(opened: OpenShard, slot: int, row: Array) -> None:
    if opened.words is not None and 0 < row.__array_interface__["data"][0] % PAGE < 32:
        np.positive(opened.words[slot], out=row.reshape(-1).view(np.int64))  # +x: a copy in vector registers
    else:
        row[...] = opened.rows[slot]


def _copy_from_map(opened: OpenShard, slots: Slots, out: Array) -> None:
    if len(slots) and not is_warm(opened, slots):
        ask_for(opened, slots)
    _copy(opened, slots, out)


def _pread(opened: OpenShard, slots: Slots, out: Array) -> None:
    layout, in_order = opened.layout, False
    if len(slots) > 1 and not is_warm(opened, slots):
        in_order = int(slots[-1] - slots[0]) == len(slots) - 1
        if not in_order:
            ask_for(opened, slots)
    if in_order:  # along a run the kernel's own readahead is best
        os.posix_fadvise(opened.descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    for at, slot in enumerate(slots.tolist()):
        target = out[at].reshape(-1).view(np.uint8).data
        if _fill(opened.descriptor, target, slot * layout.stride) != layout.frame_bytes:
            raise _ends_early(opened)
    if in_order:
        os.posix_fadvise(opened.descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _fill(descriptor: int, target: memoryview, offset: int, unit: int = 1) -> int:
    """Bytes read into ``target``: all, or fewer at the end of the file. A read may be short anywhere, and is resumed.

    Args:
        unit: where reads must begin (O_DIRECT), so that a short one is resumed at the multiple before its end.
    """
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count or (done + count < len(target) and (done + count) // unit * unit <= done):
            return done + count
        done = done + count if done + count == len(target) else (done + count) // unit * unit
    return done


def _read_direct(opened: OpenShard, slots: Slots, out: Array) -> None:
    layout = opened.layout
    if layout.stride % PAGE:
        _pread(opened, slots, out)  # small frames do not start on pages
        return
    descriptor = _open_direct(opened)
    try:
        done, limit = 0, max(1, BOUNCE_BYTES // layout.stride)
        bounce = _bounce(max(BOUNCE_BYTES, layout.stride))
        for first, count in runs(slots, limit):
            size = count * layout.stride
            with memoryview(bounce)[:size] as target:
                if _fill(descriptor, target, first * layout.stride, PAGE) != size:
                    raise _ends_early(opened)
            np.copyto(out[done : done + count], strided_rows(layout, bounce, count))
            done += count
    finally:
        os.close(descriptor)


def _open_direct(opened: OpenShard) -> int:
    try:
        return os.open(f"/proc/self/fd/{opened.descriptor}", os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{opened.shard.file}: this file system has no direct I/O (O_DIRECT); use --set data.io=auto"
        ) from error


def _bounce(size: int) -> mmap.mmap:
    # Page-aligned and kept by the thread: a frame's end is not page-aligned in the caller's buffer.
    held: mmap.mmap | None = getattr(_thread, "bounce", None)
    if held is None or len(held) < size:
        held = _thread.bounce = mmap.mmap(-1, size)
    return held


def _ends_early(opened: OpenShard) -> CacheCorrupt:
    return CacheCorrupt.of_shard(opened.shard.file, "ends inside a frame: it was truncated", kind="truncated")


# --- which way is best when the bytes are not in memory


def best_way(opened: OpenShard) -> Io:
    """``mmap``, ``pread`` or ``direct``: measured once per process and device, on frames that are not in memory."""
    known = _best_way.get(opened.device)
    if known is not None:
        return known
    if not _probing.acquire(blocking=False):
        return "pread"  # another thread is measuring: do not wait, and do not spoil it more than needed
    try:
        measured = _probe(opened)
        if measured:
            _best_way[opened.device] = min(measured, key=lambda way: measured[way])
        return _best_way.get(opened.device, "pread")
    finally:
        _probing.release()


def _probe(opened: OpenShard) -> dict[Io, float]:
    """Seconds per frame of each way; empty when the shard has too few frames outside the page cache to tell."""
    ways: list[tuple[Io, Callable[[OpenShard, Slots, Array], None]]] = [
        ("pread", _pread),
        ("mmap", _copy_from_map),
        ("direct", _read_direct),
    ]
    per_try = max(2, math.ceil(PROBE_BYTES / opened.layout.stride))
    cold = [slot for slot in np.flatnonzero(opened.shard.present).tolist() if not opened.is_cached(slot)]
    out = np.zeros((per_try, *opened.layout.row_shape), opened.layout.row_dtype)  # touched before the clock runs
    spent: dict[Io, list[float]] = {way: [] for way, _ in ways}
    blocks = np.array(cold[: len(cold) // (2 * per_try) * 2 * per_try], np.int64).reshape(-1, 2 * per_try)
    began, tries = time.perf_counter(), 0
    for block in np.random.default_rng(0).permutation(blocks):
        if time.perf_counter() - began > PROBE_SECONDS:
            break
        if opened.is_cached(int(block[0]), opened.layout.frame_bytes // 2):
            continue  # readahead of an earlier try
        # Half of the tries read a stretch, half every second frame: what is asked for is one or the other.
        (way, read), stretch = ways[tries % len(ways)], tries // len(ways) % 2 == 0
        slots = block[:per_try] if stretch else block[::2]
        start = time.perf_counter()
        try:
            read(opened, slots, out)
            spent[way].append((time.perf_counter() - start) / len(slots))
        except (OSError, ValueError):  # no O_DIRECT here
            spent[way].append(math.inf)
        tries += 1
    return {way: sum(times) / len(times) for way, times in spent.items()} if all(spent.values()) else {}
