"""Features in the formats of others. Nothing is ever pickled."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from cache_schema import files
from cache_schema.errors import CacheMissing
from cache_schema.index import index_arrays, write_index
from cache_schema.shard import CRC, Layout, Shard, shard_index, used_slots
from cache_schema.store import FeatureStore

Sample = tuple[str, dict[str, Any]]  # video id, and its arrays by name
TAR_BYTES = 1 << 30  # a new tar is begun after this many
FRAMES_AT_A_TIME = 64  # of a plain export: 46 MB of EVA-g tokens


@dataclass
class Exported:
    """What was written; ``skipped`` are the videos that some modality lacks, with the reason."""

    videos: int = 0
    frames: int = 0
    bytes: int = 0
    files: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def webdataset(stores: Mapping[str, FeatureStore], folder: Path, *, tar_bytes: int = TAR_BYTES) -> Exported:
    """One sample a video in WebDataset tars ``features-000000.tar``, …: ``<n>.json`` and ``<n>.npz``.

    The json names the video, because an id may hold any character and a WebDataset key may not. The npz holds
    ``frame_index`` and one array [frames, *frame_shape] per modality (``pooled/layer8`` as ``pooled_layer8``); read it
    with ``numpy.load(..., allow_pickle=False)``. The folder appears whole or not at all.

    Raises:
        FileExistsError: the folder is there already.
        CacheCorrupt: a frame does not fit its checksum; every frame is checked.
    """
    report = Exported()
    with _new_folder(folder) as aside:
        samples = enumerate(_videos(stores, report))
        while (first := next(samples, None)) is not None:
            _write_tar(aside / f"features-{report.files:06d}.tar", first, samples, stores, report, tar_bytes)
        report.bytes = sum(entry.stat().st_size for entry in aside.iterdir())
    return report


def plain(stores: Mapping[str, FeatureStore], folder: Path) -> Exported:
    """The same arrays as a Zarr that any v3 reader opens as it is: int8 frames become the float16 that a read gives.

    It is no store of this package: shards have no footers, and what int8 lost stays lost (attribute
    ``exported_from`` says how the numbers were made). Rows and the ``videos`` group are those of the store; a frame
    that is not there is NaN. The folder appears whole or not at all.

    Raises:
        FileExistsError: the folder is there already.
        CacheCorrupt: a frame does not fit its checksum; every frame is checked.
    """
    report, status = Exported(), {}
    plan = next(iter(stores.values())).plan
    with _new_folder(folder) as aside:
        _write_metadata(aside, stores, plan.num_shards)
        for name, store in stores.items():
            layout = _plain_layout(store, aside)
            for number, shard in store.shards(range(plan.num_shards)).items():
                if shard is not None and used_slots(shard.records):
                    report.bytes += _write_shard(store, layout, number, shard)
                    report.files += 1
            status[name] = store.status_codes()
            for segment, found in zip(plan.segments, store.segment_status(), strict=True):
                if found is None or not found.ok:
                    why = "not extracted" if found is None else f"{found.kind}: {found.reason}"
                    report.skipped.setdefault(segment.video_id, f"{name}: {why}")
        write_index(aside, lambda: index_arrays(plan, status))
    report.frames = sum(len(segment) for segment in plan.segments if segment.video_id not in report.skipped)
    report.videos = len(set(plan.videos) - report.skipped.keys())
    return report


FORMATS: dict[str, Callable[[Mapping[str, FeatureStore], Path], Exported]] = {"webdataset": webdataset, "plain": plain}


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name at the end, or goes."""
    if os.path.lexists(folder):
        raise FileExistsError(errno.EEXIST, "An export is written to a new folder, and this exists", str(folder))
    files.make_folder(folder.parent)
    aside = files.partial_path(folder.parent, folder.name)
    try:
        files.make_folder(aside)
        yield aside
        for path, _, _ in os.walk(aside):
            files.sync_folder(Path(path))
        os.rename(aside, folder)
        files.sync_folder(folder.parent)
    finally:
        files.discard(aside)


# --- plain Zarr


def _plain_layout(store: FeatureStore, folder: Path) -> Layout:
    spec = replace(store.spec, dtype=store.spec.feature_dtype)
    return Layout(replace(store.layout.info, store=folder, spec=spec, channel_scale=None))


def _write_metadata(folder: Path, stores: Mapping[str, FeatureStore], num_shards: int) -> None:
    import zarr

    group = zarr.create_group(folder, attributes={"about": "features exported from a cache of diff-lmm"})
    for name, store in stores.items():
        shape, rows = store.spec.frame_shape, num_shards * store.shard_frames
        made_by: dict[str, Any] = {"exported_from": store.spec.to_json()}
        group.create_array(
            name,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards=(store.shard_frames, *shape),
            dtype=store.spec.feature_dtype,
            chunk_key_encoding={"name": "default", "separator": "."},
            compressors=[{"name": "crc32c"}],
            filters=None,
            fill_value=float("nan"),
            attributes=made_by,
        )


def _write_shard(store: FeatureStore, layout: Layout, number: int, shard: Shard) -> int:
    """One shard of the plain array; returns its bytes."""
    path = Path(str(layout.info.shard_file(number)))
    files.make_folder(path.parent)
    with path.open("xb") as file:
        for record in shard.records:
            for first in range(0, len(record.frame_index) if record.ok else 0, FRAMES_AT_A_TIME):
                frames = record.frame_index[first : first + FRAMES_AT_A_TIME]
                rows = store.read(record.video_id, frames, verify=True).astype(layout.dtype, copy=False)
                for at, row in enumerate(rows):
                    file.seek((record.slot + first + at) * layout.stride)
                    raw = row.tobytes()
                    file.write(raw + CRC.pack(crc32c(raw)))
        file.truncate(used_slots(shard.records) * layout.stride)
        file.seek(0, os.SEEK_END)
        file.write(shard_index(layout, shard.present))
    files.sync_file(path)
    return path.stat().st_size


# --- tars


def _write_tar(
    path: Path,
    first: tuple[int, Sample],
    rest: Iterator[tuple[int, Sample]],
    stores: Mapping[str, FeatureStore],
    report: Exported,
    tar_bytes: int,
) -> None:
    """One tar with the first sample and as many of the rest as it takes."""
    specs = {name: store.spec.to_json() for name, store in stores.items()}
    with tarfile.open(path, "x") as tar:
        sample: tuple[int, Sample] | None = first
        while sample is not None:
            number, (video, arrays) = sample
            packed = io.BytesIO()
            np.savez(packed, allow_pickle=False, **arrays)
            _add(tar, f"{number:08d}.json", files.canonical_json({"video": video, "modalities": specs}))
            _add(tar, f"{number:08d}.npz", packed.getvalue())
            report.videos, report.frames = report.videos + 1, report.frames + len(arrays["frame_index"])
            sample = next(rest, None) if tar.offset < tar_bytes else None
    files.sync_file(path)
    report.files += 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, no time: the same features give the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _videos(stores: Mapping[str, FeatureStore], report: Exported) -> Iterator[Sample]:
    plan = next(iter(stores.values())).plan
    for video in plan.videos:
        segments = plan.segments_of(video)
        index = np.unique(np.concatenate([np.array(segment.frame_index, np.int64) for segment in segments]))
        try:
            arrays = {name.replace("/", "_"): store.read(video, index, verify=True) for name, store in stores.items()}
        except CacheMissing as error:
            report.skipped[video] = str(error).partition("\n")[0]
            continue
        yield video, {"frame_index": index, **arrays}
