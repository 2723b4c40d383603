"""The bytes on disk: valid for any Zarr reader, described by FORMAT.md, and refused by name when they are not ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from crc32c import crc32c

import cache_schema
from cache_schema import (
    CacheCorrupt,
    CacheMismatch,
    FeatureStore,
    SegmentFailed,
    SegmentResult,
    files,
    plan_columns,
    shard,
    verify,
)
from cache_schema.plan import Part, Plan
from cache_schema.shard import TRAILER, Layout, ShardWriter, read_footer
from tests.cache_schema.makers import (
    SPECS,
    TOKENS,
    WANTED,
    create,
    extract,
    features,
    flip_bit,
    single,
    tree,
    write_single,
)

GOLDEN = Path(__file__).parent.parent / "golden"
FORMAT_PAGE = Path(cache_schema.__file__).parent / "FORMAT.md"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """All modalities, one failed video, a run of three shards; read-only."""
    path = tmp_path_factory.mktemp("format") / "cache.zarr"
    extract(path, list(SPECS), bad={"dog": 1})
    return path


def expected_rows(path, modality):
    """The whole frame axis, holes as NaN, from the plan alone."""
    store = FeatureStore.open(path, modality)
    rows = np.full((store.plan.num_shards * 8, *store.spec.frame_shape), np.nan, store.spec.dtype)
    for segment in store.plan.segments:
        if segment.video_id != "dog":
            rows[segment.start : segment.stop] = features(modality, segment.video_id, segment.frame_index)
    return rows


def as_bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("modality", SPECS)
def test_zarr_and_tensorstore_and_our_reader_give_the_same_bits(filled, modality):
    expected = expected_rows(filled, modality)
    by_zarr = zarr.open_group(filled, mode="r")[modality]
    kvstore = {"driver": "file", "path": str(filled / modality)}
    by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
    np.testing.assert_array_equal(as_bits(by_zarr[:]), as_bits(expected))
    np.testing.assert_array_equal(as_bits(by_tensorstore.read().result()), as_bits(expected))
    assert np.isnan(expected).any()
    for row in (0, 7, 17, len(expected) - 1):  # single frames go through another path of both
        np.testing.assert_array_equal(as_bits(by_zarr[row]), as_bits(expected[row]))
        np.testing.assert_array_equal(as_bits(by_tensorstore[row].read().result()), as_bits(expected[row]))
    store = FeatureStore.open(filled, modality)
    for video in sorted(set(WANTED) - {"dog"}):
        rows = store.plan.rows(video, list(WANTED[video]))
        np.testing.assert_array_equal(as_bits(store.read(video, list(WANTED[video]))), as_bits(expected[rows]))


def test_the_reader_of_the_format_page_reads_a_video(filled):
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 6
    for video in ("elk", "cat", "dog"):
        names = {"path": str(filled), "video_id": video}
        exec(code, names)
        assert names["frame_index"].tolist() == sorted(WANTED[video])
        if video == "dog":
            assert np.isnan(names["features"]).all()
        else:
            np.testing.assert_array_equal(names["features"], features("tokens", video, sorted(WANTED[video])))


def test_the_format_page_fits_three_screens_and_names_what_the_code_writes(filled):
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 150
    footer = read_footer(FeatureStore.open(filled, "tokens").layout, filled / "tokens/c.0.0.0")
    segments = footer.pop("segments")
    for key in (*footer, *segments[0], *np.load(filled / "plan/000000.npz"), "channel_scale_digest"):
        assert f"`{key}`" in page, key
    assert f"format version {shard.FORMAT_VERSION}" in page.splitlines()[0]
    assert {shard.MAGIC.decode(), f"{shard.LARGE_FRAME:,} bytes", "4096", "64"} <= {
        word for word in ("DLMMSHRD", "65,536 bytes", "4096", "64") if word in page
    }
    for name in zarr.open_group(filled, mode="r")["videos"].array_keys():
        assert f"`{name}`" in page


def test_zarrs_checks_a_frame_where_it_reads_the_shard_whole(filled, tmp_path):
    """Not where it reads one frame: its partial decoder (0.2.3) leaves the checksum of the frame unread."""
    pytest.importorskip("zarrs")
    shutil.copytree(filled, tmp_path / "store")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_group(tmp_path / "store", mode="r")["tokens"]
        np.testing.assert_array_equal(as_bits(array[:]), as_bits(expected_rows(filled, "tokens")))
        flip_bit(tmp_path / "store/tokens/c.1.0.0", 130)
        with pytest.raises(RuntimeError, match="checksum"):
            array[8:16]


def test_zarr_lists_the_store_without_a_warning(filled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(zarr.open_group(filled, mode="r").members(max_depth=None))
    assert {"tokens", "pooled/layer8", "videos/id", "videos/status/pooled/layer8"} <= set(members)


@pytest.mark.parametrize(
    ("golden", "file"),
    [
        ("cache_v3_group.json", "zarr.json"),
        ("cache_v3_tokens.json", "tokens/zarr.json"),
        ("cache_v3_pooled.json", "pooled/layer8/zarr.json"),
    ],
)
def test_metadata_is_what_format_version_3_has_always_been(filled, golden, file):
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / golden).write_bytes((filled / file).read_bytes())
    assert json.loads((filled / file).read_text()) == json.loads((GOLDEN / golden).read_text())


def test_a_store_of_the_first_format_is_refused_by_name_with_what_to_do():
    with pytest.raises(CacheMismatch, match=r"format_version is 1; this program reads 3.\n.*extract again into a new"):
        FeatureStore.open(GOLDEN / "cache_v1", "tokens", TOKENS)


@pytest.mark.parametrize("modality", SPECS)
def test_a_flipped_bit_in_any_frame_is_an_error_in_every_reader(filled, tmp_path, modality):
    """The readers know nothing of this package: the checksum is Zarr's own codec."""
    shutil.copytree(filled, tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store", modality)
    layout, rng = store.layout, np.random.default_rng(0)
    for segment in store.plan.segments:
        if segment.video_id == "dog":
            continue
        row = int(rng.integers(segment.start, segment.stop))
        number, slot = divmod(row, 8)
        file = layout.info.shard_file(number)
        offset = slot * layout.stride + int(rng.integers(layout.chunk_bytes))
        flip_bit(file, offset, int(rng.integers(8)))
        for read in READERS.values():
            with pytest.raises(Exception, match=r"(?i)crc|checksum|digest"):
                read(tmp_path / "store", modality, row)
        flip_bit(file, offset, 0)
        shutil.copy(filled / file.relative_to(tmp_path / "store"), file)
        for read in READERS.values():
            np.testing.assert_array_equal(
                as_bits(read(tmp_path / "store", modality, row)),
                as_bits(features(modality, segment.video_id, [segment.frame_index[row - segment.start]])[0]),
            )


def read_by_zarr(path, modality, row):
    return zarr.open_group(path, mode="r")[modality][row]


def read_by_tensorstore(path, modality, row):
    kvstore = {"driver": "file", "path": str(path / modality)}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()[row].read().result()


READERS = {"zarr-python": read_by_zarr, "tensorstore": read_by_tensorstore}


def write_released_store(path):
    """The store that is checked in as tests/golden/cache_v3, made by the code of today."""
    store = create(path, shard_frames=4)
    store.extend_plan({"a/b": [0, 10, 25], "b": range(5), "é": [1]})

    def produce(segment):
        if segment.video_id == "é":
            raise SegmentFailed("truncated", "header 9.0 s, decodable 0.1 s")
        rows = [np.arange(35, dtype=np.float16).reshape(1, 5, 7) + frame for frame in segment.frame_index]
        return SegmentResult(iter(rows), lambda: {"size": len(segment)})

    for task in store.pending():
        write_single(store, task, produce)
    store.finalize()


def test_a_store_written_by_the_first_release_of_the_format_is_read():
    store = FeatureStore.open(GOLDEN / "cache_v3", "tokens", TOKENS)
    assert verify.full(store) == []
    np.testing.assert_array_equal(store.read("a/b", [25, 0], verify=True)[:, 4, 6], [59, 34])
    np.testing.assert_array_equal(store.read("b", [4])[0, 0], np.arange(4, 11))
    assert (store.status()["é"].kind, store.facts("b")) == ("truncated", {"size": 5})


def test_the_same_bytes_are_written_today(tmp_path):
    write_released_store(tmp_path / "store")
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.rmtree(GOLDEN / "cache_v3", ignore_errors=True)
        shutil.copytree(tmp_path / "store", GOLDEN / "cache_v3")
    shards = {f"tokens/c.{number}.0.0" for number in range(4)} | {"plan/000000.npz"}
    written, golden = tree(tmp_path / "store"), tree(GOLDEN / "cache_v3")
    assert shards < written.keys() == golden.keys()
    assert {name: written[name] for name in shards} == {name: golden[name] for name in shards}


def test_a_shard_is_laid_out_as_the_format_page_says(filled):
    raw = (filled / "tokens_large/c.0.0.0").read_bytes()
    stride, frame_bytes = 69_632, 129 * 257 * 2  # 17 pages
    magic, version, footer_bytes, file_bytes, _ = TRAILER.unpack(raw[-8 * 16 - 4 - 32 : -8 * 16 - 4])
    assert (TRAILER.size, magic, version, file_bytes) == (32, b"DLMMSHRD", 3, len(raw))
    end = len(raw) - 8 * 16 - 4 - 32
    footer = json.loads(raw[end - footer_bytes : end])
    assert (footer["stride"], footer["data_bytes"], end - footer_bytes) == (stride, 7 * stride, 7 * stride)
    assert [(s["video"], s["slot"], s["frames"]) for s in footer["segments"]] == [
        ("ant", 0, [[0, 3, 4]]),
        ("bee", 4, [[1, 4, 3]]),
    ]
    sums = 0
    for slot, frame in enumerate([0, 3, 6, 9]):
        got = np.frombuffer(raw, "<f2", count=129 * 257, offset=slot * stride).reshape(129, 257)
        np.testing.assert_array_equal(got, features("tokens_large", "ant", [frame])[0])
        crc = raw[slot * stride + frame_bytes :][:4]
        assert crc == crc32c(got.tobytes()).to_bytes(4, "little")
        sums = crc32c(crc, sums)
        assert not any(raw[slot * stride + frame_bytes + 4 : (slot + 1) * stride])


def test_small_frames_start_on_cache_lines_and_large_ones_on_pages(tmp_path):
    assert [Layout(create(tmp_path, name).layout.info).stride for name in SPECS] == [128, 64, 69_632]


def test_finalize_can_be_repeated_and_deleted_and_gives_the_same_bytes(filled, tmp_path):
    before, inode = tree(filled), (filled / "videos").stat().st_ino
    store = FeatureStore.open(filled, "pooled/layer8")
    store.finalize()
    assert (filled / "videos").stat().st_ino == inode
    assert tree(filled) == before
    (filled / "videos").rename(tmp_path / "gone")
    assert store.status()["elk"].ok
    store.finalize()
    assert tree(filled) == before


def test_the_index_follows_the_plan_and_every_modality(tmp_path):
    extract(tmp_path, ["tokens"], wanted={"ant": [0], "bée\n": [4, 2]})
    pooled = create(tmp_path, "pooled/layer8")
    pooled.extend_plan({"cat": [9]})
    write_single(pooled, pooled.pending()[-1], single("pooled/layer8", bad={"cat": 0}))
    pooled.finalize()
    videos = zarr.open_group(tmp_path, mode="r")["videos"]
    assert bytes(videos["id"][:]).decode().split("\0") == ["ant", "bée\n", "cat", ""]
    assert videos["start"][:].tolist() == [0, 1, 8]
    assert videos["length"][:].tolist() == [1, 2, 1]
    assert videos["frame_index"][:].tolist() == [0, 2, 4, *[-1] * 5, 9, *[-1] * 7]
    assert videos["status/tokens"][:].tolist() == [1, 1, 0]
    assert videos["status/pooled/layer8"][:].tolist() == [0, 0, 2]


def test_an_empty_store_can_be_finalized_and_read(tmp_path):
    store = create(tmp_path)
    store.finalize()
    assert zarr.open_group(tmp_path, mode="r")["tokens"].shape == (0, 5, 7)
    assert verify.full(store) == []


# --- what is refused


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def put(document, path, value):
    *parents, last = path
    for key in parents:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["data_type"], "object", "data_type"),
        (["data_type"], "float64", "data_type"),
        (["data_type"], {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4}}, "data_type"),
        (["chunk_grid", "configuration", "chunk_shape"], [1 << 40, 5, 7], "chunk_grid"),
        (["chunk_grid", "name"], "rectilinear", "chunk_grid"),
        (["chunk_key_encoding", "name"], "v2", "chunk_key_encoding"),
        (["codecs"], [{"name": "bytes", "configuration": {"endian": "little"}}], "codecs"),
        (["codecs", 0, "configuration", "codecs", 0, "configuration", "endian"], "big", "codecs"),
        (["codecs", 0, "configuration", "codecs"], [{"name": "pickle"}], "codecs"),
        (["codecs", 0, "configuration", "index_location"], "start", "codecs"),
        (["fill_value"], 0.0, "fill_value"),
        (["storage_transformers"], [{"name": "x"}], "storage_transformers"),
        (["zarr_format"], 2, "zarr_format"),
        (["node_type"], "group", "node_type"),
        (["shape"], [8], "shape"),
        (["shape"], [9, 5, 7], "shape"),
        (["shape"], [8, 7, 5], "shape"),
        (["attributes"], None, "feature_spec"),
        (["attributes", "feature_spec", "layer"], 4, "feature_spec_digest"),
        (["attributes", "feature_spec", "layer"], "4", "FeatureSpec.layer"),
        (["attributes", "feature_spec_digest"], "0", "feature_spec_digest"),
    ],
)
def test_an_array_that_is_not_of_this_format_is_refused_by_field(tmp_path, path, value, field):
    create(tmp_path)
    edit(tmp_path / "tokens/zarr.json", lambda document: put(document, path, value))
    with pytest.raises(CacheCorrupt, match=rf"tokens/zarr.json: .*{field}"):
        FeatureStore.open(tmp_path, "tokens", TOKENS)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (
            ["attributes", "format_version"],
            4,
            CacheMismatch,
            r"format_version is 4; this program reads 3.\nUse the newer",
        ),
        (["attributes", "format_version"], "1", CacheCorrupt, "format_version must be"),
        (["attributes", "format"], "anndata", CacheMismatch, "another program's Zarr group"),
        (["attributes", "shard_frames"], 0, CacheCorrupt, "shard_frames"),
        (["node_type"], "array", CacheCorrupt, "node_type"),
    ],
)
def test_a_group_that_is_not_of_this_format_is_refused(tmp_path, path, value, error, message):
    create(tmp_path)
    edit(tmp_path / "zarr.json", lambda document: put(document, path, value))
    for attempt in (FeatureStore.open, FeatureStore.create):
        with pytest.raises(error, match=message):
            attempt(tmp_path, "tokens", TOKENS)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b" " * (2 << 20)])
