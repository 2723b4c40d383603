"""The ``zarr.json`` files of a store: made by zarr-python once, then checked field by field before anything is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache_schema import files
from cache_schema.connections import ObjectChanged
from cache_schema.errors import CacheCorrupt, CacheMismatch, CacheMissing
from cache_schema.objects import StorePath
from cache_schema.plan import MAX_SHARD_FRAMES
from cache_schema.quantize import CODEC_NAME, ChannelScale
from cache_schema.spec import FeatureSpec

FORMAT = "diff-lmm-cache"
FORMAT_VERSION = 3  # the only one that is written and read; the first two were never released
_MODALITY = re.compile(r"^(?!plan(/|$)|videos(/|$))[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*){0,2}$")
_HELP = {"tokens": "pipeline extract-clip", "pooled": "pipeline extract-teacher"}


@dataclass(frozen=True)
class ArrayInfo:
    """What is fixed about one modality's array: where it is and how its numbers were made."""

    store: StorePath
    modality: str
    spec: FeatureSpec
    shard_frames: int
    channel_scale: ChannelScale | None = dataclasses.field(default=None, compare=False)  # of an int8 array

    def __post_init__(self) -> None:
        if (self.spec.dtype == "int8") != (self.channel_scale is not None):
            raise ValueError("an int8 array needs channel scales, and no other has them: calibrate first")

    @property
    def folder(self) -> StorePath:
        """The array's folder."""
        return self.store / self.modality

    @property
    def metadata_file(self) -> StorePath:
        """The array's zarr.json."""
        return self.folder / "zarr.json"

    def shard_file(self, shard: int) -> StorePath:
        """Where shard number ``shard`` is: its chunk key in Zarr, such as ``c.17.0.0``."""
        return self.folder / self.shard_name(shard)

    def shard_name(self, shard: int) -> str:
        """The last part of ``shard_file``."""
        return ".".join(["c", str(shard), *("0" for _ in self.spec.frame_shape)])


def path_to(modality: str) -> list[str]:
    """The folders below the store that lead to the array, itself last: ``pooled``, ``pooled/layer8``."""
    names = modality.split("/")
    return ["/".join(names[: depth + 1]) for depth in range(len(names))]


def other_format(file: StorePath, version: object) -> CacheMismatch:
    """The error for a file of another format version."""
    newer = isinstance(version, int) and version > FORMAT_VERSION
    maker = "the newer program that made it" if newer else "the program that made it"
    return CacheMismatch(
        f"{file}: format_version is {version}; this program reads {FORMAT_VERSION}.\n"
        f"Use {maker}, or extract again into a new folder:"
    )


def check_modality(modality: str) -> None:
    """Raise ValueError unless the name may be an array of a store, such as ``tokens`` or ``pooled/layer8``."""
    if not _MODALITY.match(modality):
        raise ValueError(f"a modality is named like `tokens` or `pooled/layer8`, not {modality!r}")


def default_help(modality: str) -> str:
    """The command that fills this modality, for callers that gave none."""
    return _HELP.get(modality.partition("/")[0], "pipeline --help")


def create_group(store: StorePath, shard_frames: int) -> None:
    """Write the store's group unless it exists; an existing store keeps its own shard_frames."""
    if not 1 <= shard_frames <= MAX_SHARD_FRAMES:
        raise ValueError(f"shard_frames must be 1..{MAX_SHARD_FRAMES}, not {shard_frames}")
    if not (store / "zarr.json").exists():
        attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, "shard_frames": shard_frames}
        files.publish_bytes(store / "zarr.json", _made_by_zarr("", group=attributes))
    if (store / "plan" / "zarr.json").exists():
        return
    # The plan's files lie inside a node of the hierarchy, or zarr would warn of a stray folder at every listing.
    label = {"about": "one .npz file per growth of the plan; see FORMAT.md of diff-lmm"}
    plan = {"shape": (0,), "chunks": (1,), "dtype": "uint8", "compressors": None, "filters": None, "attributes": label}
    files.publish_bytes(store / "plan" / "zarr.json", _made_by_zarr("plan", array=plan))


def create_parents(store: StorePath, modality: str) -> None:
    """Write the groups above an array, those that do not exist."""
    for parent in path_to(modality)[:-1]:
        if not (store / parent / "zarr.json").exists():
            files.publish_bytes(store / parent / "zarr.json", _made_by_zarr("", group={}))


