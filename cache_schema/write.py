"""Writing one task: features stream from a producer into the shards of one or several modalities."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.errors import SegmentFailed
from cache_schema.plan import Part, Segment, Task
from cache_schema.quantize import TooInexact
from cache_schema.report import TaskReport, VideoStatus
from cache_schema.shard import Record, Shard, ShardWriter, frame_corrupt, pread, read_footer, read_records
from cache_schema.store import FeatureStore

Array = npt.NDArray[Any]
Batch = TypeVar("Batch")
# Bits of +inf and of -inf: what is at least that, read as a signed and an unsigned integer, is infinite or NaN.
_INFINITY = {"float16": ("i2", 0x7C00, "u2", 0xFC00), "float32": ("i4", 0x7F800000, "u4", 0xFF800000)}


PIECE_BYTES = 256 << 10  # looked at, checked and written together


def _no_facts() -> dict[str, object]:
    return {}


@dataclass
class SegmentResult(Generic[Batch]):
    """What a producer gives for one segment.

    Attributes:
        features: batches in the order of ``segment.frame_index``: mappings modality -> array [b, *frame_shape].
            May raise ``SegmentFailed``.
        facts: called after the last batch; a JSON object about the source that is stored in the footer. It must not
            depend on when or where it runs.
    """

    features: Iterator[Batch]
    facts: Callable[[], Mapping[str, object]] = field(default=_no_facts)


def write_task(
    stores: Mapping[str, FeatureStore],
    task: Task,
    produce: Callable[[Segment], SegmentResult[Mapping[str, Array]]],
) -> dict[str, TaskReport]:
    """Write the shards of one task of ``plan.tasks()`` in these modalities of one store, and commit them.

    ``produce`` is called for one video at a time. A ``SegmentFailed`` from it or its iterator, or a non-finite feature,
    marks that video as failed; the shard is committed all the same. Any other error ends the task with nothing
    published. A task with ``retry`` set copies the good videos and produces only the failed ones.

    Each modality commits for itself: one that is already committed is left alone (extra keys in a batch are ignored),
    and a non-finite feature fails the video only where it occurs.

    Raises:
        ValueError: ``produce`` gave a wrong dtype, shape or number of frames, or facts that are not JSON.
        OSError: the disk is full or not writable; the partial files are gone and what was committed is unharmed.
    """
    writers: dict[str, _ModalityWriter] = {}
    try:
        for name, store in stores.items():
            if not _is_done(store, task):
                writers[name] = _ModalityWriter(store, task)
        for segment in task.segments if writers else ():
            _write_segment(writers, segment, produce)
        return {
            name: writers[name].publish() if name in writers else TaskReport(name, task.shards, skipped=True)
            for name in stores
        }
    finally:
        for writer in writers.values():
            writer.discard()


def _is_done(store: FeatureStore, task: Task) -> bool:
    """Whether nothing is to be written. Raises ValueError when the task is not one of the store's plan."""
    plan = store.plan
    if task.shards[-1] >= plan.num_shards or plan.task_of(task.shards[0]) != task:
        raise ValueError(f"the task of shards {task.shards} is not in the plan of {store.path}")
    shards = [store.shard(number) for number in task.shards]
    return all(shard is not None and not (task.retry and shard.failed) for shard in shards)


def _write_segment(
    writers: Mapping[str, _ModalityWriter],
    segment: Segment,
    produce: Callable[[Segment], SegmentResult[Mapping[str, Array]]],
) -> None:
    active = {name: writer for name, writer in writers.items() if writer.begin(segment)}
    if not active:
        return
    features: Iterator[Mapping[str, Array]] = iter(())
    try:
        result = produce(segment)
        features = result.features
        for batch in features:
            for name in list(active):
                if name not in batch:
                    raise ValueError(f"the producer gave no {name!r} for video {segment.video_id!r}")
                try:
                    active[name].append(batch[name])
                except SegmentFailed as error:
                    active.pop(name).fail(error)
            if not active:
                return
        for writer in active.values():
            writer.check_complete()
        facts = dict(result.facts())
        files.canonical_json(facts)  # ValueError here, before anything is finished
        for writer in active.values():
            writer.end(facts)
    except SegmentFailed as error:
        for writer in active.values():
            writer.fail(error)
    finally:
        close_features(features)


