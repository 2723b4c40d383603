"""The ``videos`` group: which rows belong to which video, as plain Zarr arrays for readers without this code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_schema import files
from cache_schema.connections import concurrently
from cache_schema.errors import CacheCorrupt
from cache_schema.objects import StorePath
from cache_schema.plan import Plan

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

STATUS = {"not committed": 0, "ok": 1, "failed": 2}
ROWS_PER_CHUNK = 1 << 20
ROUNDS = 10  # of two finalizations that meet

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


def write_index(store: StorePath, derive: Callable[[], Mapping[str, Array]]) -> None:
    """Bring the ``videos`` group to what ``derive`` gives, unless it holds exactly that already.

    Every file is replaced whole. The group's own comes last and goes first, so that a reader who begins there sees
    nothing half made. Two who write at once do not wait for each other: each looks again at what lies there when it has
    written, and derives anew where that is not its own. So the one who ends last leaves one index, and the right one.
    """
    folder = store / "videos"
    for _ in range(ROUNDS):
        wanted = _group_files(derive())
        if not _write_what_differs(folder, wanted) or not _differing(folder, wanted):
            return


def _write_what_differs(folder: StorePath, wanted: Mapping[str, bytes]) -> bool:
    """Whether anything was written. Chunks first, then the metadata that names them."""
    differing = _differing(folder, wanted)
    stale = sorted(_chunks_there(folder, wanted) - wanted.keys())
    if not differing and not stale:
        return False
    files.remove(folder / "zarr.json")
    metadata = {name for name in wanted if name.endswith("zarr.json")}

    def write(name: str) -> None:
        files.write_bytes(folder / name, wanted[name], folder.parent)

    concurrently(write, sorted(differing - metadata))
    for name in sorted(differing & metadata | {"zarr.json"}, key=lambda name: (-name.count("/"), name)):
        write(name)
    for name in stale:
        files.remove(folder / name)
    return True


def _differing(folder: StorePath, wanted: Mapping[str, bytes]) -> set[str]:
    """The files that are not what they should be."""

    def differs(name: str) -> bool:
        try:
            return files.read_bytes(folder / name, len(wanted[name])) != wanted[name]
        except (FileNotFoundError, NotADirectoryError, CacheCorrupt):
            return True

    names = sorted(wanted)
    return {name for name, different in zip(names, concurrently(differs, names), strict=True) if different}


def _chunks_there(folder: StorePath, wanted: Mapping[str, bytes]) -> set[str]:
    places = {name.rpartition("/")[0] for name in wanted if "/c/" in name}
    return {f"{place}/{name}" for place in places for name in files.names_in(folder / place) if name[0] != "."}


def _group_files(arrays: Mapping[str, Array]) -> dict[str, bytes]:
    # zarr writes into memory and we write the files: its LocalStore flushes nothing and needs hard links.
    import zarr

    memory: dict[str, Buffer] = {}
    group = zarr.create_group(zarr.storage.MemoryStore(memory))
    for name, array in arrays.items():
        chunks = (max(1, min(len(array), ROWS_PER_CHUNK)),)
        fill_value = -1 if name == "frame_index" else 0
        # Chunks of nothing but the fill value, too: an older one of another length may lie there.
        plain: dict[str, Any] = {"compressors": None, "filters": None, "config": {"write_empty_chunks": True}}
        group.create_array(name, data=array, chunks=chunks, fill_value=fill_value, **plain)
    return {name: memory[name].to_bytes() for name in sorted(memory)}


def read_index(store: StorePath, plan: Plan, modality: str) -> dict[str, Array] | None:
    """What the ``videos`` group says of the plan and of one modality; None when there is no such group.

    Read without zarr and bounded by the plan's size, because the folder may hold anything. The index may be older than
    the plan and then shorter; ``status`` is empty when it is older than the modality. Raises CacheCorrupt.
    """
    folder = store / "videos"
    if not (folder / "zarr.json").exists():
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
