"""Features in the formats of others. Nothing is ever pickled."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import files
from cache_schema.errors import CacheMissing
from cache_schema.store import FeatureStore

Sample = tuple[str, dict[str, Any]]  # video id, and its arrays by name
TAR_BYTES = 1 << 30  # a new tar is begun after this many


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
    if os.path.lexists(folder):
        raise FileExistsError(errno.EEXIST, "An export is written to a new folder, and this exists", str(folder))
    report = Exported()
    files.make_folder(folder.parent)
    aside = files.partial_path(folder.parent, folder.name)
    try:
        files.make_folder(aside)
        samples = enumerate(_videos(stores, report))
        while (first := next(samples, None)) is not None:
            _write_tar(aside / f"features-{report.files:06d}.tar", first, samples, stores, report, tar_bytes)
        report.bytes = sum(entry.stat().st_size for entry in aside.iterdir())
        files.sync_folder(aside)
        os.rename(aside, folder)
        files.sync_folder(folder.parent)
    finally:
        files.discard(aside)
    return report


# A store of int8 tokens will add "plain" here: q and its scales as two ordinary arrays.
FORMATS: dict[str, Callable[[Mapping[str, FeatureStore], Path], Exported]] = {"webdataset": webdataset}


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
