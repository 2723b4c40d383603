"""Making damaged shards anew, and nothing else.

A damaged file stays where it is until its replacement is complete, so there is never less to read than before. Videos
whose frames all fit their checksums are copied from it; only the others are produced again, and only from the very file
that they were extracted from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema import files, metadata
from cache_schema.errors import CacheCorrupt, CacheError, SegmentFailed
from cache_schema.index import STATUS, read_index
from cache_schema.plan import Part, Segment
from cache_schema.shard import Record, ShardWriter, pread, read_records
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, as_stored, close_features, refuse_non_finite

SAME_FILE = ("size", "sha256")  # the facts that say which file a video's frames came from

Array = npt.NDArray[Any]
Produce = Callable[[Segment], SegmentResult[Mapping[str, Array]]]


@dataclass(frozen=True)
class ShardRepair:
    """What became of one damaged shard; ``reason`` says why it was left as it is."""

    modality: str
    shard: int
    repaired: bool
    copied: int = 0  # videos whose frames were sound
    produced: int = 0  # videos that were made again
    reason: str = ""


class _Refused(Exception):
    """The shard stays as it is."""


def repair_shard(
    store: FeatureStore, number: int, produce: Produce, *, changed: Collection[str] = frozenset()
) -> ShardRepair:
    """Make one shard anew and put it in the place of the damaged file, or of none.

    Of a long video's run only this shard is written, and only its frames are asked for.

    Args:
        produce: features of every modality for a segment (``write_task``).
        changed: videos whose file was replaced since: made from the file of today, also where their frames are sound.

    Raises:
        ValueError: ``produce`` gave a wrong dtype, shape or number of frames.
        OSError: the disk is full or not writable; the damaged file is still there.
    """
    sound = _sound_records(store, number)
    writer = ShardWriter(store.layout, number)
    copied = produced = 0
    try:
        for part in store.plan.parts(number):
            writer.begin(part)
            record = sound.get(part.slot)
            if record is not None and part.segment.video_id not in changed:
                _copy(store, number, record, writer)
                copied += 1
            else:
                _make(store, part, writer, produce, changed)
                produced += 1
        writer.finish()
        files.publish_or_replace(writer.partial, store.layout.info.shard_file(number))
    except _Refused as why:
        return ShardRepair(store.modality, number, False, reason=str(why))
    finally:
        writer.discard()
    return ShardRepair(store.modality, number, True, copied, produced)


# --- what is still sound


def _sound_records(store: FeatureStore, number: int) -> dict[int, Record]:
    """Slot -> record of the good videos whose frames all fit their checksums; none where the shard is unreadable."""
    try:
        shard = store.shard(number)
    except CacheError:
        return {}
    if shard is None:
        return {}
    records = read_records(store.layout, shard.file)
    sound = store.layout.is_sound
    return {r.slot: r for r in records if r.ok and all(sound(chunk) for chunk in _chunks(store, number, r))}


def _chunks(store: FeatureStore, number: int, record: Record) -> Iterator[bytes]:
    layout = store.layout
    descriptor = files.open_regular(layout.info.shard_file(number))
    try:
        for at in range(len(record.frame_index)):
            yield pread(descriptor, layout.chunk_bytes, (record.slot + at) * layout.stride)
    finally:
        os.close(descriptor)


def _copy(store: FeatureStore, number: int, record: Record, writer: ShardWriter) -> None:
    for chunk in _chunks(store, number, record):
        writer.append(np.frombuffer(chunk[:-4], store.layout.row_dtype).reshape(1, *store.layout.row_shape))
    writer.end(record.facts)


# --- what is made again


def _make(store: FeatureStore, part: Part, writer: ShardWriter, produce: Produce, changed: Collection[str]) -> None:
    video = part.segment.video_id
    before = _recorded(store, part.segment)
    if before is not None and not before.ok and len(part.segment) > part.count:
        writer.fail(before.kind, before.reason)  # the other shards of the run say so, and all must agree
        return
    # Facts lie with the first part of a video and tell of all its frames, so for that one all are asked for.
    wanted = part.segment if part.offset == 0 else Segment(video, part.frame_index, part.segment.start + part.offset)
    try:
        facts = _write(store, part, writer, produce(wanted))
    except SegmentFailed as error:
        if _was_good(store, part.segment, before):
            raise _Refused(
                f"video {video!r} was good and cannot be extracted now ({error.reason}). Bring its file back, or "
                f"remove the shard and extract again to go on without it"
            ) from error
        writer.fail(error.kind, error.reason)
        return
    if before is not None and video not in changed and _other_file(before.facts, facts):
        raise _Refused(
            f"video {video!r} is another file now than the one it was extracted from. Bring that one back, or make all "
            f"its features again with repair --sources"
        )
    writer.end(facts if part.offset == 0 else {})


def _write(
    store: FeatureStore, part: Part, writer: ShardWriter, result: SegmentResult[Mapping[str, Array]]
) -> Mapping[str, object]:
    """Append the part's frames; what comes after them is checked and dropped. Returns the facts."""
    done = 0
    try:
        for batch in result.features:
            array = batch[store.modality]
            if array.dtype != np.dtype(store.spec.feature_dtype) or array.shape[1:] != store.spec.frame_shape:
                raise ValueError(f"{store.modality}: a batch is {array.dtype} {list(array.shape)}")
            if not len(array):
                continue
            refuse_non_finite(array, part.segment.frame_index[part.offset + done :][: len(array)])
            mine = array[: max(0, part.count - done)]
            if len(mine):
                writer.append(as_stored(store, mine))
            done += len(array)
    finally:
        close_features(result.features)
    if done < part.count:
        raise ValueError(f"the producer gave {done} of the {part.count} frames of video {part.segment.video_id!r}")
    facts = dict(result.facts())
    files.canonical_json(facts)
    return facts


def _recorded(store: FeatureStore, segment: Segment) -> Record | None:
    """What sound shards of any modality say of the segment: a good record with facts, else our own failed one."""
    failed: Record | None = None
    for modality in [store.modality, *(m for m in metadata.list_modalities(store.path) if m != store.modality)]:
        try:
            other = store if modality == store.modality else FeatureStore.open(store.path, modality)
            for number in other.plan.task_of(segment.start // store.shard_frames).shards:
                if other.shard(number) is None:
                    continue
                for record in read_records(other.layout, other.layout.info.shard_file(number)):
                    if record.video_id != segment.video_id:
                        continue
                    if record.ok and record.facts:
                        return record
                    if not record.ok and modality == store.modality:
                        failed = record
        except (CacheError, FileNotFoundError):
            continue
    return failed


def _was_good(store: FeatureStore, segment: Segment, before: Record | None) -> bool:
    """Whether the video is known to have been good in this modality."""
    try:
        index = read_index(store.path, store.plan, store.modality)
    except CacheCorrupt:
        index = None
    at = [s.start for s in store.plan.segments].index(segment.start)
    status = index[f"status/{store.modality}"] if index is not None else np.empty(0, np.uint8)
    if at < len(status):
        return bool(status[at] == STATUS["ok"])
    return before is not None and before.ok


def _other_file(before: Mapping[str, object], now: Mapping[str, object]) -> bool:
    return any(name in before and before[name] != now.get(name) for name in SAME_FILE)
