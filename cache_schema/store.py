"""FeatureStore: one modality of one cache; the only door the stages use.

A store is a Zarr v3 group with one frame-axis array per modality and one plan shared by all of them (FORMAT.md).
What is committed is what the shard footers say; nothing is concluded from what Zarr returns.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema import claims, files, metadata, write
from cache_schema.connections import ObjectChanged, concurrently
from cache_schema.errors import CacheCorrupt, CacheError, CacheMismatch, CacheMissing, SegmentFailed
from cache_schema.index import STATUS, index_arrays, write_index
from cache_schema.object_reads import read_slots
from cache_schema.objects import MAX_SHARD_OBJECT, ObjectPath, StorePath, locate
from cache_schema.plan import Plan, Segment, Task, as_frames
from cache_schema.planfile import PlanFiles
from cache_schema.report import Missing, TaskReport, VideoStatus
from cache_schema.shard import Layout, Shard, identity_now, identity_of, read_records, read_shard, read_stats
from cache_schema.spec import FeatureSpec
from cache_schema.stats import FeatureStats, Moments
from cache_schema.write import SegmentResult, frame_corrupt, write_tasks_together

__all__ = [
    "FeatureStats",
    "FeatureStore",
    "Missing",
    "SegmentFailed",
    "SegmentResult",
    "TaskReport",
    "VideoStatus",
    "write_tasks_together",
]

Array = npt.NDArray[Any]
FrameIndex = Sequence[int] | npt.NDArray[np.integer]
P = ParamSpec("P")
R = TypeVar("R")


def _with_help(
    method: Callable[Concatenate[FeatureStore, P], R],
) -> Callable[Concatenate[FeatureStore, P], R]:
    """Cache errors leave the store ending with its help command."""

    @functools.wraps(method)
    def helped(self: FeatureStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except CacheError as error:
            error.with_help(self.help_command)
            raise

    return helped


class FeatureStore:
    """Features of one modality, keyed by (video, frame index). Make one with ``create`` or ``open``.

    Safe to pickle and to use from several threads or processes: it holds no open file and no lock between calls.

    Attributes:
        path: the store's folder, or its place in an object store.
        modality: the array's name, such as ``tokens`` or ``pooled/layer8``.
        spec: how its numbers were made.
        shard_frames: S, the frames of one shard.
    """

    def __init__(self, info: metadata.ArrayInfo, help_command: str) -> None:
        self.path, self.modality, self.spec, self.shard_frames = info.store, info.modality, info.spec, info.shard_frames
        self.layout = Layout(info)
        self.help_command = help_command
        self._plan_files = PlanFiles(info.store, info.shard_frames)
        self._shards: dict[int, Shard] = {}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | ObjectPath,
        modality: str,
        spec: FeatureSpec,
        *,
        shard_frames: int = 1024,
        help_command: str = "",
    ) -> FeatureStore:
        """Make the modality, or open it for writing and check that it was made with this spec.

        An existing store keeps its own ``shard_frames``. Partial files of dead writers of this host are removed.

        Raises:
            CacheMismatch: it exists with another spec (the differing fields are listed), another modality of the store
                has another frame rule, or the store has a newer format.
            CacheCorrupt: its metadata is damaged.
        """
        store = locate(path)
        help_command = help_command or metadata.default_help(modality)
        try:
            metadata.check_modality(modality)
            metadata.create_group(store, shard_frames)
            shard_frames = metadata.read_group(store)
            _check_frame_rule(store, modality, spec, shard_frames)
            info = metadata.ArrayInfo(store, modality, spec, shard_frames)
            if isinstance(store, ObjectPath) and Layout(info).stride * shard_frames > MAX_SHARD_OBJECT:
                raise ValueError(
                    f"a shard of {shard_frames} frames has more than the 5 GB that an object store copies at once.\n"
                    f"Make smaller ones:  --set extract.shard_frames={MAX_SHARD_OBJECT // Layout(info).stride}"
                )
            metadata.create_array(info)
            opened = cls.open(store, modality, spec, help_command=help_command)
            for folder in (store, store / "plan", *(store / part for part in metadata.path_to(modality))):
                files.sweep(folder)
            claims.sweep(opened.layout.info.folder)
            if isinstance(store, ObjectPath):
                files.sweep(store.scratch())
            metadata.grow_array(opened.layout.info, opened.plan.num_shards)
            return opened
        except CacheError as error:
            error.with_help(help_command)
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | ObjectPath,
        modality: str,
        spec: FeatureSpec | None = None,
        *,
        help_command: str = "",
    ) -> FeatureStore:
        """Open an existing modality; nothing is written. With ``spec``, it must be the one the modality was made with.

        Raises:
            CacheMissing: no store, or no such modality in it.
            CacheMismatch: another spec (the differing fields are listed) or a newer format.
            CacheCorrupt: damaged metadata or plan; the file and the field are named.
        """
        store = locate(path)
        help_command = help_command or metadata.default_help(modality)
        try:
            info = metadata.read_array(store, modality, metadata.read_group(store))
            if spec is not None and spec != info.spec:
                raise CacheMismatch.between(str(info.folder), info.spec.differences(spec))
            opened = cls(info, help_command)
            opened._plan_files.check_complete()
            return opened
        except CacheError as error:
            error.with_help(help_command)
            raise

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shards": {}}

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {self.modality!r})"

    # --- the plan

    @property
    @_with_help
    def plan(self) -> Plan:
        """The store's plan as it is now, other processes' additions included."""
        return self._plan_files.current()

    @_with_help
    def extend_plan(self, wanted: Mapping[str, FrameIndex]) -> Plan:
        """Add the frames of ``wanted`` (video -> frame indices) that are not planned yet; return the plan.

        What is planned never moves. The addition is published whole; of two writers the first wins and the other
        derives its addition anew from what it then finds. All modalities of the store share the plan.
        """
        plan = self._plan_files.extend(wanted)
        metadata.grow_array(self.layout.info, plan.num_shards)
        return plan

    # --- what is there

    @_with_help
    def shard(self, number: int) -> Shard | None:
        """The committed shard, checked; None when it is not committed. Raises CacheCorrupt naming the file."""
        known = self._shards.get(number)
        if known is not None:
            try:
                if identity_now(known.file) == known.identity:
                    return known
            except (FileNotFoundError, NotADirectoryError):
                pass
            self._shards.pop(number, None)
        known_plan = self._plan_files.known  # no row of a plan ever changes, so a longer one would say the same
        plan = known_plan if number < known_plan.num_shards else self.plan
        found = read_shard(self.layout, number, plan.parts(number))
        if found is not None:
            self._shards[number] = found
        return found

    def shards(self, numbers: Iterable[int]) -> dict[int, Shard | None]:
        """``shard`` of each of these; of an object store, many requests are under way at a time."""
        wanted = list(numbers)
        if isinstance(self.path, ObjectPath):
            return dict(zip(wanted, concurrently(self.shard, wanted), strict=True))
        return {number: self.shard(number) for number in wanted}

    def pending(self, *, retry_failed: bool = False) -> list[Task]:
        """Tasks of the plan that this modality has not committed, in order.

        With ``retry_failed`` also the committed ones that hold a failed video, and all have ``retry`` set.
        Raises CacheCorrupt when a shard is there but damaged: it is never taken for missing.
        """
        found, plan = [], self.plan
        there = self.shards(range(plan.num_shards))
        for task in plan.tasks():
            shards = [there[number] for number in task.shards]
            if any(shard is None or (retry_failed and shard.failed) for shard in shards):
                found.append(replace(task, retry=retry_failed))
        return found

    def status(self) -> dict[str, VideoStatus]:
        """Video -> ok or failed with its reason, for every video with a committed segment, in plan order.

        A video with several segments is failed when one of them is.
        """
        found: dict[str, VideoStatus] = {}
        for segment, status in zip(self.plan.segments, self.segment_status(), strict=True):
            if status is None:
                continue
            before = found.get(segment.video_id)
            if before is not None:
                worst = before if status.ok else status
                status = VideoStatus(worst.ok, worst.kind, worst.reason, before.frames + status.frames)
            found[segment.video_id] = status
        return found

    def segment_status(self) -> list[VideoStatus | None]:
        """One entry per segment of the plan; None where it is not (wholly) committed."""
        found: list[VideoStatus | None] = []
        plan = self.plan
        there = self.shards(range(plan.num_shards))
        for task in plan.tasks():
            shards = [there[number] for number in task.shards]
            for segment in task.segments:
                found.append(_segment_status(segment, shards))
        return found

    def status_codes(self) -> list[int]:
        """``segment_status`` as the numbers of the ``videos`` index."""
        return [STATUS["not committed" if s is None else "ok" if s.ok else "failed"] for s in self.segment_status()]

    @_with_help
    def missing(self, wanted: Mapping[str, FrameIndex]) -> dict[str, Missing]:
        """Video -> the wanted frames that cannot be read, and why; videos that are complete do not appear."""
        plan, found = self.plan, {}
        located = {video_id: plan.find(video_id, frame_index) for video_id, frame_index in wanted.items()}
        numbers = {number for rows in located.values() for number in (rows[rows >= 0] // self.shard_frames).tolist()}
        shards = self.shards(sorted(numbers))
        for video_id, rows in located.items():
            frames = as_frames(video_id, wanted[video_id])
            gone: dict[str, list[int]] = {"not_planned": frames[rows < 0].tolist(), "not_committed": [], "failed": []}
            kind = reason = ""
            for number in np.unique(rows[rows >= 0] // self.shard_frames).tolist():
                here = (rows >= 0) & (rows // self.shard_frames == number)
                shard, slots = shards[number], rows[here] % self.shard_frames
                if shard is None:
                    gone["not_committed"] += frames[here].tolist()
                elif not shard.present[slots].all():
                    record = shard.record_at(int(slots[~shard.present[slots]][0]))
                    kind, reason = record.kind, record.reason
                    gone["failed"] += frames[here][~shard.present[slots]].tolist()
            if any(gone.values()):
                found[video_id] = Missing(
                    **{name: tuple(sorted(set(numbers))) for name, numbers in gone.items()}, kind=kind, reason=reason
                )
        return found

    # --- numbers out

    @_with_help
    def read(self, video_id: str, frame_index: FrameIndex, out: Array | None = None, *, verify: bool = False) -> Array:
        """Features [n, *frame_shape] of these frames, in this order; repeats are allowed.

        Args:
            out: C-contiguous array of that shape and the spec's dtype to fill; a new one by default.
            verify: check the crc32c of every frame that is read.

        Raises:
            CacheMissing: a frame is not planned, not extracted, or its video failed; the message says which and why.
            CacheCorrupt: naming shard, video and frame.
        """
        frames = as_frames(video_id, frame_index)
        rows = self._plan_files.known.find(video_id, frames)
        if (rows < 0).any():
            rows = self.plan.find(video_id, frames)  # planned by another process since we looked
        if (rows < 0).any():
            raise self._not_there(video_id, frames)
        features = self._output(out, len(frames))
        raw = features.view(np.uint8).reshape(len(frames), self.layout.frame_bytes)
        shards, slots = np.divmod(rows, self.shard_frames)
        if isinstance(self.path, ObjectPath):
            self._read_objects(video_id, frames, shards, slots, raw)
            return features
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            descriptor, shard = self._open_shard(number, video_id, frames)
            try:
                if not shard.present[slots[here]].all():
                    raise self._not_there(video_id, frames)
                for at, slot in zip(here.tolist(), slots[here].tolist(), strict=True):
                    got = os.preadv(descriptor, [raw[at].data], slot * self.layout.stride)
                    if got != self.layout.frame_bytes:
                        raise CacheCorrupt.of_shard(
                            shard.file, "ends inside a frame: it was truncated", kind="truncated"
                        )
                    if verify and crc32c(raw[at].data) != shard.crcs[slot]:
                        raise frame_corrupt(shard, video_id, int(frames[at]))
            finally:
                os.close(descriptor)
        return features

    def _read_objects(self, video_id: str, frames: Array, shards: Array, slots: Array, raw: Array) -> None:
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            whole = len(here) == len(raw)
            rows = raw if whole else np.empty((len(here), self.layout.frame_bytes), np.uint8)
            while True:
                shard = self._shards.get(number) or self.shard(number)  # no need to look again: a read is pinned
                if shard is None or not shard.present[slots[here]].all():
                    raise self._not_there(video_id, frames)
                try:
                    damaged = read_slots(self.layout, shard, slots[here], rows)
                    break
                except (ObjectChanged, FileNotFoundError):  # by a retry, or somebody removed it
                    self._shards.pop(number, None)
            if damaged is not None:
                raise frame_corrupt(shard, video_id, int(frames[here[damaged]]))
            if not whole:
                raw[here] = rows

    def _open_shard(self, number: int, video_id: str, frames: Array) -> tuple[int, Shard]:
        # The checked footer must be of the very file that is read: a retry may replace it between the two.
        while True:
            shard = self.shard(number)
            if shard is None:
                raise self._not_there(video_id, frames)
            try:
                descriptor = files.open_regular(shard.file)
            except FileNotFoundError:
                continue
            if identity_of(os.fstat(descriptor)) == shard.identity:
                return descriptor, shard
            os.close(descriptor)

    def _not_there(self, video_id: str, frames: Array) -> CacheMissing:
        why = self.missing({video_id: frames}).get(video_id, "it changed while it was read")
        return CacheMissing(f"{self.path}/{self.modality} cannot give video {video_id!r}: {why}.\nExtract with:")

    def _output(self, out: Array | None, count: int) -> Array:
        shape = (count, *self.spec.frame_shape)
        if out is None:
            return np.empty(shape, self.layout.dtype)
        if out.shape != shape or out.dtype != self.layout.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous {self.spec.dtype} array {shape}, not {out.dtype} {out.shape}")
        return out

    @_with_help
    def facts(self, video_id: str) -> dict[str, object]:
        """What the frame source said of this video when it was read (size, sha256, …); empty when it failed.

        Of several segments the newest that is committed counts. Raises CacheMissing when there is none.
        """
        for segment in reversed(self.plan.segments_of(video_id)):
            number = segment.start // self.shard_frames
            shard = self._shards.get(number) if isinstance(self.path, ObjectPath) else None  # spares a request a video
            shard = shard or self.shard(number)
            if shard is not None:
                records = read_records(self.layout, shard.file)
                return dict(next(r.facts for r in records if r.video_id == video_id))
        raise CacheMissing(f"{self.path}/{self.modality} holds nothing of video {video_id!r}.\nExtract with:")

    @_with_help
    def stats(self) -> FeatureStats:
        """Mean and variance of every element over all committed frames, from the shard footers alone.

        Raises:
            ValueError: the frames are too large for footers to hold statistics (CLIP tokens).
            CacheMissing: no frame is committed.
        """
        if not self.layout.has_stats:
            raise ValueError(f"{self.modality!r} has no statistics: its frames are {self.layout.frame_bytes} bytes")
        moments = Moments.zero(self.spec.frame_shape)
        for shard in self.shards(range(self.plan.num_shards)).values():
            if shard is not None:
                moments = moments.plus(read_stats(self.layout, shard.file))
        if not moments.count:
            raise CacheMissing(f"{self.path}/{self.modality} holds no frame yet.\nExtract with:")
        return FeatureStats(moments.count, moments.mean, moments.m2 / moments.count)

    # --- numbers in

    @_with_help
    def write_task(self, task: Task, produce: Callable[[Segment], SegmentResult[Array]]) -> TaskReport:
        """Write the shards of one task of ``plan.tasks()`` and commit them; nothing is done when that was done before.

        ``produce`` is called for one video at a time. A ``SegmentFailed`` from it or its iterator, or a non-finite
        feature, marks that video as failed; the shard is committed all the same. Any other error ends the task with
        nothing published. A task with ``retry`` set copies the good videos and produces only the failed ones.

        Raises:
            ValueError: ``produce`` gave a wrong dtype, shape or number of frames, or facts that are not JSON.
            OSError: the disk is full or not writable; the partial files are gone and what was committed is unharmed.
        """
        return write.write_single(self, task, produce)

    @_with_help
    def finalize(self) -> None:
        """Write the ``videos`` index of the whole store (all modalities) from plan and footers, for plain Zarr readers.

        It is derived data: nothing here reads it to decide what is there, and it can be deleted and made again.
        """
        with files.locked(self.path):
            status = {}
            for modality in metadata.list_modalities(self.path):
                other = FeatureStore.open(self.path, modality)
                metadata.grow_array(other.layout.info, other.plan.num_shards)
                status[modality] = other.status_codes()
            write_index(self.path, index_arrays(self.plan, status))


def _segment_status(segment: Segment, shards: Sequence[Shard | None]) -> VideoStatus | None:
    if any(shard is None for shard in shards):
        return None
    records = [r for shard in shards if shard is not None for r in shard.records if r.video_id == segment.video_id]
    failed = next((record for record in records if not record.ok), None)
    if failed is not None:
        return VideoStatus(False, failed.kind, failed.reason, 0)
    return VideoStatus(True, frames=len(segment))


def _check_frame_rule(store: StorePath, modality: str, spec: FeatureSpec, shard_frames: int) -> None:
    # Modalities share (video, frame index) as their key, so an index must mean the same picture in all of them.
    for other in metadata.list_modalities(store):
        rule = metadata.read_array(store, other, shard_frames).spec.frame_rule
        if other != modality and rule != spec.frame_rule:
            raise CacheMismatch.between(
                f"{store / other}, which shares its frames,", {"frame_rule": (rule, spec.frame_rule)}
            )
