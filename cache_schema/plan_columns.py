"""One growth of a large plan as columns, so that a store of a million videos opens in a moment.

``plan/000000.columns`` stands beside a large ``plan/000000.json`` and says the same; Python needs 15 s for that
many JSON objects. It is derived: it names the JSON by its size and crc32c, and where it is absent, damaged or of
another file, the JSON is read.
"""

from __future__ import annotations

import itertools
import operator
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema.plan import MAX_FRAME_INDEX, MAX_ID_BYTES, MAX_SEGMENT_FRAMES, Plan, Segment, Segments, every, to_runs

MAGIC, VERSION = b"DLMMPLAN", 1
# Magic, version, crc32c of the JSON, its bytes; S, first shard, segments, runs, bytes of ids; crc32c of all the rest.
HEADER = struct.Struct("<8sIIQQQQQQI")


class Columns(Sequence[Segment]):
    """The segments of one growth, sorted by id and by row; each is made when it is asked for."""

    def __init__(
        self,
        starts: npt.NDArray[np.int64],
        run_at: npt.NDArray[np.int64],
        runs: npt.NDArray[np.int32],
        ids: list[bytes],
    ) -> None:
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


def pack(before: Plan, added: Sequence[Segment], document: bytes) -> bytes:
    """The columns file for a growth of ``before`` whose JSON is ``document``."""
    runs = [to_runs(segment.frame_index) for segment in added]
    starts = np.array([segment.start for segment in added], "<i8")
    run_at = np.cumsum([0, *map(len, runs)]).astype("<i8")
    flat = np.array([run for of_one in runs for run in of_one], "<i4")
    ids = b"".join(segment.video_id.encode() + b"\0" for segment in added)
    body = b"".join((starts.tobytes(), run_at.tobytes(), flat.tobytes(), ids))
    numbers = (before.shard_frames, before.num_shards, len(added), len(flat), len(ids))
    head = HEADER.pack(MAGIC, VERSION, crc32c(document), len(document), *numbers, 0)[:-4]
    return head + struct.pack("<I", crc32c(body, crc32c(head))) + body


def unpack(data: bytes, before: Plan, document: bytes) -> Columns | None:
    """The columns of a growth of ``before``, checked like the JSON; None when they are not those of ``document``."""
    if len(data) < HEADER.size:
        return None
    magic, version, json_crc, json_bytes, size, first_shard, count, num_runs, id_bytes, crc = HEADER.unpack_from(data)
    body = memoryview(data)[HEADER.size :]
    if (magic, version, json_bytes, size) != (MAGIC, VERSION, len(document), before.shard_frames):
        return None
    if len(body) != 8 * count + 8 * (count + 1) + 12 * num_runs + id_bytes or not count:
        return None
    if json_crc != crc32c(document) or crc != crc32c(body, crc32c(data[: HEADER.size - 4])):
        return None
    starts = np.frombuffer(body, "<i8", count)
    run_at = np.frombuffer(body, "<i8", count + 1, 8 * count)
    runs = np.frombuffer(body, "<i4", 3 * num_runs, 8 * count + 8 * (count + 1)).reshape(num_runs, 3)
    ids = bytes(body[len(body) - id_bytes :]).split(b"\0")
    if ids.pop() != b"" or len(ids) != count or first_shard != before.num_shards:
        return None
    if not (_runs_are_sound(run_at, runs) and _ids_are_sound(ids, before)):
        return None
    lengths = np.add.reduceat(runs[:, 2].astype(np.int64), run_at[:-1])
    if lengths.max() > MAX_SEGMENT_FRAMES or not _rows_are_sound(before, starts, lengths):
        return None
    return Columns(starts, run_at, runs, ids)


def _runs_are_sound(run_at: npt.NDArray[np.int64], runs: npt.NDArray[np.int32]) -> bool:
    if run_at[0] != 0 or run_at[-1] != len(runs) or (np.diff(run_at) < 1).any():
        return False
    first, step, count = runs.astype(np.int64).T
    last = first + step * (count - 1)
    begins = np.zeros(len(runs), np.bool_)
    begins[run_at[:-1]] = True
    sorted_ = begins[1:] | (first[1:] > last[:-1])
    return bool((first >= 0).all() and (step >= 1).all() and (count >= 1).all() and (last <= MAX_FRAME_INDEX).all()
                and sorted_.all())  # fmt: skip


def _ids_are_sound(ids: list[bytes], before: Plan) -> bool:
    """Valid, each once and in order; and none of an older growth, which the JSON is asked about frame by frame."""
    try:
        b"\0".join(ids).decode("utf-8")
    except UnicodeDecodeError:
        return False
    sizes = [*map(len, ids)]
    if min(sizes) < 1 or max(sizes) > MAX_ID_BYTES or not all(map(operator.lt, ids, ids[1:])):
        return False
    if not before.segments:
        return True
    blocks = before.segments.blocks if isinstance(before.segments, Segments) else (before.segments,)
    older = (b.ids if isinstance(b, Columns) else [segment.video_id.encode() for segment in b] for b in blocks)
    return set(ids).isdisjoint(itertools.chain.from_iterable(older))


def _rows_are_sound(before: Plan, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> bool:
    """The rules of ``plan.apply_generation``, for all segments at once."""
    size, stops = before.shard_frames, starts + lengths
    short = lengths <= size
    inside = starts // size == (stops - 1) // size
    free = np.where(short, stops, -(-stops // size) * size)
    return bool(
        starts[0] >= before.num_shards * size
        and (starts[1:] >= free[:-1]).all()
        and (inside | (~short & (starts % size == 0))).all()
    )
