"""An export as plain Zarr: what a reader sees that has zarr-python and nothing of this project."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema import CacheCorrupt, CacheMismatch, FeatureStore, SegmentResult, calibrate
from cache_schema.export import plain
from cache_schema.index import STATUS
from tests.cache_schema import test_quantize as quantize
from tests.cache_schema.makers import WANTED, extract, features, flip_bit, write_single

READER = """
import sys
sys.modules["cache_schema"] = None  # any import of it fails
import numpy, warnings, zarr
warnings.simplefilter("error")
group = zarr.open_group(sys.argv[1], mode="r")
numpy.save(sys.argv[2], group[sys.argv[3]][:])
try:
    import cache_schema
except ImportError:
    print("alone")
"""


def read_elsewhere(folder: Path, name: str) -> np.ndarray:
    """A whole array, read by zarr in a process that cannot import this package."""
    out = folder.parent / "read.npy"
    command = [sys.executable, "-I", "-c", READER, str(folder), str(out), name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr
    return np.load(out)


def make(path: Path, bad: str = "") -> FeatureStore:
    """Three videos of int8 tokens, one longer than a shard of 8."""
    scale = calibrate(quantize.tokens(200))
    store = FeatureStore.create(path, "tokens", quantize.SPEC, shard_frames=8, channel_scale=scale)
    store.extend_plan({"a": range(5), "b": range(20), "c": [3, 1]})

    def produce(segment):
        made = quantize.tokens(len(segment), seed=ord(segment.video_id))
        if segment.video_id == bad:
            made[1, 2, 3] = np.inf
        return SegmentResult(iter([made]))

    for task in store.pending():
        write_single(store, task, produce)
    store.finalize()
    return store


def test_int8_is_exported_as_the_float16_that_a_read_gives(tmp_path):
    store = make(tmp_path / "store")
    with_codec = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(tmp_path / "store"), str(tmp_path / "x.npy"), "tokens"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert with_codec.returncode != 0  # the store itself does need the package: so the export is worth something
    report = plain({"tokens": store}, tmp_path / "plain")
    assert (report.videos, report.frames, report.files, report.skipped) == (3, 27, 5, {})
    array = read_elsewhere(tmp_path / "plain", "tokens")
    assert (array.dtype, array.shape) == (np.float16, (40, *quantize.SHAPE))
    planned = np.zeros(40, bool)
    for segment in store.plan.segments:
        planned[segment.start : segment.stop] = True
        expected = store.read(segment.video_id, segment.frame_index)
        np.testing.assert_array_equal(array[segment.start : segment.stop], expected)
    assert np.isnan(array[~planned]).all()
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "plain/tokens").glob("c.*"))


def test_all_modalities_and_the_index_come_along_and_failed_videos_are_named(tmp_path):
    names = ["tokens", "pooled/layer8", "tokens_large"]
    stores = extract(tmp_path / "store", names, bad={"dog": 1})
    report = plain(stores, tmp_path / "plain")
    assert (report.videos, report.frames) == (4, 34)
    assert list(report.skipped) == ["dog"]
    assert "truncated" in report.skipped["dog"]
    ids = bytes(read_elsewhere(tmp_path / "plain", "videos/id")).split(b"\0")[:-1]
    start, length = (read_elsewhere(tmp_path / "plain", f"videos/{name}") for name in ("start", "length"))
    status = read_elsewhere(tmp_path / "plain", "videos/status/pooled/layer8")
    assert [i.decode() for i in ids] == list(WANTED)
    for name in names:
        array = read_elsewhere(tmp_path / "plain", name)
        for video, first, count, code in zip(WANTED, start, length, status, strict=True):
            rows = array[first : first + count]
            if video == "dog":
                assert code == STATUS["failed"]
                assert np.isnan(rows).all()
            else:
                np.testing.assert_array_equal(rows, features(name, video, sorted(WANTED[video])))


def test_an_export_is_no_store_that_could_be_taken_for_an_exact_one(tmp_path):
    store = make(tmp_path / "store")
    plain({"tokens": store}, tmp_path / "plain")
    with pytest.raises(CacheMismatch, match="another program's Zarr group"):
        FeatureStore.open(tmp_path / "plain", "tokens", replace(store.spec, dtype="float16"))


def test_a_damaged_frame_ends_the_export_and_leaves_nothing(tmp_path):
    store = make(tmp_path / "store", bad="a")
    assert list(plain({"tokens": store}, tmp_path / "plain").skipped) == ["a"]
    flip_bit(store.layout.info.shard_file(1), 100)
    with pytest.raises(CacheCorrupt, match="'b'"):
        plain({"tokens": store}, tmp_path / "more")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "store"]
    with pytest.raises(FileExistsError):
        plain({"tokens": store}, tmp_path / "plain")