def create_array(info: ArrayInfo) -> None:
    """Write the array's zarr.json with no rows, unless it exists."""
    if info.metadata_file.exists():
        return
    shape = info.spec.frame_shape
    attributes = {"feature_spec": info.spec.to_json(), "feature_spec_digest": info.spec.digest()}
    serializer: dict[str, object] = {}
    if (scale := info.channel_scale) is not None:
        from cache_schema.codec import Int8Codec

        serializer = {"serializer": Int8Codec(scale.to_json())}
        measured = {"frames": scale.frames, "error": scale.error, "min_cosine": scale.min_cosine}
        attributes["quantization"] = {**measured, "channel_scale_digest": scale.digest}
    array = {
        "shape": (0, *shape),
        "chunks": (1, *shape),
        "shards": (info.shard_frames, *shape),
        "dtype": info.spec.feature_dtype,
        "chunk_key_encoding": {"name": "default", "separator": "."},  # no folders: two flushes fewer a shard
        # Every Zarr reader checks every frame. Its default, zstd, saves 7 % and takes 19 times the read time.
        "compressors": [{"name": "crc32c"}],
        "filters": None,
        "fill_value": float("nan"),  # a hole is loud; zero would be a plausible feature
        "attributes": attributes,
        **serializer,
    }
    files.publish_bytes(info.metadata_file, _made_by_zarr(info.modality, array=array))


def _made_by_zarr(
    path: str, *, group: Mapping[str, object] | None = None, array: Mapping[str, object] | None = None
) -> bytes:
    import zarr  # here, not at the top: reading and writing shards need no zarr, and forked workers must not use it
    from zarr.storage import MemoryStore

    memory: dict[str, object] = {}
    store = MemoryStore(memory)  # type: ignore[arg-type]
    if array is not None:
        zarr.create_array(store, name=path, **array)  # type: ignore[arg-type]
    else:
        zarr.create_group(store, attributes=dict(group or {}))
    document = json.loads(memory[f"{path}/zarr.json" if path else "zarr.json"].to_bytes())  # type: ignore[attr-defined]
    return _metadata_bytes(document)


def _metadata_bytes(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False).encode("ascii")