def close_features(features: Iterator[Any]) -> None:
    """End an iterator that may not have been read to its end."""
    close = getattr(features, "close", None)  # generators have one: it ends a decoder that is not read to the end
    if close is not None:
        close()


class _ModalityWriter:
    """One modality's side of a task: checks batches, spreads them over the task's shards, and publishes those."""

    def __init__(self, store: FeatureStore, task: Task) -> None:
        self.store, self.task = store, task
        self.old = {number: store.shard(number) for number in task.shards}
        self.shards = {number: ShardWriter(store.layout, number) for number in task.shards}
        self.report_videos = self.report_frames = 0
        self.failed: dict[str, VideoStatus] = {}
        self._all_parts = [part for number in task.shards for part in store.plan.parts(number)]
        self._segment = task.segments[0]
        self._parts: list[Part] = []
        self._at = self._filled = 0  # current part, and frames in it
        self._piece = max(1, PIECE_BYTES // store.layout.frame_bytes)

    def begin(self, segment: Segment) -> bool:
        """Start a video. False when its good frames were copied from the committed shard and nothing is to produce."""
        self._segment, self._at, self._filled = segment, 0, 0
        self._parts = [part for part in self._all_parts if part.segment.start == segment.start]
        for part in self._parts:
            self.shards[part.shard].begin(part)
        return not self._copy()

    def append(self, batch: Array) -> None:
        """Write a batch [b, *frame_shape]. Raises ValueError (a programming error) or SegmentFailed (non-finite)."""
        spec, segment = self.store.spec, self._segment
        if batch.dtype != np.dtype(spec.feature_dtype) or batch.shape[1:] != spec.frame_shape:
            shape = ", ".join(map(str, spec.frame_shape))
            raise ValueError(
                f"{self.store.modality}: a batch must be {spec.feature_dtype} [b, {shape}], "
                f"not {batch.dtype} {list(batch.shape)}"
            )
        done = sum(part.count for part in self._parts[: self._at]) + self._filled
        if done + len(batch) > len(segment):
            raise ValueError(f"the producer gave more than the {len(segment)} frames of video {segment.video_id!r}")
        if not len(batch):
            return
        # In pieces that stay in the processor's cache from the first look at them to the last.
        for first in range(0, len(batch), self._piece):
            piece, at = batch[first : first + self._piece], done + first
            refuse_non_finite(piece, segment.frame_index[at : at + len(piece)])
            self._write(as_stored(self.store, piece))

    def _write(self, frames: Array) -> None:
        while len(frames):
            part = self._parts[self._at]
            taken = frames[: part.count - self._filled]
            self.shards[part.shard].append(taken)
            self._filled += len(taken)
            frames = frames[len(taken) :]
            if self._filled == part.count:
                self._at, self._filled = self._at + 1, 0
                if len(self._parts) > 1:
                    self.shards[part.shard].suspend()

    def check_complete(self) -> None:
        """Raise ValueError when the producer stopped early without saying that the video failed."""
        if self._at < len(self._parts):
            done = sum(part.count for part in self._parts[: self._at]) + self._filled
            video, count = self._segment.video_id, len(self._segment)
            raise ValueError(f"the producer gave {done} of the {count} frames of video {video!r}")

    def end(self, facts: Mapping[str, object]) -> None:
        """The video is complete. The facts of a long one are kept in the first shard of its run."""
        for part in self._parts:
            self.shards[part.shard].end(facts if part.offset == 0 else {})
        self.report_videos += 1
        self.report_frames += len(self._segment)

    def fail(self, error: SegmentFailed) -> None:
        """The video is quarantined: its slots stay empty in every shard."""
        for part in self._parts:
            self.shards[part.shard].fail(error.kind, error.reason)
        self.failed[self._segment.video_id] = VideoStatus(False, error.kind, error.reason)

    def publish(self) -> TaskReport:
        """Finish all shards, then commit them in order."""
        records = {number: writer.finish() for number, writer in self.shards.items()}
        ours = [self._publish_shard(number, records[number]) for number in self.task.shards]
        if not any(ours):
            return TaskReport(self.store.modality, self.task.shards, skipped=True, failed=self.failed)
        return TaskReport(
            self.store.modality, self.task.shards, False, self.report_videos, self.report_frames, self.failed
        )

    def discard(self) -> None:
        """Remove whatever partial files are left."""
        for writer in self.shards.values():
            writer.discard()

    def _publish_shard(self, number: int, records: Sequence[Record]) -> bool:
        partial, old = self.shards[number].partial, self.old[number]
        final = self.store.layout.info.shard_file(number)
        if old is None:
            published = files.publish(partial, final)
            self.store.shard(number)  # whoever published it, it must be sound
            return published
        current = self.store.shard(number)
        if current is not None:
            changed = current.identity != old.identity
            if changed and len(current.failed) <= sum(not record.ok for record in records):
                return False  # another retry was at least as lucky
            if read_footer(self.store.layout, partial) == read_footer(self.store.layout, final):
                return False
        # Of an object store only in the place of the version that was looked at. Of two retries that replace a file at
        # the same moment the later wins; both are whole.
        return files.replace(partial, final if current is None else current.file)

    def _copy(self) -> bool:
        """Copy the segment from the committed shards when it is good in all of them."""
        if not self.task.retry:
            return False
        sources = [self._good_record(part) for part in self._parts]
        if any(source is None for source in sources):
            return False
        for part, source in zip(self._parts, sources, strict=True):
            if source is not None:
                shard, record = source
                self._copy_frames(part, shard, record)
                self.shards[part.shard].end(record.facts)
        return True

    def _good_record(self, part: Part) -> tuple[Shard, Record] | None:
        shard = self.old[part.shard]
        if shard is None or not shard.present[part.slot]:
            return None
        records = read_records(self.store.layout, shard.file)
        return shard, next(record for record in records if record.slot == part.slot)

    def _copy_frames(self, part: Part, shard: Shard, record: Record) -> None:
        layout, writer = self.store.layout, self.shards[part.shard]
        descriptor = files.open_regular(shard.file)
        try:
            for number, frame in enumerate(record.frame_index):
                chunk = pread(descriptor, layout.chunk_bytes, (part.slot + number) * layout.stride)
                if not layout.is_sound(chunk):
                    raise frame_corrupt(shard, record.video_id, frame)
                writer.append(np.frombuffer(chunk[:-4], layout.row_dtype).reshape(1, *layout.row_shape))
        finally:
            os.close(descriptor)


def as_stored(store: FeatureStore, batch: Array) -> Array:
    """Frames [b, *frame_shape] as they lie in a shard: themselves, or int8 with scales. Raises SegmentFailed."""
    scale = store.layout.info.channel_scale
    if scale is None:
        return batch
    try:
        return scale.quantize(batch)
    except TooInexact as error:
        raise SegmentFailed("int8_range", str(error)) from error


def refuse_non_finite(batch: Array, frame_index: Sequence[int]) -> None:
    """Raise SegmentFailed, naming the frame, when a feature of the batch [b, *frame_shape] is infinite or NaN."""
    signed, positive, unsigned, negative = _INFINITY[batch.dtype.name]
    bits = np.ascontiguousarray(batch).view(signed)
    if bits.max() >= positive or bits.view(unsigned).max() >= negative:  # 5 times as fast as np.isfinite on float16
        at = int(np.argmin(np.isfinite(batch).reshape(len(batch), -1).all(axis=1)))
        infinite = bool(np.isinf(batch[at]).any())
        hint = "; beyond the range of float16 (65504): store float32" if infinite and batch.dtype == np.float16 else ""
        what = "infinite" if infinite else "NaN"
        raise SegmentFailed("non_finite", f"frame {frame_index[at]} has a feature that is {what}{hint}")
