"""Checks of one modality of a store. Each gives a list of problems; an empty list is a clean and complete store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache_schema import files
from cache_schema.errors import CacheCorrupt, CacheMismatch
from cache_schema.index import STATUS, index_arrays, read_index
from cache_schema.shard import Shard, pread
from cache_schema.store import FeatureStore

Index = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``kind``: ``missing`` (a planned shard is not there: extraction is unfinished), ``deleted`` (it was there when
    the ``videos`` index was made), ``unplanned`` (a file where no shard belongs), ``padding`` (bytes between frames
    are not zero), ``videos_index``, ``newer_format``, or the ``kind`` of a ``CacheCorrupt`` (``truncated``, ``frame``).
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


def full(store: FeatureStore) -> list[Problem]:
    """``quick``, and the crc32c of every frame and every byte between frames: finds any flipped bit of a shard."""
    found = quick(store)
    not_sound = {problem.shard for problem in found}
    for number in range(store.plan.num_shards):
        shard = None if number in not_sound else store.shard(number)
        if shard is not None:
            found += _frames(store, number, shard)
    return found


def _frames(store: FeatureStore, number: int, shard: Shard) -> Iterator[Problem]:
    layout = store.layout
    used = int(np.flatnonzero(shard.present)[-1]) + 1 if shard.present.any() else 0
    descriptor = files.open_regular(shard.file)
    try:
        for slot in range(used):
            raw = memoryview(pread(descriptor, layout.stride, slot * layout.stride))
            frame_bytes = layout.frame_bytes if shard.present[slot] else 0
            if frame_bytes and crc32c(raw[:frame_bytes]) != shard.crcs[slot]:
                record = shard.record_at(slot)
                frame = record.frame_index[slot - record.slot]
                message = f"{shard.file}: frame {frame} of video {record.video_id!r} does not fit its crc32c"
                yield Problem(number, record.video_id, frame, "frame", message)
            if np.frombuffer(raw[frame_bytes:], np.uint8).any():
                message = f"{shard.file}: the unused bytes of slot {slot} are not zero"
                yield Problem(number, None, None, "padding", message)
    finally:
        os.close(descriptor)


def _absent(store: FeatureStore, number: int, *, deleted: bool) -> Problem:
    file = store.layout.info.shard_file(number)
    what = "was committed and is gone" if deleted else "is planned and not extracted yet"
    message = f"{file} {what}. It is made by:\n  {store.help_command}"
    return Problem(number, None, None, "deleted" if deleted else "missing", message)


def _unplanned(store: FeatureStore) -> list[Problem]:
    folder = store.layout.info.folder / "c"
    planned = {str(number) for number in range(store.plan.num_shards)}
    strangers = sorted(set(files.names_in(folder)) - planned)
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