@pytest.mark.parametrize("file", ["zarr.json", "tokens/zarr.json"])
def test_metadata_that_is_not_sound_json_is_corrupt_and_the_file_is_named(tmp_path, file, data):
    create(tmp_path).extend_plan({"ant": [0]})
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CacheCorrupt, match=re.escape(file)):
        _ = FeatureStore.open(tmp_path, "tokens").plan


@pytest.mark.parametrize("data", [b'{"a": NaN}', b'{"a": -Infinity}', b"[1]", b"\xff", b"{" * 9])
def test_only_a_strict_json_object_is_taken(data):
    assert files.parse_json(b'{"a": 1.5}') == {"a": 1.5}
    with pytest.raises(ValueError):  # noqa: PT011  the message differs
        files.parse_json(data)


def test_a_plan_of_a_newer_format_or_with_a_missing_generation_is_refused(tmp_path, monkeypatch):
    store = create(tmp_path)
    store.extend_plan({"ant": [0]})
    store.extend_plan({"bee": [0]})
    before = FeatureStore.open(tmp_path, "tokens").plan
    monkeypatch.setattr(plan_columns, "PLAN_VERSION", 4)
    first = before.segments[:1]
    (tmp_path / "plan/000001.npz").write_bytes(plan_columns.pack(Plan(8, first), before.segments[1:]))
    monkeypatch.undo()
    with pytest.raises(CacheMismatch, match=r"000001.npz: format_version is 4"):
        _ = FeatureStore.open(tmp_path, "tokens").plan
    (tmp_path / "plan/000000.npz").unlink()
    with pytest.raises(CacheCorrupt, match=r"000000.npz is missing, but 000001.npz exists"):
        FeatureStore.open(tmp_path, "tokens")


