"""One shard file: its layout, a writer that streams frames into it, and a reader that trusts nothing.

From the start of the file: S frame slots of ``stride`` bytes, up to the last one used; a JSON footer; a trailer of 32
bytes; then Zarr's shard index (S pairs of offset and size, little-endian uint64) with its crc32c, which Zarr reads
from the end of the file. The footer lies in space that the sharding codec leaves unused, so any Zarr reader sees an
ordinary shard, and everything that is known of a shard can be read from that one file.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema import files
from cache_schema.errors import CacheCorrupt
from cache_schema.metadata import FORMAT_VERSION, ArrayInfo, other_format
from cache_schema.objects import ObjectPath, StorePath
from cache_schema.plan import Part, from_runs, to_runs

MAGIC = b"DLMMSHRD"
TRAILER = struct.Struct("<8sIQQI")  # magic, format version, footer bytes, file bytes, crc32c of footer and the rest
CRC = struct.Struct("<I")
EMPTY = (1 << 64) - 1  # Zarr's mark of an inner chunk that is not there
LARGE_FRAME = 64 * 1024  # from this size on frames start on pages (O_DIRECT, GPU storage); below, on cache lines
MAX_FOOTER_BYTES = 1 << 28
FLUSH_BYTES = 4 << 20  # brought to disk while the next ones are made, so that the last fsync has little to wait for
MAX_REASON = 2000  # characters of a stored reason
USUAL_FOOTER = 128 * 1024  # what is asked of an object store at first; a larger footer takes one more request

Identity = tuple[Any, ...]  # of one version of a file: inode, size, mtime_ns; of an object: entity tag, size
Entry = tuple[dict[str, Any], tuple[int, ...]]  # of a footer, with its frame indices
ReadAt = Callable[[int, int], bytes]  # (count, offset)

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Layout:
    """Where bytes go in the shards of one array."""

    info: ArrayInfo

    @functools.cached_property
    def spec_digest(self) -> str:
        """Of what made the numbers; every shard's footer repeats it."""
        return self.info.spec.digest()

    @functools.cached_property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return self.info.spec.frame_bytes

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one frame with its crc32c: an inner chunk of Zarr."""
        return self.frame_bytes + CRC.size

    @functools.cached_property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        unit = 4096 if self.frame_bytes >= LARGE_FRAME else 64
        return -(-self.chunk_bytes // unit) * unit

    def is_sound(self, chunk: Buffer) -> bool:
        """Whether a chunk is whole, and its frame fits the crc32c after it."""
        view = memoryview(chunk)
        return len(view) == self.chunk_bytes and CRC.pack(crc32c(view[:-4])) == view[-4:]

    @functools.cached_property
    def index_bytes(self) -> int:
        """Size of Zarr's shard index with its checksum."""
        return 16 * self.info.shard_frames + 4

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of features, little-endian."""
        return np.dtype(self.info.spec.feature_dtype).newbyteorder("<")

    @functools.cached_property
    def is_int8(self) -> bool:
        """Whether frames are stored as int8 with two-level scales (cache_schema.quantize)."""
        return self.info.channel_scale is not None

    @functools.cached_property
    def row_dtype(self) -> np.dtype[Any]:
        """Of the elements of a stored frame: the features themselves, or bytes."""
        return np.dtype(np.uint8) if self.is_int8 else self.dtype

    @functools.cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Of a stored frame."""
        return (self.frame_bytes,) if self.is_int8 else self.info.spec.frame_shape


@dataclass(frozen=True)
class Record:
    """What a footer says of one part: the frames of one video in one shard."""

    video_id: str
    slot: int
    frame_index: tuple[int, ...] = field(repr=False)
    ok: bool
    kind: str = ""  # of the failure
    reason: str = ""
    facts: Mapping[str, object] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, object]:
        """One entry of the footer's ``segments``."""
        return {
            "video": self.video_id,
            "slot": self.slot,
            "frames": to_runs(self.frame_index),
            "status": "ok" if self.ok else "failed",
            "kind": self.kind,
            "reason": self.reason,
            "facts": dict(self.facts),
        }

    @classmethod
    def of(cls, entry: Mapping[str, Any], frames: tuple[int, ...]) -> Record:
        """Inverse of ``to_json``, from what ``checked_entry`` gives."""
        video, slot, status, kind, reason, facts = map(entry.__getitem__, ENTRY)
        return cls(video, slot, frames, status == "ok", kind, reason, facts)


