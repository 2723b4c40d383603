"""Checks of one modality of a store. Each gives a list of problems; an empty list is a clean and complete store.

``quick`` and ``full`` look at the store alone. ``semantic`` makes features again, ``sources`` looks at the videos.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema import files, metadata
from cache_schema.errors import CacheCorrupt, CacheMismatch, SegmentFailed
from cache_schema.index import STATUS, index_arrays, read_index
from cache_schema.objects import StorePath
from cache_schema.plan import Segment
from cache_schema.report import SourceFile
from cache_schema.shard import Shard, pread, read_records
from cache_schema.store import FeatureStore
from cache_schema.write import SegmentResult, as_stored, close_features

NO_DAMAGE = ("missing", "newer_format")  # of the kinds that name a shard: extraction, or another program, helps

Index = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``kind``: ``missing`` (a planned shard is not there: extraction is unfinished), ``deleted`` (it was there when
    the ``videos`` index was made), ``unplanned`` (a file where no shard belongs), ``lost`` (a folder holds shards, and
    the zarr.json that makes it an array is gone), ``padding`` (bytes between frames are not zero), ``videos_index``,
    ``newer_format``, ``differs`` (made again, a frame comes out otherwise), ``source_changed``, ``source_gone``, or the
    ``kind`` of a ``CacheCorrupt`` (``truncated``, ``frame``).
    """

    shard: int | None
    video_id: str | None
    frame_index: int | None
    kind: str
    message: str


def quick(store: FeatureStore) -> list[Problem]:
    """Footers and indices against the plan, the files and the ``videos`` index; no frame is read."""
    found: list[Problem] = []
    index: Index | None = None
    try:
        index = read_index(store.path, store.plan, store.modality)
    except CacheCorrupt as error:
        found.append(Problem(None, None, None, "videos_index", str(error.with_help(store.help_command))))
    was_there = _indexed_shards(store, index or {})
    for number in range(store.plan.num_shards):
        try:
            if store.shard(number) is None:
                found.append(_absent(store, number, deleted=number in was_there))
        except CacheCorrupt as error:
            found.append(Problem(number, error.video_id, error.frame_index, error.kind, str(error)))
        except CacheMismatch as error:
            found.append(Problem(number, None, None, "newer_format", str(error)))
    found += _unplanned(store)
    if index is not None and not found and not _index_fits(store, index):
        message = f"{store.path / 'videos'} does not fit the shards. It is made again by:\n  {store.help_command}"
        found.append(Problem(None, None, None, "videos_index", message))
    return found


def lost(store: StorePath) -> list[tuple[str, Problem]]:
    """The modalities that a store says it holds, in shards or in its index, and whose zarr.json is gone."""
    return [
        (
            name,
            Problem(
                None,
                None,
                None,
                "lost",
                f"{store / name / 'zarr.json'} is gone, and {why}. It is made again by its "
                "extraction, which keeps every shard that was made with the same settings",
            ),
        )
        for name, why in metadata.lost_modalities(store).items()
    ]


def full(store: FeatureStore) -> list[Problem]:
    """``quick``, and the crc32c of every frame and every byte between frames: finds any flipped bit of a shard."""
    found = quick(store)
    not_sound = {problem.shard for problem in found}
    for number in range(store.plan.num_shards):
        shard = None if number in not_sound else store.shard(number)
        if shard is not None:
            found += files.fresh(lambda: list(_frames(store, number, shard)))  # noqa: B023
    return found


def damaged_shards(problems: list[Problem]) -> list[int]:
    """The shards that ``repair`` must make anew, in order."""
    return sorted({p.shard for p in problems if p.shard is not None and p.kind not in NO_DAMAGE})


def semantic(
    store: FeatureStore,
    produce: Callable[[Segment], SegmentResult[Mapping[str, npt.NDArray[Any]]]],
    *,
    frames: int,
    seed: int = 0,
    tolerance: float = 0.01,
) -> tuple[list[Problem], float]:
    """Make a random sample of frames again and compare: finds what no checksum can, such as a library that changed.

    Args:
        produce: features of every modality for any frames of a video, as extraction makes them.
        frames: how many frames, at most.
        tolerance: largest relative error |made again - stored| / |stored| (L2 over a frame) that is no problem.

    Returns:
        The problems, and the largest relative error met.
    """
    found: list[Problem] = []
    worst = 0.0
    for video, index in _sample(store, frames, seed).items():
        try:
            stored = store.read(video, index, verify=True).astype(np.float64).reshape(len(index), -1)
            again = _made_again(store, produce(Segment(video, index, 0))).reshape(len(index), -1)
        except CacheCorrupt as error:
            found.append(Problem(None, video, error.frame_index, error.kind, str(error)))
            continue
        except SegmentFailed as failed:
            found.append(Problem(None, video, None, "source_gone", f"video {video!r} cannot be read: {failed.reason}"))
            continue
        size = np.linalg.norm(stored, axis=1)
        off = np.linalg.norm(again - stored, axis=1) / np.where(size > 0, size, 1.0)
        worst = max(worst, float(off.max()))
        for frame, relative in zip(index, off.tolist(), strict=True):
            if not relative <= tolerance:
                message = f"frame {frame} of video {video!r}: made again, it differs by {relative:.3g} of its length"
                found.append(Problem(None, video, frame, "differs", message))
    return found, worst


def _sample(store: FeatureStore, frames: int, seed: int) -> dict[str, tuple[int, ...]]:
    good = [s for s, status in zip(store.plan.segments, store.segment_status(), strict=True) if status and status.ok]
    ends = np.cumsum([len(segment) for segment in good])
    total = int(ends[-1]) if good else 0
    sample: dict[str, list[int]] = {}
    for at in np.sort(np.random.default_rng(seed).choice(total, min(frames, total), replace=False)):
        number = int(np.searchsorted(ends, at, side="right"))
        before = int(ends[number - 1]) if number else 0
        sample.setdefault(good[number].video_id, []).append(good[number].frame_index[int(at) - before])
    return {video: tuple(sorted(index)) for video, index in sample.items()}


