"""Where every frame of every video lives on the frame axis: pure integers, no input or output.

The frame axis is cut into shards of S frames. Whole videos are packed into shards in the order of their ids
(next fit: a video that does not fit into what is left of the current shard starts the next one). A video longer
than S takes a run of shards for itself. The plan only grows: videos (or frames) that come later start on a fresh
shard, so nothing that was planned ever moves.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

MAX_SHARD_FRAMES = 1 << 20
MAX_FRAME_INDEX = (1 << 31) - 1  # the published frame_index array is int32
MAX_SEGMENT_FRAMES = 1 << 24  # 77 hours at 60 fps; bounds what a damaged plan can make us allocate
MAX_ID_BYTES = 4096


@dataclass(frozen=True)
class Segment:
    """Frames of one video that lie side by side on the frame axis.

    ``frame_index`` is sorted and unique; frame ``frame_index[i]`` is row ``start + i``.
    """

    video_id: str
    frame_index: tuple[int, ...] = field(repr=False)
    start: int

    def __len__(self) -> int:
        return len(self.frame_index)

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.frame_index)


@dataclass(frozen=True)
class Part:
    """The piece of a segment that lies in one shard: ``count`` frames from the segment's frame ``offset`` on."""

    segment: Segment
    shard: int
    slot: int  # first slot inside the shard
    offset: int
    count: int

    @property
    def frame_index(self) -> tuple[int, ...]:
        """The frame indices of this piece."""
        return self.segment.frame_index[self.offset : self.offset + self.count]


@dataclass(frozen=True)
class Task:
    """One unit of work: one shard with its videos, or the run of shards of one long video.

    ``retry`` asks also for the failed videos of shards that are already committed; it is no part of its identity.
    """

    shards: tuple[int, ...]
    segments: tuple[Segment, ...]
    retry: bool = field(default=False, compare=False)

    @property
    def num_frames(self) -> int:
        """Frames of all its videos."""
        return sum(len(segment) for segment in self.segments)


class Block(Protocol):
    """Many segments that are made when they are asked for (plan_columns.Columns)."""

    starts: Rows

    def __len__(self) -> int: ...
    def __getitem__(self, at: int) -> Segment: ...
    def __iter__(self) -> Iterator[Segment]: ...
    def of(self, video_id: str) -> Segment | None: ...


class Segments(Sequence[Segment]):
    """The segments of a plan of which some growths are too large to hold as objects."""

    def __init__(self, blocks: Iterable[tuple[Segment, ...] | Block]) -> None:
        self.blocks = tuple(blocks)
        self._ends = list(accumulate(map(len, self.blocks)))
        self._few = _by_id(chain.from_iterable(block for block in self.blocks if isinstance(block, tuple)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, at):  # type: ignore[no-untyped-def]  # the overloads of Sequence say more than they help
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        at = range(len(self))[at]
        number = bisect_right(self._ends, at)
        return self.blocks[number][at - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Segment]:
        return chain.from_iterable(self.blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, Segments)) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, more: tuple[Segment, ...]) -> Segments:
        return Segments((*self.blocks, more))

    @property
    def starts(self) -> Rows:
        """First row of each."""
        return np.concatenate([_starts(block) if isinstance(block, tuple) else block.starts for block in self.blocks])

    def of(self, video_id: str) -> tuple[Segment, ...]:
        """The segments of one video, oldest first."""
        found = [block.of(video_id) for block in self.blocks if not isinstance(block, tuple)]
        all_of_it = [*self._few.get(video_id, ()), *(segment for segment in found if segment is not None)]
        return tuple(sorted(all_of_it, key=lambda segment: segment.start))


def _starts(segments: Sequence[Segment]) -> Rows:
    return np.array([segment.start for segment in segments], np.int64)


def _by_id(segments: Iterable[Segment]) -> dict[str, tuple[Segment, ...]]:
    found: dict[str, tuple[Segment, ...]] = {}
    for segment in segments:
        found[segment.video_id] = (*found.get(segment.video_id, ()), segment)
    return found