def test_a_shard_of_a_newer_format_is_refused_as_such(tmp_path, monkeypatch):
    store = create(tmp_path)
    store.extend_plan({"ant": [0]})
    monkeypatch.setattr(shard, "FORMAT_VERSION", 4)
    writer = ShardWriter(store.layout, 0)
    writer.begin(Part(store.plan.segments[0], 0, 0, 0, 1))
    writer.append(features("tokens", "ant", [0]))
    writer.end({})
    writer.finish()
    writer.partial.rename(store.layout.info.shard_file(0))
    monkeypatch.undo()
    with pytest.raises(CacheMismatch, match="format_version is 4"):
        store.pending()
    assert [problem.kind for problem in verify.quick(store)] == ["newer_format"]


@pytest.mark.parametrize("file", ["zarr.json", "tokens/zarr.json", "plan/000000.npz", "tokens/c.0.0.0"])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_link_or_a_pipe_in_the_place_of_a_file_is_refused(tmp_path, file, what):
    extract(tmp_path / "a", wanted={"ant": [0]})
    target = tmp_path / "a" / file
    target.rename(tmp_path / "elsewhere")
    if what == "link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(target)
    with pytest.raises(CacheCorrupt, match=re.escape(str(target))):
        FeatureStore.open(tmp_path / "a", "tokens").read("ant", [0])


def test_reading_and_writing_shards_need_neither_zarr_nor_torch(tmp_path):
    store = create(tmp_path)
    store.extend_plan({"ant": [0, 2]})
    code = (
        "import sys\n"
        "from tests.cache_schema.makers import *\n"
        f"store = FeatureStore.open({str(tmp_path)!r}, 'tokens')\n"
        "write_single(store, store.pending()[0], single())\n"
        "assert store.read('ant', [2]).shape == (1, 5, 7)\n"
        "print(sorted({'zarr', 'torch', 'pydantic', 'stages'} & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "[]"


def test_flipping_any_bit_of_a_footer_trailer_or_index_is_noticed_when_the_shard_is_opened(tmp_path):
    extract(tmp_path, wanted={"ant": [0, 1], "bee": [3]}, bad={"bee": 0})
    file = tmp_path / "tokens/c.0.0.0"
    size = file.stat().st_size
    for offset in range(2 * 128, size, 7):
        flip_bit(file, offset, offset % 8)
        with pytest.raises(CacheCorrupt, match=re.escape(str(file))):
            FeatureStore.open(tmp_path, "tokens").pending()
        flip_bit(file, offset, offset % 8)
    assert FeatureStore.open(tmp_path, "tokens").pending() == []
