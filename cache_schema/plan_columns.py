"""One growth of the plan as it lies on disk: an uncompressed ``.npz`` (FORMAT.md), and the segments in it.

A million segments are a few arrays, so a plan opens in a moment; a segment is made when it is asked for. ``pack`` and
``unpack`` are the only places that know the file, and ``unpack`` the only one that knows the rules of a plan.
"""

from __future__ import annotations

import io
import itertools
import operator
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.plan import (
    MAX_FRAME_INDEX,
    MAX_ID_BYTES,
    MAX_SEGMENT_FRAMES,
    Plan,
    Segment,
    Segments,
    every,
    to_runs,
)

PLAN_VERSION = 3
# Arrays by name: type, and number of axes. ``about`` is the version, S, and the shards of all earlier growths.
ARRAYS = {"about": ("<i8", 1), "start": ("<i8", 1), "run_at": ("<i8", 1), "runs": ("<i4", 2), "id": ("|u1", 1)}

Rows = npt.NDArray[np.int64]


class OtherVersion(ValueError):
    """The file is of another version, ``args[0]``."""


class Columns(Sequence[Segment]):
    """The segments of one growth, sorted by id and by row; each is made when it is asked for."""

    def __init__(self, starts: Rows, run_at: Rows, runs: npt.NDArray[np.int32], ids: list[bytes]) -> None:
        self.starts, self.ids = starts, ids
        self._run_at, self._runs = run_at, runs  # runs [m, 3] of segment i: those from run_at[i] to run_at[i + 1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]  # the overloads of Sequence say more than they help
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        at = range(len(self))[at]
        first, end = self._run_at[at : at + 2].tolist()
        runs = self._runs[first:end].tolist()
        pieces = [every(*run) for run in runs]
        frames = pieces[0] if len(pieces) == 1 else tuple(itertools.chain.from_iterable(pieces))
        return Segment(self.ids[at].decode(), frames, int(self.starts[at]))

    def __iter__(self) -> Iterator[Segment]:
        return (self[at] for at in range(len(self)))

    def of(self, video_id: str) -> Segment | None:
        """The segment of this video; None when there is none."""
        wanted = video_id.encode("utf-8", "surrogatepass")
        at = bisect_left(self.ids, wanted)
        segment: Segment | None = self[at] if at < len(self.ids) and self.ids[at] == wanted else None
        return segment


def pack(before: Plan, added: Sequence[Segment]) -> bytes:
    """The file of a growth of ``before``. The same growth gives the same bytes."""
    runs = [to_runs(segment.frame_index) for segment in added]
    arrays = {
        "about": np.array([PLAN_VERSION, before.shard_frames, before.num_shards]),
        "start": np.array([segment.start for segment in added]),
        "run_at": np.cumsum([0, *map(len, runs)]),
        "runs": np.array([run for of_one in runs for run in of_one]),
        "id": np.frombuffer(b"".join(segment.video_id.encode() + b"\0" for segment in added), np.uint8),
    }
    file = io.BytesIO()
    typed = {name: arrays[name].astype(kind) for name, (kind, _) in ARRAYS.items()}
    np.savez(file, allow_pickle=False, **typed)
    return file.getvalue()


def unpack(data: bytes, before: Plan) -> Columns:
    """The segments in the file of a growth of ``before``.

    Raises:
        OtherVersion: another program's.
        ValueError: the file is damaged, or does not continue this plan; the message says how.
    """
    about, starts, run_at, flat, raw_ids = _arrays(data)
    if len(about) != 3:
        raise ValueError("about does not hold three numbers")
    version, size, first_shard = about.tolist()
    if version != PLAN_VERSION:
        raise OtherVersion(version)
    if size != before.shard_frames:
        raise ValueError(f"shards have {size} frames, those of the store have {before.shard_frames}")
    if first_shard != before.num_shards:
        raise ValueError(f"it begins at shard {first_shard}, the plan so far ends at {before.num_shards}")
    ids = raw_ids.tobytes().split(b"\0")
    if ids.pop() != b"" or not len(ids) == len(starts) == len(run_at) - 1 or not len(starts):
        raise ValueError("its arrays do not have one entry for each segment")
    _check_runs(run_at, flat)
    lengths = np.add.reduceat(flat[:, 2].astype(np.int64), run_at[:-1])
    if lengths.max() > MAX_SEGMENT_FRAMES:
        raise ValueError(f"a segment has more than {MAX_SEGMENT_FRAMES} frames")
    _check_rows(before, starts, lengths)
    _check_ids(ids)
    columns = Columns(starts, run_at, flat, ids)
    _check_new(columns, before)
    return columns


