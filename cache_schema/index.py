"""The ``videos`` group: which rows belong to which video, as plain Zarr arrays for readers without this code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.connections import concurrently
from cache_schema.errors import CacheCorrupt
from cache_schema.objects import ObjectPath, StorePath
from cache_schema.plan import Plan

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

STATUS = {"not committed": 0, "ok": 1, "failed": 2}
ROWS_PER_CHUNK = 1 << 20

Array = npt.NDArray[Any]


def index_arrays(plan: Plan, status: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """The arrays of the group, from the plan and each modality's status per segment. A pure function.

    ``id``: the UTF-8 ids, each ended by a zero byte (Zarr has no text type that every reader knows);
    ``start`` and ``length``: rows of each segment; ``status/<modality>``: see ``STATUS``;
    ``frame_index``: of every row, -1 where there is none.
    """
    segments = plan.segments
    frame_index = np.full(plan.num_shards * plan.shard_frames, -1, "<i4")
    for segment in segments:
        frame_index[segment.start : segment.stop] = segment.frame_index
    ids = b"".join(segment.video_id.encode("utf-8") + b"\0" for segment in segments)
    arrays: dict[str, Array] = {
        "id": np.frombuffer(ids, np.uint8),
        "start": np.array([segment.start for segment in segments], "<i8"),
        "length": np.array([len(segment) for segment in segments], "<i8"),
        "frame_index": frame_index,
    }
    return arrays | {f"status/{name}": np.array(values, np.uint8) for name, values in status.items()}


def write_index(store: StorePath, arrays: Mapping[str, Array]) -> None:
    """Put these arrays in the place of the ``videos`` group, unless it holds exactly them already.

    The new group is written aside and flushed before it is renamed into place, so no reader sees half of it. The
    caller holds the store's lock. An object store has no renames: see ``_write_objects``.
    """
    wanted = _group_files(arrays)
    if isinstance(store, ObjectPath):
        _write_objects(store / "videos", wanted)
        return
    final = store / "videos"
    if _holds(final, wanted):
        return
    aside, old = files.partial_path(store, "videos"), files.partial_path(store, "videos-old")
    try:
        for name, data in wanted.items():
            files.make_folder((aside / name).parent)
            files.write_partial(aside / name, data)
        for path, _, _ in os.walk(aside):
            files.sync_folder(Path(path))
        if os.path.lexists(final):
            os.rename(final, old)
        os.rename(aside, final)
        files.sync_folder(store)
    finally:
        files.discard(aside)
        files.discard(old)


def _write_objects(folder: ObjectPath, wanted: Mapping[str, bytes]) -> None:
    """Chunks before the metadata that names them, the group last; what a shorter index leaves behind is removed.

    A reader between two of these writes can see arrays of two ages. The index is derived, and the next run mends it.
    """

    def write(name: str) -> None:
        try:
            if (folder / name).read_bytes(len(wanted[name])) == wanted[name]:
                return
        except FileNotFoundError:
            pass
        (folder / name).write(wanted[name])

    metadata = [name for name in wanted if name.endswith("zarr.json")]
    concurrently(write, sorted(wanted.keys() - set(metadata)))
    for name in sorted(metadata, key=lambda name: (-name.count("/"), name)):
        write(name)
    for chunks in {name.rpartition("/")[0] for name in wanted if "/c/" in name}:
        for stale in (entry for entry in (folder / chunks).iterdir() if f"{chunks}/{entry.name}" not in wanted):
            stale.delete()


def _group_files(arrays: Mapping[str, Array]) -> dict[str, bytes]:
    # zarr writes into memory and we write the files: its LocalStore flushes nothing and needs hard links.
    import zarr

    memory: dict[str, Buffer] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(memory))
    for name, array in arrays.items():
        chunks = (max(1, min(len(array), ROWS_PER_CHUNK)),)
        fill_value = -1 if name == "frame_index" else 0
        group.create_array(name, data=array, chunks=chunks, compressors=None, filters=None, fill_value=fill_value)
    return {name: memory[name].to_bytes() for name in sorted(memory)}


def _holds(folder: Path, wanted: Mapping[str, bytes]) -> bool:
    there = {str((Path(path) / name).relative_to(folder)) for path, _, names in os.walk(folder) for name in names}
    return there == wanted.keys() and all((folder / name).read_bytes() == data for name, data in wanted.items())


def read_index(store: StorePath, plan: Plan, modality: str) -> dict[str, Array] | None:
    """What the ``videos`` group says of the plan and of one modality; None when there is no such group.

    Read without zarr and bounded by the plan's size, because the folder may hold anything. The index may be older than
    the plan and then shorter; ``status`` is empty when it is older than the modality. Raises CacheCorrupt.
    """
    folder = store / "videos"
    if not folder.is_dir():
        return None
    expected = index_arrays(plan, {modality: [0] * len(plan.segments)})
    arrays = {}
    for name, array in expected.items():
        try:
            arrays[name] = _read_plain(folder / name, array.dtype, len(array))
        except FileNotFoundError as error:
            if not name.startswith("status/"):
                raise _unreadable(folder / name, "is missing") from error
            arrays[name] = array[:0]
        except ValueError as error:
            raise _unreadable(folder / name, str(error)) from error
    return arrays


def _read_plain(folder: StorePath, dtype: np.dtype[Any], max_length: int) -> Array:
    """A one-dimensional uncompressed array. Raises FileNotFoundError, or ValueError when it is anything else."""
    document = files.read_json(folder / "zarr.json", files.MAX_METADATA_BYTES)
    shape, grid, fill = document.get("shape"), document.get("chunk_grid"), document.get("fill_value")
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] <= max_length:
        raise ValueError(f"has the shape {shape!r}, but the plan has {max_length}")
    length, chunk = shape[0], max(1, min(shape[0], ROWS_PER_CHUNK))
    codecs = [codec.get("name") for codec in document.get("codecs") or [] if isinstance(codec, dict)]  # type: ignore[attr-defined]
    if document.get("data_type") != dtype.name or codecs != ["bytes"] or fill not in (0, -1):
        raise ValueError("is not a plain array of this format")
    if grid != {"name": "regular", "configuration": {"chunk_shape": [chunk]}}:
        raise ValueError("is not a plain array of this format")
    chunks = []
    for number in range(-(-length // chunk)):
        try:
            data = files.read_bytes(folder / "c" / str(number), chunk * dtype.itemsize)
        except FileNotFoundError:  # Zarr leaves out a chunk that holds nothing but the fill value
            data = np.full(chunk, fill, dtype).tobytes()
        if len(data) != chunk * dtype.itemsize:
            raise ValueError(f"has a truncated chunk {number}")
        chunks.append(np.frombuffer(data, dtype))
    return np.concatenate(chunks)[:length] if chunks else np.empty(0, dtype)


def _unreadable(folder: StorePath, what: str) -> CacheCorrupt:
    return CacheCorrupt(f"{folder} {what}. The index is made again by:", file=folder, kind="videos_index")