ENTRY = {"video": str, "slot": int, "status": str, "kind": str, "reason": str, "facts": dict}
ENTRY_TYPES = [*ENTRY.values()]


def checked_entry(entry: object) -> Entry:
    """One entry of a footer's ``segments``, and its frame indices. Raises ValueError naming the field."""
    if not isinstance(entry, dict):
        raise ValueError("a segment is not an object")
    if [*map(type, map(entry.get, ENTRY))] != ENTRY_TYPES:
        name = next(name for name, kind in ENTRY.items() if type(entry.get(name)) is not kind)
        raise ValueError(f"segments.{name} is not of type {ENTRY[name].__name__}")
    frames, status = from_runs(entry.get("frames")), entry["status"]
    if status not in ("ok", "failed"):
        raise ValueError(f"segments.status is {status!r}")
    return entry, frames


class ShardWriter:
    """Streams the frames of one shard into a partial file. ``finish`` completes it; the caller publishes or discards.

    Nothing but the current batch is held in memory. The file is open only between ``append`` and ``suspend``, so a
    long video's run of shards does not hold hundreds of descriptors.
    """

    def __init__(self, layout: Layout, shard: int) -> None:
        self.layout, self.shard = layout, shard
        self.partial = files.partial_path(layout.info.folder, f"shard-{shard}")
        self._records: list[Record] = []
        self._descriptor = -1
        self._created = False
        self._part: Part | None = None
        self._done = 0  # frames of the current part
        self._sums = bytearray()  # checksums of all frames, in the order of their slots
        self._sums_before = 0  # bytes of them before the current part
        self._on_its_way = 0  # bytes that the system was asked to bring to disk

    def begin(self, part: Part) -> None:
        """Start the frames of the next part; parts come in slot order."""
        self._part, self._done, self._sums_before = part, 0, len(self._sums)

    def append(self, frames: Array) -> None:
        """Write stored frames [b, *row_shape] at the next slots of the current part."""
        part = self._current()
        if self._done + len(frames) > part.count:
            raise AssertionError("more frames than the part holds")
        descriptor = self._open()
        for frame in np.ascontiguousarray(frames, dtype=self.layout.row_dtype):
            raw = memoryview(frame.reshape(-1).view(np.uint8))
            start = (part.slot + self._done) * self.layout.stride
            crc = CRC.pack(crc32c(raw))
            self._sums += crc
            self._done += 1
            files.pwrite(descriptor, raw, start)
            files.pwrite(descriptor, memoryview(crc), start + self.layout.frame_bytes)
        written = (part.slot + self._done) * self.layout.stride
        if written - self._on_its_way >= FLUSH_BYTES:
            files.start_flush(descriptor, self._on_its_way, written)
            self._on_its_way = written

    def end(self, facts: Mapping[str, object]) -> None:
        """The current part is complete."""
        part = self._current()
        if self._done != part.count:
            raise AssertionError("fewer frames than the part holds")
        self._add(Record(part.segment.video_id, part.slot, part.frame_index, True, facts=facts))

    def fail(self, kind: str, reason: str) -> None:
        """The current part has failed: what it wrote is cut off and its slots stay empty."""
        part = self._current()
        del self._sums[self._sums_before :]
        if self._created:
            os.ftruncate(self._open(), self._data_bytes())
            self._on_its_way = min(self._on_its_way, self._data_bytes())
        reason = reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…"
        self._add(Record(part.segment.video_id, part.slot, part.frame_index, False, kind, reason))

    def suspend(self) -> None:
        """Close the file until it is needed again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def finish(self) -> list[Record]:
        """Write footer, trailer and index, and flush the file to disk. Returns the records of the footer."""
        descriptor, data_bytes = self._open(), self._data_bytes()
        footer = files.canonical_json(self._footer(data_bytes))
        size = data_bytes + len(footer) + TRAILER.size + self.layout.index_bytes
        head = TRAILER.pack(MAGIC, FORMAT_VERSION, len(footer), size, 0)[:-4]
        crc = struct.pack("<I", crc32c(head, crc32c(footer)))
        index = shard_index(self.layout, present_slots(self.layout, self._records))
        os.ftruncate(descriptor, data_bytes)
        files.pwrite(descriptor, memoryview(footer + head + crc + index), data_bytes)
        os.fsync(descriptor)
        self.suspend()
        return self._records

    def discard(self) -> None:
        """Remove the partial file, if it is still there."""
        self.suspend()
        files.discard(self.partial)

    def _footer(self, data_bytes: int) -> dict[str, object]:
        # Nothing here may depend on when, where or in how many attempts the shard was made.
        return {
            **_identity(self.layout, self.shard),
            "data_bytes": data_bytes,
            "frames_crc32c": crc32c(self._sums),
            "segments": [record.to_json() for record in self._records],
        }

    def _data_bytes(self) -> int:
        return used_slots(self._records) * self.layout.stride

    def _add(self, record: Record) -> None:
        self._records.append(record)
        self._part = None

    def _current(self) -> Part:
        if self._part is None:
            raise AssertionError("no part was begun")
        return self._part

    def _open(self) -> int:
        if self._descriptor < 0:
            flags = os.O_WRONLY if self._created else os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(self.partial, flags, 0o666)
            self._created = True
        return self._descriptor


def used_slots(records: Sequence[Record]) -> int:
    """Slots up to the last one that holds a frame."""
    return max((record.slot + len(record.frame_index) for record in records if record.ok), default=0)


def shard_index(layout: Layout, present: npt.NDArray[np.bool_]) -> bytes:
    """Zarr's shard index for these slots [S] that hold a frame, with its checksum."""
    index = _full_index(present.size, layout.stride, layout.chunk_bytes).copy()
    index[~present] = EMPTY
    raw = index.tobytes()
    return raw + struct.pack("<I", crc32c(raw))