def _made_again(store: FeatureStore, result: SegmentResult[Mapping[str, npt.NDArray[Any]]]) -> npt.NDArray[np.float64]:
    try:
        made = np.concatenate([batch[store.modality] for batch in result.features])
        scale = store.layout.info.channel_scale
        if scale is not None:  # what int8 loses is no difference
            scale.dequantize(as_stored(store, made), made)
        return made.astype(np.float64)
    finally:
        close_features(result.features)


def sources(store: FeatureStore, look: Callable[[str], SourceFile | None], *, hashed: bool = False) -> list[Problem]:
    """Whether the videos are still the files that the features came from, by what the footers say of them.

    Sizes are compared, and the sha256 of a file that was modified after its shard was written; with ``hashed`` the
    sha256 of every file. The two times only decide what is hashed: a wrong clock costs time, or needs ``hashed``.

    Args:
        look: the file of a video as it is now; None where there is none.
    """
    found: list[Problem] = []
    for number in range(store.plan.num_shards):
        shard = store.shard(number)
        if shard is None:
            continue
        written = files.modified(shard.file)
        for record in read_records(store.layout, shard.file):
            if record.facts and (problem := _source(record.video_id, record.facts, look, written, hashed)):
                found.append(problem)
    return found


def _source(
    video: str, facts: Mapping[str, object], look: Callable[[str], SourceFile | None], written: float, hashed: bool
) -> Problem | None:
    now = look(video)
    if now is None:
        return Problem(None, video, None, "source_gone", f"video {video!r} is not in data.videos any more")
    if now.size != facts.get("size"):
        what = f"had {facts.get('size')} bytes when it was extracted and has {now.size} now"
    elif (hashed or now.modified > written) and now.sha256() != facts.get("sha256"):
        what = "has other bytes now than when it was extracted"
    else:
        return None
    return Problem(None, video, None, "source_changed", f"video {video!r} {what}")


def _frames(store: FeatureStore, number: int, shard: Shard) -> Iterator[Problem]:
    descriptor = files.open_regular(shard.file)
    try:
        yield from problems_of_frames(store, number, shard, descriptor)
    finally:
        os.close(descriptor)


def problems_of_frames(store: FeatureStore, number: int, shard: Shard, descriptor: int) -> Iterator[Problem]:
    """Every frame against its crc32c, and every byte between frames against zero, in an open file of the shard."""
    layout = store.layout
    used = int(np.flatnonzero(shard.present)[-1]) + 1 if shard.present.any() else 0
    sums, sound = 0, True
    for slot in range(used):
        raw = memoryview(pread(descriptor, layout.stride, slot * layout.stride))
        chunk_bytes = layout.chunk_bytes if shard.present[slot] else 0
        if chunk_bytes and not layout.is_sound(raw[:chunk_bytes]):
            sound = False
            record = shard.record_at(slot)
            frame = record.frame_index[slot - record.slot]
            message = f"{shard.file}: frame {frame} of video {record.video_id!r} does not fit its crc32c"
            yield Problem(number, record.video_id, frame, "frame", message)
        sums = crc32c(raw[layout.frame_bytes : chunk_bytes], sums) if chunk_bytes else sums
        if np.frombuffer(raw[chunk_bytes:], np.uint8).any():
            message = f"{shard.file}: the unused bytes of slot {slot} are not zero"
            yield Problem(number, None, None, "padding", message)
    if sound and sums != shard.sums:
        message = f"{shard.file}: its frames are sound, but not those that were written, or in another order"
        yield Problem(number, None, None, "frames", message)


def _absent(store: FeatureStore, number: int, *, deleted: bool) -> Problem:
    file = store.layout.info.shard_file(number)
    what = "was committed and is gone" if deleted else "is planned and not extracted yet"
    message = f"{file} {what}. It is made by:\n  {store.help_command}"
    return Problem(number, None, None, "deleted" if deleted else "missing", message)


def _unplanned(store: FeatureStore) -> list[Problem]:
    folder, info = store.layout.info.folder, store.layout.info
    planned = {info.shard_name(number) for number in range(store.plan.num_shards)}
    strangers = sorted({name for name in files.names_in(folder) if name.startswith("c.")} - planned)
    return [
        Problem(None, None, None, "unplanned", f"{folder / name} is not in the plan: it was copied here by mistake")
        for name in strangers
    ]


def _indexed_shards(store: FeatureStore, index: Index) -> set[int]:
    """The shards that hold a segment which the index calls committed."""
    if not index or not len(index["start"]) == len(index["length"]) == len(index[f"status/{store.modality}"]):
        return set()  # no index, one older than the modality, or one that contradicts itself (reported below)
    start, length, status = index["start"], index["length"], index[f"status/{store.modality}"]
    there = status != STATUS["not committed"]
    first, last = start[there] // store.shard_frames, (start + length - 1)[there] // store.shard_frames
    return {number for a, b in zip(first.tolist(), last.tolist(), strict=True) for number in range(a, b + 1)}


def _index_fits(store: FeatureStore, index: Index) -> bool:
    """Whether the index is true as far as it goes: it may be older than the last videos, but it may not contradict."""
    for name, now in index_arrays(store.plan, {store.modality: store.status_codes()}).items():
        held = index[name]
        same = held == now[: len(held)]
        if name.startswith("status/"):
            same |= held == STATUS["not committed"]
        if not same.all():
            return False
    return True
