"""Where every frame of every video lives on the frame axis: pure integers, no input or output.

The frame axis is cut into shards of S frames. Whole videos are packed into shards in the order of their ids
(next fit: a video that does not fit into what is left of the current shard starts the next one). A video longer
than S takes a run of shards for itself. The plan only grows: videos (or frames) that come later start on a fresh
shard, so nothing that was planned ever moves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(frozen=True)
class Plan:
    """An immutable assignment (video, frame index) -> row. Make one with ``empty`` and grow it with ``extended``."""

    shard_frames: int
    segments: tuple[Segment, ...] = field(repr=False)

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

    @cached_property
    def num_shards(self) -> int:
        """Shards that the frame axis needs."""
        return self._round_up(max((segment.stop for segment in self.segments), default=0)) // self.shard_frames

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
        return self._tasks

    def task_of(self, shard: int) -> Task:
        """The task that owns this shard."""
        return self._tasks[self._task_of_shard[shard]]

    def parts(self, shard: int) -> tuple[Part, ...]:
        """The pieces of segments that lie in this shard, by slot."""
        first_row = shard * self.shard_frames
        pieces = []
        for segment in self.task_of(shard).segments:
            offset = max(0, first_row - segment.start)
            slot = max(0, segment.start - first_row)
            count = min(len(segment) - offset, self.shard_frames - slot)
            pieces.append(Part(segment, shard, slot, offset, count))
        return tuple(pieces)

    def find(self, video_id: str, frame_index: Sequence[int] | npt.NDArray[np.integer]) -> Rows:
        """Rows of these frames in the given order; -1 where a frame is not planned."""
        wanted = as_frames(video_id, frame_index)
        if video_id not in self._segments_of:
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
            if video_id not in self._segments_of:
                raise KeyError(f"video {video_id!r} is not planned")
            absent = as_frames(video_id, frame_index)[found < 0].tolist()
            raise KeyError(f"frames {shorten(absent)} of video {video_id!r} are not planned")
        return found

    def row(self, video_id: str, frame: int) -> int:
        """Row of one frame; -1 when it is not planned. The quick way for single frames."""
        for segment in self._segments_of.get(video_id, ()):
            at = bisect_left(segment.frame_index, frame)
            if at < len(segment.frame_index) and segment.frame_index[at] == frame:
                return segment.start + at
        return -1

    def segments_of(self, video_id: str) -> tuple[Segment, ...]:
        """The segments of one video, oldest first; empty when it is not planned."""
        return tuple(self._segments_of.get(video_id, ()))

    @cached_property
    def _segments_of(self) -> dict[str, list[Segment]]:
        found: dict[str, list[Segment]] = {}
        for segment in self.segments:
            found.setdefault(segment.video_id, []).append(segment)
        return found

    @cached_property
    def _lookup(self) -> dict[str, tuple[Rows, Rows]]:
        return {}  # filled on demand: most runs read few of the videos of a large store

    def _index(self, video_id: str) -> tuple[Rows, Rows]:
        segments = self._segments_of[video_id]
        frames = np.concatenate([np.asarray(segment.frame_index, np.int64) for segment in segments])
        rows = np.concatenate([np.arange(segment.start, segment.stop, dtype=np.int64) for segment in segments])
        order = np.argsort(frames)
        return frames[order], rows[order]

    @cached_property
    def _tasks(self) -> tuple[Task, ...]:
        groups: dict[int, list[Segment]] = {}
        for segment in self.segments:
            groups.setdefault(segment.start // self.shard_frames, []).append(segment)
        return tuple(
            Task(tuple(range(first, self._round_up(segments[-1].stop) // self.shard_frames)), tuple(segments))
            for first, segments in sorted(groups.items())
        )

    @cached_property
    def _task_of_shard(self) -> dict[int, int]:
        return {shard: number for number, task in enumerate(self._tasks) for shard in task.shards}

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
        if not isinstance(run, list) or len(run) != 3 or any(type(number) is not int for number in run):
            raise ValueError("frames must be a list of runs [first, step, count] of integers")
        first, step, count = run
        if step < 1 or not 1 <= count <= MAX_SEGMENT_FRAMES - len(frames) or first <= (frames[-1] if frames else -1):
            raise ValueError(f"run {run} is not sorted, repeats a frame, or is too long")
        if first + step * (count - 1) > MAX_FRAME_INDEX:
            raise ValueError(f"run {run} goes beyond frame {MAX_FRAME_INDEX}")
        frames.extend(range(first, first + step * count, step))
    return tuple(frames)


def generation_document(before: Plan, after: Plan) -> dict[str, object]:
    """What ``after`` adds to ``before``, as the JSON of one generation file (FORMAT.md)."""
    added = after.segments[len(before.segments) :]
    return {
        "shard_frames": after.shard_frames,
        "first_shard": before.num_shards,
        "segments": [{"video": s.video_id, "start": s.start, "frames": to_runs(s.frame_index)} for s in added],
    }


def apply_generation(plan: Plan, document: Mapping[str, object]) -> Plan:
    """The plan with the segments of one generation file.

    Raises:
        ValueError: the document does not continue this plan (wrong shard size, overlapping rows, a frame planned twice,
            a short video across shards); the message names the field.
    """
    if document.get("shard_frames") != plan.shard_frames:
        raise ValueError(f"shard_frames is {document.get('shard_frames')!r}, the store has {plan.shard_frames}")
    if document.get("first_shard") != plan.num_shards:
        raise ValueError(f"first_shard is {document.get('first_shard')!r}, the plan so far ends at {plan.num_shards}")
    records = document.get("segments")
    if not isinstance(records, list) or not records:
        raise ValueError("segments must be a list that is not empty")
    added = tuple(_segment(record) for record in records)
    _check_rows(plan, added)
    for video_id, frames in _by_video(added).items():
        if len(frames) != len(set(frames)) or (plan.find(video_id, frames) >= 0).any():
            raise ValueError(f"video {video_id!r} has a frame that is planned twice")
    return Plan(plan.shard_frames, plan.segments + added)


def _segment(record: object) -> Segment:
    if not isinstance(record, dict) or not isinstance(record.get("video"), str) or type(record.get("start")) is not int:
        raise ValueError("a segment must have a text `video`, an integer `start`, and `frames`")
    check_video_id(record["video"])
    frames = from_runs(record.get("frames"))
    if not frames:
        raise ValueError(f"the segment of video {record['video']!r} has no frames")
    return Segment(record["video"], frames, record["start"])


def _check_rows(plan: Plan, added: Iterable[Segment]) -> None:
    size, free = plan.shard_frames, plan.num_shards * plan.shard_frames
    for segment in added:
        inside = segment.start // size == (segment.stop - 1) // size
        if segment.start < free or not (inside or segment.start % size == 0):
            raise ValueError(f"the segment of video {segment.video_id!r} at row {segment.start} is not where it may be")
        if not inside and len(segment) <= size:
            raise ValueError(f"the segment of video {segment.video_id!r} at row {segment.start} crosses shards")
        free = segment.stop if len(segment) <= size else -(-segment.stop // size) * size


def _by_video(segments: Iterable[Segment]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for segment in segments:
        found.setdefault(segment.video_id, []).extend(segment.frame_index)
    return found


def shorten(numbers: Sequence[int], limit: int = 8) -> str:
    """A list of numbers for a message: the first few and how many more there are."""
    shown = ", ".join(str(number) for number in numbers[:limit])
    return shown if len(numbers) <= limit else f"{shown}, … ({len(numbers)} in all)"