def present_slots(layout: Layout, records: Sequence[Record]) -> npt.NDArray[np.bool_]:
    """Which slots [S] hold a frame of these records."""
    present = np.zeros(layout.info.shard_frames, np.bool_)
    for record in records:
        if record.ok:
            present[record.slot : record.slot + len(record.frame_index)] = True
    return present


@functools.lru_cache(maxsize=8)
def _full_index(size: int, stride: int, chunk_bytes: int) -> npt.NDArray[np.uint64]:
    """Offset and bytes [S, 2] of every slot, as if all held a frame."""
    index = np.full((size, 2), chunk_bytes, "<u8")
    index[:, 0] = np.arange(size, dtype=np.uint64) * np.uint64(stride)
    index.flags.writeable = False
    return index


def _identity(layout: Layout, shard: int) -> dict[str, object]:
    identity: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "modality": layout.info.modality,
        "spec_digest": layout.spec_digest,
        "shard": shard,
        "shard_frames": layout.info.shard_frames,
        "frame_bytes": layout.frame_bytes,
        "stride": layout.stride,
    }
    scale = layout.info.channel_scale
    return identity if scale is None else {**identity, "channel_scale_digest": scale.digest}


@dataclass(frozen=True)
class Shard:
    """A committed shard whose footer and index were found sound. The frames themselves are not read yet.

    Facts are left in the file: a store keeps one of these for every shard that it has seen.
    """

    file: StorePath  # of an object store: pinned to the version that this was read from
    identity: Identity  # of the file this was read from
    records: tuple[Record, ...]
    present: npt.NDArray[np.bool_] = field(repr=False)  # [S]: the slots that hold a frame
    sums: int = 0  # crc32c of the checksums of all frames: which frames these are, and in what order

    @property
    def failed(self) -> tuple[Record, ...]:
        """The videos that are recorded as failed."""
        return tuple(record for record in self.records if not record.ok)

    def record_at(self, slot: int) -> Record:
        """The record of the part that this slot belongs to."""
        return next(r for r in self.records if r.slot <= slot < r.slot + len(r.frame_index))


