"""Rewrites the edit list of an MP4, for tests: what ``ffmpeg -ss … -c copy`` and phones' trimming leave behind."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path


def boxes_in(data: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, stop) of the boxes between two positions."""
    while start + 8 <= stop:
        (length,) = struct.unpack(">I", data[start : start + 4])
        yield bytes(data[start + 4 : start + 8]), start, start + length
        start += length


def box(data: bytes | bytearray, *path: bytes) -> tuple[int, int]:
    """Start and stop of the first box with this path."""
    start, stop = -8, len(data)
    for name in path:
        start, stop = next((a, b) for found, a, b in boxes_in(data, start + 8, stop) if found == name)
    return start, stop


def set_edits(path: Path, edits: Sequence[tuple[float, float | None]]) -> Path:
    """Let the first track show these (seconds, first second); None shows nothing so long. ``moov`` must be last."""
    data = bytearray(path.read_bytes())
    clock = struct.unpack_from(">I", data, box(data, b"moov", b"mvhd")[0] + 20)[0]
    ticks = struct.unpack_from(">I", data, box(data, b"moov", b"trak", b"mdia", b"mdhd")[0] + 20)[0]
    start, stop = box(data, b"moov", b"trak", b"edts")
    (delay,) = struct.unpack_from(">i", data, box(data, b"moov", b"trak", b"edts", b"elst")[0] + 20)  # of B-frames
    elst = struct.pack(">II", 0, len(edits))
    for seconds, first in edits:
        media_time = -1 if first is None else delay + round(first * ticks)
        elst += struct.pack(">Iihh", round(seconds * clock), media_time, 1, 0)
    edts = struct.pack(">I4sI4s", 16 + len(elst), b"edts", 8 + len(elst), b"elst") + elst
    grown = len(edts) - (stop - start)
    data[start:stop] = edts
    for at in (box(data, b"moov")[0], box_of_first_track(data)):
        struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + grown)
    path.write_bytes(data)
    return path


def box_of_first_track(data: bytearray) -> int:
    """Where the first track begins, although the size of ``moov`` is not right yet."""
    moov = box(data, b"moov")[0]
    return next(a for name, a, _ in boxes_in(data, moov + 8, len(data)) if name == b"trak")


def enable_second_track_only(path: Path) -> Path:
    """Set the enabled flags of the track headers: editors disable a track that players must not show."""
    data = bytearray(path.read_bytes())
    start, stop = box(data, b"moov")
    tracks = [a for name, a, _ in boxes_in(data, start + 8, stop) if name == b"trak"]
    for number, track in enumerate(tracks):
        assert data[track + 12 : track + 16] == b"tkhd"
        data[track + 19] = data[track + 19] & 0xFE | (number == 1)
    path.write_bytes(data)
    return path