def _arrays(data: bytes) -> list[npt.NDArray[Any]]:
    """The arrays of the file, in the order of ``ARRAYS``. zip's own checksums are checked; nothing is unpickled."""
    found = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            for name, (kind, axes) in ARRAYS.items():
                info = members.getinfo(f"{name}.npy")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                    raise ValueError(f"{name} is compressed")
                raw = members.read(info)
                file = io.BytesIO(raw)
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is no array of this format")
                shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
                count = int(np.prod(shape, dtype=object))
                if dtype != np.dtype(kind) or len(shape) != axes or by_columns or shape[1:] not in ((), (3,)):
                    raise ValueError(f"{name} is {dtype} {shape}")
                if count * dtype.itemsize != len(raw) - file.tell():
                    raise ValueError(f"{name} is truncated")
                found.append(np.frombuffer(raw, dtype, count, file.tell()).reshape(shape))
    except ValueError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen kinds for a file that is not theirs
        raise ValueError(f"not a readable .npz: {error}") from error
    return found


def _check_runs(run_at: Rows, runs: npt.NDArray[np.int32]) -> None:
    if run_at[0] != 0 or run_at[-1] != len(runs) or (np.diff(run_at) < 1).any():
        raise ValueError("run_at does not divide the runs")
    first, step, count = runs.astype(np.int64).T
    last = first + step * (count - 1)
    begins = np.zeros(len(runs), np.bool_)
    begins[run_at[:-1]] = True
    sound = (first >= 0) & (step >= 1) & (count >= 1) & (last <= MAX_FRAME_INDEX)
    if not sound.all() or not (begins[1:] | (first[1:] > last[:-1])).all():
        raise ValueError("a run is not sorted, repeats a frame, or goes too far")


def _check_rows(before: Plan, starts: Rows, lengths: Rows) -> None:
    """Segments in the order of their rows, none across shards but a long one, which has its shards for itself."""
    size, stops = before.shard_frames, starts + lengths
    short = lengths <= size
    inside = starts // size == (stops - 1) // size
    free = np.where(short, stops, -(-stops // size) * size)
    if starts[0] < before.num_shards * size or (starts[1:] < free[:-1]).any():
        raise ValueError("a segment lies on rows of another")
    if not (inside | (~short & (starts % size == 0))).all():
        raise ValueError("a segment crosses shards")


def _check_ids(ids: list[bytes]) -> None:
    try:
        b"\0".join(ids).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("an id is not valid Unicode text") from error
    sizes = [*map(len, ids)]
    if min(sizes) < 1 or max(sizes) > MAX_ID_BYTES:
        raise ValueError(f"an id does not have 1 to {MAX_ID_BYTES} bytes")
    if not all(map(operator.lt, ids, ids[1:])):
        raise ValueError("ids are not sorted, or one is there twice")


def _check_new(columns: Columns, before: Plan) -> None:
    """Frames of a video that an older growth has, too, must be others."""
    if not before.segments:
        return
    blocks = before.segments.blocks if isinstance(before.segments, Segments) else (before.segments,)
    older = (b.ids if isinstance(b, Columns) else [segment.video_id.encode() for segment in b] for b in blocks)
    for video in sorted(set(columns.ids).intersection(itertools.chain.from_iterable(older))):
        segment = columns.of(video.decode())
        if segment is not None and (before.find(segment.video_id, segment.frame_index) >= 0).any():
            raise ValueError(f"video {segment.video_id!r} has a frame that is planned twice")