def frame_corrupt(shard: Shard, video_id: str, frame: int) -> CacheCorrupt:
    """The error for a frame whose bytes changed since they were written."""
    what = f"has a damaged frame: frame {frame} of video {video_id!r} does not fit its crc32c"
    return CacheCorrupt.of_shard(shard.file, what, kind="frame", video_id=video_id, frame_index=frame)


def identity_of(status: os.stat_result) -> Identity:
    """What changes when a file is replaced or rewritten."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def identity_now(file: StorePath) -> Identity:
    """What ``identity_of`` gives for the file that is there now. Raises FileNotFoundError, NotADirectoryError."""
    if isinstance(file, ObjectPath):
        size, e_tag = file.head()
        return e_tag, size
    return identity_of(files.fresh(lambda: os.stat(file, follow_symlinks=False)))


@contextmanager
def _opened(file: StorePath, layout: Layout) -> Iterator[tuple[StorePath, ReadAt, Identity]]:
    """The file to read, how to read it, and its identity; size comes second in every identity."""
    if isinstance(file, ObjectPath):
        tail = file.tail(USUAL_FOOTER + TRAILER.size + layout.index_bytes)
        yield tail.file, tail.read, (tail.file.e_tag, tail.size)
        return
    descriptor = files.open_regular(file)
    try:
        yield file, functools.partial(pread, descriptor), identity_of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def read_shard(layout: Layout, shard: int, parts: Sequence[Part]) -> Shard | None:
    """The shard's footer, checked against its index, its size and the plan; None when there is no such file.

    Raises:
        CacheCorrupt: naming the file; ``kind`` is truncated, footer, index, wrong_spec, wrong_shard or wrong_videos.
        CacheMismatch: the shard was written by a newer format version.
    """
    final = layout.info.shard_file(shard)
    files.refuse_links(final, layout.info.store)
    try:
        file, identity, document, index = files.fresh(lambda: _read_end(layout, final))
    except (FileNotFoundError, NotADirectoryError):
        return None
    _check_identity(file, layout, shard, document)
    entries = _entries(file, document)
    records = []
    present = np.zeros(layout.info.shard_frames, np.bool_)
    for (entry, frames), part in zip(entries, parts, strict=False):
        video, slot, status, kind, reason, *_ = map(entry.__getitem__, ENTRY)
        if (video, slot, frames) != (part.segment.video_id, part.slot, part.frame_index):
            break
        if status == "ok":
            present[slot : slot + part.count] = True
        # The plan's tuple of frame indices is shared, not held twice.
        records.append(Record(video, slot, part.frame_index, status == "ok", kind, reason))
    used = max((entry["slot"] + len(frames) for entry, frames in entries if entry["status"] == "ok"), default=0)
    if document.get("data_bytes") != used * layout.stride:
        raise CacheCorrupt.of_shard(file, "has a damaged footer: segments do not fit data_bytes", kind="footer")
    if len(records) != len(parts) or len(entries) != len(parts):
        raise CacheCorrupt.of_shard(file, "holds other videos than the plan has for it", kind="wrong_videos")
    if index != shard_index(layout, present):
        raise CacheCorrupt.of_shard(file, "has an index that is damaged or contradicts its footer", kind="index")
    sums = document.get("frames_crc32c")
    if type(sums) is not int:
        raise CacheCorrupt.of_shard(file, "has a damaged footer: frames_crc32c is not a number", kind="footer")
    return Shard(file, identity, tuple(records), present, sums)


def read_footer(layout: Layout, file: StorePath) -> dict[str, object]:
    """The whole footer of a shard, facts included. Raises FileNotFoundError, CacheCorrupt."""
    return files.fresh(lambda: _read_end(layout, file))[2]


def _read_end(layout: Layout, file: StorePath) -> tuple[StorePath, Identity, dict[str, object], bytes]:
    with _opened(file, layout) as (file, read, identity):
        return file, identity, *_read_footer(file, layout, read, identity[1])


def is_shard(file: StorePath, shard_frames: int) -> bool:
    """Whether a file is a whole shard of some array of a store with such shards, by its own trailer and footer."""
    tail_bytes = TRAILER.size + 16 * shard_frames + 4
    try:
        descriptor = files.open_regular(file)
    except (OSError, CacheCorrupt):
        return False
    try:
        size = os.fstat(descriptor).st_size
        if size < tail_bytes:
            return False
        trailer = pread(descriptor, TRAILER.size, size - tail_bytes)
        magic, _, footer_bytes, file_bytes, crc = TRAILER.unpack(trailer)
        if magic != MAGIC or file_bytes != size or footer_bytes > min(size - tail_bytes, MAX_FOOTER_BYTES):
            return False
        footer = pread(descriptor, footer_bytes, size - tail_bytes - footer_bytes)
        return bool(crc32c(trailer[:-4], crc32c(footer)) == crc)
    finally:
        os.close(descriptor)


def read_records(layout: Layout, file: StorePath) -> tuple[Record, ...]:
    """The records of a footer, with facts. Raises FileNotFoundError, CacheCorrupt."""
    return _records(file, read_footer(layout, file))


def _records(file: StorePath, document: Mapping[str, object]) -> tuple[Record, ...]:
    return tuple(Record.of(*entry) for entry in _entries(file, document))


def _entries(file: StorePath, document: Mapping[str, object]) -> list[Entry]:
    entries = document.get("segments")
    try:
        if not isinstance(entries, list):
            raise ValueError("segments is not a list")
        return [checked_entry(entry) for entry in entries]
    except ValueError as error:
        raise CacheCorrupt.of_shard(file, f"has a damaged footer: {error}", kind="footer") from error


def _read_footer(file: StorePath, layout: Layout, read: ReadAt, size: int) -> tuple[dict[str, object], bytes]:
    tail_bytes = TRAILER.size + layout.index_bytes
    if size < tail_bytes:
        what = f"is {size} bytes long, too short for a shard: it was truncated"
        raise CacheCorrupt.of_shard(file, what, kind="truncated")
    tail = read(tail_bytes, size - tail_bytes)
    trailer, index = tail[: TRAILER.size], tail[TRAILER.size :]
    magic, version, footer_bytes, file_bytes, crc = TRAILER.unpack(trailer)
    if magic != MAGIC:
        what = "does not end with a shard trailer and index: it was truncated or overwritten"
        raise CacheCorrupt.of_shard(file, what, kind="truncated")
    if file_bytes != size or footer_bytes > min(size - tail_bytes, MAX_FOOTER_BYTES):
        what = f"is {size} bytes long but says {file_bytes}: it was truncated or overwritten"
        raise CacheCorrupt.of_shard(file, what, kind="truncated")
    footer = read(footer_bytes, size - tail_bytes - footer_bytes)
    if crc32c(trailer[:-4], crc32c(footer)) != crc:
        raise CacheCorrupt.of_shard(file, "has a footer whose crc32c does not fit", kind="footer")
    if version != FORMAT_VERSION:
        raise other_format(file, version)
    try:
        document = files.parse_json(footer)
    except ValueError as error:
        raise CacheCorrupt.of_shard(file, f"has a damaged footer: {error}", kind="footer") from error
    if document.get("data_bytes") != size - tail_bytes - footer_bytes:
        raise CacheCorrupt.of_shard(file, "has a footer that is not where its frames end", kind="footer")
    return document, index


def _check_identity(file: StorePath, layout: Layout, shard: int, document: Mapping[str, object]) -> None:
    for name, value in _identity(layout, shard).items():
        found = document.get(name)
        if found != value:
            kind = "wrong_shard" if name == "shard" else "wrong_spec"
            what = f"says {name} = {found!r}, but {value!r} belongs here: it is another shard's file or was swapped"
            raise CacheCorrupt.of_shard(file, what, kind=kind)


def pread(descriptor: int, count: int, offset: int) -> bytes:
    """Exactly ``count`` bytes, or fewer at the end of the file."""
    chunks: list[bytes] = []
    while count:
        chunk = os.pread(descriptor, count, offset)
        if not chunk:
            break
        chunks.append(chunk)
        count, offset = count - len(chunk), offset + len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