@dataclass(frozen=True)
class Plan:
    """An immutable assignment (video, frame index) -> row. Make one with ``empty`` and grow it with ``extended``.

    ``segments`` are in the order of their rows.
    """

    shard_frames: int
    segments: tuple[Segment, ...] | Segments = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.shard_frames <= MAX_SHARD_FRAMES:
            raise ValueError(f"shard_frames must be 1..{MAX_SHARD_FRAMES}, not {self.shard_frames}")

    @classmethod
    def empty(cls, shard_frames: int) -> Plan:
        """A plan without videos, for shards of ``shard_frames`` frames."""
        return cls(shard_frames, ())

    def extended(self, wanted: Mapping[str, Sequence[int] | npt.NDArray[np.integer]]) -> Plan:
        """This plan and the frames of ``wanted`` (video -> frame indices, any order) that it does not hold yet.

        What is already planned stays where it is. The result depends on the set of wanted frames, not on the order
        of the mapping. Returns ``self`` when there is nothing to add.

        Raises:
            ValueError: an unusable video id or frame index; the message names the video.
        """
        added: list[Segment] = []
        row = self.num_shards * self.shard_frames
        for video_id in sorted(wanted):
            check_video_id(video_id)
            frames = _sorted_unique(video_id, wanted[video_id])
            frames = frames[self.find(video_id, frames) < 0]
            if len(frames):
                start = self._next_start(row, len(frames))
                added.append(Segment(video_id, tuple(frames.tolist()), start))
                # A run of shards is exclusive: what follows it starts on a fresh shard.
                row = added[-1].stop if len(frames) <= self.shard_frames else self._round_up(added[-1].stop)
        return Plan(self.shard_frames, self.segments + tuple(added)) if added else self

    def grown_by(self, block: Block) -> Plan:
        """This plan and a growth of it, already checked, that is too large to hold as objects."""
        before = self.segments.blocks if isinstance(self.segments, Segments) else (self.segments,)
        return Plan(self.shard_frames, Segments((*(known for known in before if len(known)), block)))

    @cached_property
    def num_shards(self) -> int:
        """Shards that the frame axis needs."""
        return self._round_up(self.segments[-1].stop) // self.shard_frames if self.segments else 0

    @cached_property
    def num_frames(self) -> int:
        """Frames planned, over all videos."""
        return sum(len(segment) for segment in self.segments)

    @property
    def videos(self) -> tuple[str, ...]:
        """The planned videos, in the order they were planned."""
        return tuple(dict.fromkeys(segment.video_id for segment in self.segments))

    def tasks(self) -> tuple[Task, ...]:
        """All tasks in shard order. Every shard belongs to exactly one task, every segment too."""
        shards = np.unique(self._starts // self.shard_frames).tolist()
        return tuple(self.task_of(first) for first in shards)

    def task_of(self, shard: int) -> Task:
        """The task that owns this shard. Raises KeyError when there is no such shard."""
        segments = self._segments_in(shard)
        first, size = segments[0].start // self.shard_frames, self.shard_frames
        return Task(tuple(range(first, self._round_up(segments[-1].stop) // size)), segments)

    def _segments_in(self, shard: int) -> tuple[Segment, ...]:
        """Those of the shard; in the run of a long video that one."""
        if not 0 <= shard < self.num_shards:
            raise KeyError(shard)
        size, starts = self.shard_frames, self._starts
        begin, end = starts.searchsorted((shard * size, (shard + 1) * size)).tolist()
        return tuple(self.segments[begin:end] if begin < end else self.segments[begin - 1 : begin])

    def parts(self, shard: int) -> tuple[Part, ...]:
        """The pieces of segments that lie in this shard, by slot."""
        first_row, size = shard * self.shard_frames, self.shard_frames
        pieces = []
        for segment in self._segments_in(shard):
            length, slot = len(segment.frame_index), segment.start - first_row
            offset, slot = (0, slot) if slot >= 0 else (-slot, 0)
            pieces.append(Part(segment, shard, slot, offset, min(length - offset, size - slot)))
        return tuple(pieces)

    def find(self, video_id: str, frame_index: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
        """Rows of these frames in the given order; -1 where a frame is not planned."""
        wanted = as_frames(video_id, frame_index)
        if not self.segments_of(video_id):
            return np.full(wanted.shape, -1, np.int64)
        if video_id not in self._lookup:
            self._lookup[video_id] = self._index(video_id)
        frames, rows = self._lookup[video_id]
        at = np.minimum(np.searchsorted(frames, wanted), len(frames) - 1)
        return np.where(frames[at] == wanted, rows[at], np.int64(-1))

    def rows(self, video_id: str, frame_index: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
        """Rows of these frames in the given order. Raises KeyError naming what is not planned."""
        found = self.find(video_id, frame_index)
        if (found < 0).any():
            if not self.segments_of(video_id):
                raise KeyError(f"video {video_id!r} is not planned")
            absent = as_frames(video_id, frame_index)[found < 0].tolist()
            raise KeyError(f"frames {shorten(absent)} of video {video_id!r} are not planned")
        return found

    def row(self, video_id: str, frame: int | np.integer) -> int:
        """Row of one frame; -1 when it is not planned. The quick way for single frames."""
        for segment in self.segments_of(video_id):
            at = bisect_left(segment.frame_index, frame)
            if at < len(segment.frame_index) and segment.frame_index[at] == frame:
                return segment.start + at
        return -1

    def segments_of(self, video_id: str) -> tuple[Segment, ...]:
        """The segments of one video, oldest first; empty when it is not planned."""
        known = self._segments_of.get(video_id)
        if known is None:
            known = self.segments.of(video_id) if isinstance(self.segments, Segments) else ()
            if known:
                self._segments_of[video_id] = known
        return known

    @cached_property
    def _segments_of(self) -> dict[str, tuple[Segment, ...]]:
        return {} if isinstance(self.segments, Segments) else _by_id(self.segments)  # {}: filled on demand

    @cached_property
    def _starts(self) -> Rows:
        return self.segments.starts if isinstance(self.segments, Segments) else _starts(self.segments)

    @cached_property
    def _lookup(self) -> dict[str, tuple[Rows, Rows]]:
        return {}  # filled on demand: most runs read few of the videos of a large store

    def _index(self, video_id: str) -> tuple[Rows, Rows]:
        segments = self.segments_of(video_id)
        frames = np.concatenate([np.asarray(segment.frame_index, np.int64) for segment in segments])
        rows = np.concatenate([np.arange(segment.start, segment.stop, dtype=np.int64) for segment in segments])
        order = np.argsort(frames)
        return frames[order], rows[order]

    def _round_up(self, row: int) -> int:
        return -(-row // self.shard_frames) * self.shard_frames

    def _next_start(self, row: int, count: int) -> int:
        left = self._round_up(row) - row
        return row if count <= left else self._round_up(row)


def check_video_id(video_id: str) -> None:
    """Raise ValueError unless the id can be stored: 1 to 4096 bytes of UTF-8 without NUL. It never names a file."""
    if not isinstance(video_id, str):
        raise ValueError(f"a video id must be text, not {video_id!r}")
    try:
        size = len(video_id.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"video id {video_id!r} is not valid Unicode text") from error
    if not 1 <= size <= MAX_ID_BYTES or "\0" in video_id:
        raise ValueError(f"video id {video_id[:80]!r} must have 1 to {MAX_ID_BYTES} bytes and no NUL character")


def as_frames(video_id: str, frame_index: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
    """Frame indices as an int64 array [n]. Raises ValueError for anything but one list of integers."""
    frames = np.asarray(frame_index)
    if frames.size == 0:
        return np.empty(0, np.int64)
    if frames.ndim != 1 or not np.issubdtype(frames.dtype, np.integer):
        raise ValueError(f"frame indices of video {video_id!r} must be one list of integers")
    return frames.astype(np.int64, copy=False)


def _sorted_unique(video_id: str, frame_index: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
    frames = as_frames(video_id, frame_index)
    low, high = int(frames.min(initial=0)), int(frames.max(initial=0))
    if low < 0 or high > MAX_FRAME_INDEX:
        raise ValueError(f"frame indices of video {video_id!r} must be 0..{MAX_FRAME_INDEX}, got {low}..{high}")
    if len(frames) > MAX_SEGMENT_FRAMES:
        raise ValueError(f"video {video_id!r} wants {len(frames)} frames; at most {MAX_SEGMENT_FRAMES} are allowed")
    return np.unique(frames)


def to_runs(frame_index: Sequence[int]) -> list[list[int]]:
    """Sorted frame indices as runs ``[first, step, count]``, the longest that fit from the left (step 1 for one)."""
    if len(frame_index) > 1:  # mostly every n-th frame: one run
        first, step, last = frame_index[0], frame_index[1] - frame_index[0], frame_index[-1]
        if tuple(frame_index) == tuple(range(first, last + 1, step)):
            return [[first, step, len(frame_index)]]
    runs: list[list[int]] = []
    for frame in frame_index:
        run = runs[-1] if runs else None
        if run is not None and run[2] == 1:
            run[1], run[2] = frame - run[0], 2
        elif run is not None and frame == run[0] + run[1] * run[2]:
            run[2] += 1
        else:
            runs.append([frame, 1, 1])
    return runs


def from_runs(runs: object) -> tuple[int, ...]:
    """Inverse of ``to_runs`` for data from a file. Raises ValueError unless the result is sorted and unique."""
    if not isinstance(runs, list):
        raise ValueError("frames must be a list of runs [first, step, count]")
    frames: list[int] = []
    for run in runs:
        if not isinstance(run, list) or [*map(type, run)] != [int, int, int]:
            raise ValueError("frames must be a list of runs [first, step, count] of integers")
        first, step, count = run
        if step < 1 or not 1 <= count <= MAX_SEGMENT_FRAMES - len(frames) or first <= (frames[-1] if frames else -1):
            raise ValueError(f"run {run} is not sorted, repeats a frame, or is too long")
        if first + step * (count - 1) > MAX_FRAME_INDEX:
            raise ValueError(f"run {run} goes beyond frame {MAX_FRAME_INDEX}")
        if len(runs) == 1:
            return every(first, step, count)
        frames.extend(range(first, first + step * count, step))
    return tuple(frames)


@lru_cache(maxsize=4096)
def every(first: int, step: int, count: int) -> tuple[int, ...]:
    """The frame indices of one run: one tuple for all videos that have the same frames, as most have."""
    return tuple(range(first, first + step * count, step))


def shorten(numbers: Sequence[int], limit: int = 8) -> str:
    """A list of numbers for a message: the first few and how many more there are."""
    shown = ", ".join(str(number) for number in numbers[:limit])
    return shown if len(numbers) <= limit else f"{shown}, … ({len(numbers)} in all)"
