"""A whole store copied shard by shard, from a folder or an object store into either: what is there already is skipped.

Any tool that copies files makes a sound store too (FORMAT.md); this one checks every frame on its way, publishes each
shard whole, and goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cache_schema import files, metadata
from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheMissing
from cache_schema.objects import ObjectPath, StorePath
from cache_schema.planfile import generations
from cache_schema.shard import Shard, pread, read_footer
from cache_schema.store import FeatureStore
from cache_schema.verify import problems_of_frames

PIECE = 8 << 20
Progress = Callable[[int, int, str], None]


@dataclass
class CopiedModality:
    """Of the committed shards of one modality: how many were copied, and how many the destination had before."""

    modality: str
    copied: int = 0
    present: int = 0
    bytes: int = 0  # copied
    damaged: list[str] = field(default_factory=list)  # what is wrong with each shard that was not copied


def copy_store(
    source: StorePath, target: StorePath, *, dry_run: bool = False, progress: Progress = lambda *_: None
) -> list[CopiedModality]:
    """Copy plan, arrays and committed shards of a store, then write the index of the copy.

    A shard of the destination stays where it is sound and holds no more failed videos than that of the source. A
    damaged shard of the source is not copied but named in the result.

    Raises:
        CacheMissing: the source holds no features.
        CacheMismatch: the destination is a store with another plan, or with other settings for one of the modalities.
        OSError: the disk is full or not writable; what was copied before stays.
    """
    names = metadata.list_modalities(source) if metadata.read_group(source) else []
    if not names:
        raise CacheMissing(f"{source} holds no features yet.")
    stores = [FeatureStore.open(source, name) for name in names]
    _check_plan(source, target)
    if not dry_run:
        _copy_plan(source, target)
    done, total = 0, sum(store.plan.num_shards for store in stores)
    results = []
    for store in stores:
        copy = _target(store, target, dry_run=dry_run)
        result = CopiedModality(store.modality)
        for number in range(store.plan.num_shards):
            progress(done, total, f"{store.modality}, shard {number}")
            try:
                _copy_shard(store, copy, number, result, dry_run=dry_run)
            except CacheCorrupt as error:
                result.damaged.append(str(error).partition("\n")[0])
            done += 1
        results.append(result)
    progress(done, total, "copied")
    if not dry_run:
        FeatureStore.open(target, names[0]).finalize()
    return results


def _check_plan(source: StorePath, target: StorePath) -> None:
    """Raise CacheMismatch unless every growth that both plans have is the same."""
    if not (target / "zarr.json").exists():
        return
    frames = metadata.read_group(source), metadata.read_group(target)
    if frames[0] != frames[1]:
        raise CacheMismatch.between(str(target), {"shard_frames": (frames[1], frames[0])})
    for name in sorted(set(generations(source)) & set(generations(target))):
        if _content(source / "plan" / name) != _content(target / "plan" / name):
            raise CacheMismatch(f"{target} has other videos in its plan than {source}. Copy to another place.")


def _copy_plan(source: StorePath, target: StorePath) -> None:
    metadata.create_group(target, metadata.read_group(source))
    for name in generations(source):
        files.publish_bytes(target / "plan" / name, _content(source / "plan" / name))


def _content(file: StorePath) -> bytes:
    return files.read_bytes(file, files.MAX_PLAN_BYTES)


def _target(store: FeatureStore, target: StorePath, *, dry_run: bool) -> FeatureStore | None:
    """The same modality of the destination; None where it has none and none is to be made."""
    if (target / store.modality / "zarr.json").exists():
        FeatureStore.open(target, store.modality, store.spec)
    elif dry_run:
        return None
    return FeatureStore.create(
        target,
        store.modality,
        store.spec,
        shard_frames=store.shard_frames,
        channel_scale=store.layout.info.channel_scale,
    )


def _copy_shard(
    store: FeatureStore, copy: FeatureStore | None, number: int, result: CopiedModality, *, dry_run: bool
) -> None:
    shard = store.shard(number)
    if shard is None:
        return
    existing: Shard | None = None
    if copy is not None:
        with contextlib.suppress(CacheCorrupt):
            existing = copy.shard(number)
        if existing is not None and len(existing.failed) <= len(shard.failed):
            result.present += 1
            return
    if copy is not None and not dry_run:
        _transfer(store, copy, number, shard)
    result.copied += 1
    result.bytes += shard.identity[1]


def _transfer(store: FeatureStore, copy: FeatureStore, number: int, shard: Shard) -> None:
    """Bring the file over, check what arrived, and publish it. Raises CacheCorrupt."""
    partial = files.partial_path(copy.layout.info.folder, f"shard-{number}")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _fetch(shard, descriptor)
            problem = next(problems_of_frames(store, number, shard, descriptor), None)
            if problem is not None:
                raise CacheCorrupt(problem.message, kind=problem.kind)
            if read_footer(store.layout, partial) != read_footer(store.layout, shard.file):
                raise CacheCorrupt(f"{shard.file} changed while it was copied", file=shard.file)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        files.publish_or_replace(partial, copy.layout.info.shard_file(number))
    finally:
        files.discard(partial)


def _fetch(shard: Shard, descriptor: int) -> None:
    size = shard.identity[1]
    if isinstance(shard.file, ObjectPath):
        shard.file.download(descriptor, size)
        return
    source = files.open_regular(shard.file)
    try:
        for start in range(0, size, PIECE):
            files.pwrite(descriptor, memoryview(pread(source, min(PIECE, size - start), start)), start)
    finally:
        os.close(source)
