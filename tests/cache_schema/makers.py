"""Small stores for the tests. Features are a pure function of (modality, video, frame): any read can be checked."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_schema import (
    FeatureSpec,
    FeatureStore,
    Segment,
    SegmentFailed,
    SegmentResult,
    Task,
    TaskReport,
    write_task,
)
from cache_schema.write import close_features

TOKENS = FeatureSpec(
    encoder="open_clip:tiny",
    weights="0" * 64,
    layer=3,
    pool="none",
    resize="squash 224 bicubic antialias uint8",
    normalize="mean=0.5 std=0.5",
    latent="",
    timestep=None,
    label=None,
    dtype="float16",
    compute_dtype="float32",
    frame_shape=(5, 7),
    frame_rule="grid 10 fps, nearest by presentation time",
    decoder="PyAV 18",
)
POOLED = replace(
    TOKENS,
    encoder="diffusers:DiT",
    pool="mean",
    latent="mode*0.18215",
    timestep=0,
    label=1000,
    dtype="float32",
    frame_shape=(11,),
)
LARGE = replace(TOKENS, frame_shape=(129, 257))  # 66,306 bytes a frame: page-aligned, no statistics
SPECS = {"tokens": TOKENS, "pooled/layer8": POOLED, "tokens_large": LARGE}


def features(modality: str, video: str, frames: Sequence[int]) -> np.ndarray:
    """[n, *frame_shape] in the spec's dtype."""
    spec = SPECS[modality]
    salt = zlib.crc32(f"{modality} {video}".encode())
    rows = [np.random.default_rng([salt, frame]).normal(size=spec.frame_shape) for frame in frames]
    return np.array(rows, dtype=spec.dtype).reshape(len(rows), *spec.frame_shape)


def producer(
    modalities: Sequence[str],
    *,
    batch_size: int = 3,
    bad: Mapping[str, int] | None = None,
    on_batch: Callable[[Segment], None] = lambda _: None,
) -> Callable[[Segment], SegmentResult[dict[str, np.ndarray]]]:
    """A teacher pass; a video in ``bad`` fails as ``truncated`` after that many frames."""

    def produce(segment: Segment) -> SegmentResult[dict[str, np.ndarray]]:
        def batches() -> Iterator[dict[str, np.ndarray]]:
            for at in range(0, len(segment), batch_size):
                frames = segment.frame_index[at : at + batch_size]
                limit = (bad or {}).get(segment.video_id)
                if limit is not None and at + len(frames) > limit:
                    raise SegmentFailed("truncated", f"header 9.0 s, decodable {limit} frames")
                on_batch(segment)
                yield {modality: features(modality, segment.video_id, frames) for modality in modalities}

        return SegmentResult(batches(), lambda: {"size": len(segment.video_id), "pts": list(segment.frame_index)})

    return produce


def single(modality: str = "tokens", **options: object) -> Callable[[Segment], SegmentResult[np.ndarray]]:
    """The same for ``write_single``: bare arrays."""
    together = producer([modality], **options)

    def produce(segment: Segment) -> SegmentResult[np.ndarray]:
        result = together(segment)
        return SegmentResult((batch[modality] for batch in result.features), result.facts)

    return produce


def write_single(
    store: FeatureStore, task: Task, produce: Callable[[Segment], SegmentResult[np.ndarray]]
) -> TaskReport:
    """``write_task`` of one modality whose producer gives bare arrays."""

    def named(segment: Segment) -> SegmentResult[Mapping[str, np.ndarray]]:
        result = produce(segment)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            try:
                for batch in result.features:
                    yield {store.modality: batch}
            finally:
                close_features(result.features)

        return SegmentResult(batches(), result.facts)

    return write_task({store.modality: store}, task, named)[store.modality]


WANTED = {
    "ant": range(0, 12, 3),  # 4 frames
    "bee": [5, 1, 9],
    "cat": range(20),  # longer than a shard of 8: a run of three
    "dog": [2, 3],
    "elk": range(7),
}


def create(path: Path, modality: str = "tokens", *, shard_frames: int = 8) -> FeatureStore:
    return FeatureStore.create(path, modality, SPECS[modality], shard_frames=shard_frames)


def extract(
    path: Path,
    modalities: Sequence[str] = ("tokens",),
    wanted: Mapping[str, Sequence[int]] = WANTED,
    *,
    shard_frames: int = 8,
    retry_failed: bool = False,
    **options: object,
) -> dict[str, FeatureStore]:
    """What the extraction command does: one plan, all pending tasks, then the index."""
    stores = {modality: create(path, modality, shard_frames=shard_frames) for modality in modalities}
    first = stores[modalities[0]]
    first.extend_plan(wanted)
    tasks = {task.shards: task for store in stores.values() for task in store.pending(retry_failed=retry_failed)}
    for _, task in sorted(tasks.items()):
        write_task(stores, task, producer(modalities, **options))
    first.finalize()
    return stores


def tree(path: Path) -> dict[str, bytes]:
    """Every folder and file below ``path``, with the files' bytes."""
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else b"folder"
        for entry in sorted(path.rglob("*"))
    }


def flip_bit(file: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit round; a negative offset counts from the end."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(bytes(data))