def read_group(store: StorePath) -> int:
    """Check the store's group and return its shard_frames. Raises CacheMissing, CacheMismatch, CacheCorrupt."""
    file = store / "zarr.json"
    try:
        document = files.read_json(file, files.MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing(f"There is no cache at {store}. Make one with:") from error
    _expect(file, document, {"zarr_format": 3, "node_type": "group"})
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise CacheMismatch(
            f"{file}: attributes.format is not {FORMAT!r}: another program's Zarr group. Choose another folder:"
        )
    version = attributes.get("format_version")
    if type(version) is not int or version < 1:
        raise CacheCorrupt(f"{file}: attributes.format_version must be a positive integer, not {version!r}", file=file)
    if version != FORMAT_VERSION:
        raise other_format(file, version)
    shard_frames = attributes.get("shard_frames")
    if type(shard_frames) is not int or not 1 <= shard_frames <= MAX_SHARD_FRAMES:
        raise CacheCorrupt(
            f"{file}: attributes.shard_frames must be 1..{MAX_SHARD_FRAMES}, not {shard_frames!r}", file=file
        )
    return shard_frames


def read_array(store: StorePath, modality: str, shard_frames: int) -> ArrayInfo:
    """Check one array's zarr.json against the format and return what is fixed about it.

    Raises:
        CacheMissing: the modality is not in the store.
        CacheCorrupt: a field is not what the format says; the message names the file and the field.
    """
    check_modality(modality)
    file = store / modality / "zarr.json"
    files.refuse_links(file, store)
    try:
        document = files.read_json(file, files.MAX_METADATA_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing(f"{store} holds no {modality!r} yet. Make it with:") from error
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or not isinstance(attributes.get("feature_spec"), dict):
        raise CacheCorrupt(f"{file}: attributes.feature_spec is not an object", file=file)
    try:
        spec = FeatureSpec.from_json(attributes["feature_spec"])
    except ValueError as error:
        raise CacheCorrupt(f"{file}: attributes.feature_spec: {error}", file=file) from error
    if attributes.get("feature_spec_digest") != spec.digest():
        raise CacheCorrupt(
            f"{file}: attributes.feature_spec_digest is not the digest of attributes.feature_spec", file=file
        )
    scale = _read_scale(file, document, attributes, spec) if spec.dtype == "int8" else None
    _expect(file, document, _expected_array(spec, shard_frames, scale))
    shape = document.get("shape")
    if not isinstance(shape, list) or shape[1:] != list(spec.frame_shape) or not _whole_shards(shape[0], shard_frames):
        wanted = f"[n × {shard_frames}, {', '.join(map(str, spec.frame_shape))}]"
        raise CacheCorrupt(f"{file}: shape is {shape!r}, not {wanted}", file=file)
    return ArrayInfo(store, modality, spec, shard_frames, scale)


def _read_scale(
    file: StorePath, document: Mapping[str, object], attributes: Mapping[str, object], spec: FeatureSpec
) -> ChannelScale:
    """The channel scales in the codec's configuration, checked against the digest in the attributes."""
    try:
        codecs: Any = document.get("codecs")
        text = codecs[0]["configuration"]["codecs"][0]["configuration"]["channel_scale"]
        noted: Any = attributes["quantization"]
        measured = {name: noted[name] for name in ("frames", "error", "min_cosine")}
        scale = ChannelScale.from_json(text, spec.frame_shape[-1], **measured)
        digest = noted["channel_scale_digest"]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CacheCorrupt(
            f"{file}: codecs or attributes.quantization: no channel scales: {error}", file=file
        ) from error
    if digest != scale.digest:
        raise CacheCorrupt(f"{file}: channel_scale is not what attributes.quantization has the digest of", file=file)
    return scale


def _expected_array(spec: FeatureSpec, shard_frames: int, scale: ChannelScale | None) -> dict[str, object]:
    little: dict[str, object] = {"name": "bytes", "configuration": {"endian": "little"}}
    int8 = {"name": CODEC_NAME, "configuration": {"channel_scale": scale.to_json()}} if scale is not None else None
    sharding = {
        "chunk_shape": [1, *spec.frame_shape],
        "codecs": [int8 or little, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": spec.feature_dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_frames, *spec.frame_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "storage_transformers": [],
    }


def _expect(file: StorePath, document: Mapping[str, object], expected: Mapping[str, object]) -> None:
    for field, value in expected.items():
        found = document.get(field, [] if field == "storage_transformers" else None)
        if found != value or type(found) is not type(value):
            raise CacheCorrupt(
                f"{file}: {field} is {json.dumps(found)[:200]}, but this format has {json.dumps(value)}", file=file
            )


def _whole_shards(rows: object, shard_frames: int) -> bool:
    return type(rows) is int and rows >= 0 and rows % shard_frames == 0


def grow_array(info: ArrayInfo, num_shards: Callable[[], int]) -> None:
    """Make the array long enough for the shards of the plan; it never shrinks. Only zarr.json is written.

    Args:
        num_shards: those of the plan as it is now. It is asked again after each write: of two writers that change the
            file at the same moment, the one whose change came last finds what the other one's plan needs.
    """
    while _rows(info) < (rows := num_shards() * info.shard_frames):

        def grown(data: bytes, rows: int = rows) -> bytes | None:
            document = files.parse_json(data)
            if _checked_rows(info, document) >= rows:
                return None
            return _metadata_bytes({**document, "shape": [rows, *info.spec.frame_shape]})

        files.update(info.metadata_file, files.MAX_METADATA_BYTES, grown)


def _rows(info: ArrayInfo) -> int:
    while True:
        try:
            return _checked_rows(info, files.read_json(info.metadata_file, files.MAX_METADATA_BYTES))
        except ObjectChanged:  # another writer grew it while it was read: what it is now is read
            continue


def _checked_rows(info: ArrayInfo, document: Mapping[str, object]) -> int:
    shape = document.get("shape")
    if not isinstance(shape, list) or not shape or not _whole_shards(shape[0], info.shard_frames):
        raise CacheCorrupt(f"{info.metadata_file}: shape is {shape!r}", file=info.metadata_file)
    return int(shape[0])


def list_modalities(store: StorePath) -> list[str]:
    """Names of the feature arrays in a store, sorted."""
    return sorted(_walk(store, ""))


def lost_modalities(store: StorePath) -> dict[str, str]:
    """Modality -> why it must have been there, of those whose zarr.json is gone."""
    named = dict.fromkeys(_with_chunks(store / "videos" / "status", ""), "the index of the store names it")
    named |= dict.fromkeys(_with_chunks(store, ""), "shards lie there")
    present = set(list_modalities(store))
    return {name: why for name, why in sorted(named.items()) if name not in present}


def _with_chunks(place: StorePath, prefix: str) -> Iterator[str]:
    """Names of modalities whose folder in ``place`` holds chunks, with or without a zarr.json."""
    for own_name in sorted(files.names_in(place / prefix)):
        name = f"{prefix}/{own_name}" if prefix else own_name
        if not _MODALITY.match(name):
            continue
        if any(own.startswith("c.") for own in files.names_in(place / name)):
            yield name
        else:
            yield from _with_chunks(place, name)


def _walk(store: StorePath, prefix: str) -> Iterator[str]:
    for own_name in sorted(files.names_in(store / prefix)):
        name = f"{prefix}/{own_name}" if prefix else own_name
        entry = store / name
        if not _MODALITY.match(name) or not (entry / "zarr.json").is_file():
            continue
        if files.read_json(entry / "zarr.json", files.MAX_METADATA_BYTES).get("node_type") == "array":
            yield name
        else:
            yield from _walk(store, name)
