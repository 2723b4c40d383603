"""The file of a growth: the same plan comes back, any flipped bit is refused or changes nothing, no rule is broken."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, FeatureStore, orphans, verify
from cache_schema.plan import Plan, Segments
from cache_schema.plan_columns import ARRAYS, Columns, pack, unpack
from tests.cache_schema.makers import SPECS, WANTED, create, extract, features, flip_bit

ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4)
frames = st.lists(st.integers(0, 60), min_size=1, max_size=25)
growths = st.lists(st.dictionaries(ids, frames, min_size=1, max_size=8), min_size=1, max_size=3)


def same(a: Plan, b: Plan, wanted: list[dict[str, list[int]]]) -> None:
    """Every public answer of two plans is equal."""
    assert (a.num_shards, a.num_frames, a.videos, a.tasks()) == (b.num_shards, b.num_frames, b.videos, b.tasks())
    assert a == b
    assert [a.segments[-1], *a.segments[1:3]] == [b.segments[-1], *b.segments[1:3]]
    for shard in range(a.num_shards):
        assert a.parts(shard) == b.parts(shard)
        assert a.task_of(shard) == b.task_of(shard)
    for video, index in [pair for growth in wanted for pair in growth.items()]:
        assert a.segments_of(video) == b.segments_of(video)
        assert a.find(video, [*index, 99]).tolist() == b.find(video, [*index, 99]).tolist()
        assert [a.row(video, frame) for frame in index] == b.rows(video, index).tolist()
    for stranger in ("", "zzzzz", "\ud800"):
        assert (a.segments_of(stranger), a.row(stranger, 0), a.find(stranger, [0]).tolist()) == ((), -1, [-1])


@given(wanted=growths)
@settings(max_examples=60)
def test_a_plan_from_files_answers_like_the_one_that_was_made(wanted):
    made, read = Plan.empty(8), Plan.empty(8)
    for growth in wanted:
        grown = made.extended(growth)
        if grown is made:
            continue
        data = pack(made, grown.segments[len(made.segments) :])
        read = read.grown_by(unpack(data, read))
        made = grown
    same(read, made, wanted)


def test_a_store_of_two_growths_is_extracted_read_checked_and_grown(tmp_path):
    extract(tmp_path / "a", list(SPECS))
    extract(tmp_path / "a", list(SPECS), wanted={**WANTED, "fox": [3], "ant": range(15)})
    store = FeatureStore.open(tmp_path / "a", "tokens")
    assert isinstance(store.plan.segments, Segments)
    assert all(isinstance(block, Columns) for block in store.plan.segments.blocks)
    for video, index in {**WANTED, "fox": [3], "ant": range(15)}.items():
        np.testing.assert_array_equal(store.read(video, index), features("tokens", video, index))
        np.testing.assert_array_equal(store.read(video, index[:1]), features("tokens", video, index[:1]))
    assert store.pending() == []
    assert verify.full(store) == []
    assert orphans.find(tmp_path / "a") == []
    assert pickle.loads(pickle.dumps(store)).plan.tasks() == store.plan.tasks()
    assert sorted(file.name for file in (tmp_path / "a/plan").iterdir()) == ["000000.npz", "000001.npz", "zarr.json"]


def test_any_flipped_bit_and_any_truncation_is_refused_by_name_or_changes_nothing(tmp_path):
    whole = create(tmp_path).extend_plan(WANTED)
    file = tmp_path / "plan/000000.npz"
    sound, refused = file.read_bytes(), 0
    for offset in range(len(sound)):
        flip_bit(file, offset, offset % 8)
        try:
            assert FeatureStore.open(tmp_path, "tokens").plan == whole  # a time or a version in a header of zip
        except CacheCorrupt as error:
            assert "plan/000000.npz is damaged" in str(error)  # noqa: PT017
            refused += 1
        file.write_bytes(sound)
    assert refused > len(sound) * 0.7
    for size in (0, 5, len(sound) // 2, len(sound) - 1):
        os.truncate(file, size)
        with pytest.raises(CacheCorrupt, match=r"000000\.npz is damaged"):
            _ = FeatureStore.open(tmp_path, "tokens").plan
        file.write_bytes(sound)


def test_numpy_alone_reads_the_plan(tmp_path):
    plan = create(tmp_path).extend_plan(WANTED)
    with np.load(tmp_path / "plan/000000.npz", allow_pickle=False) as file:
        assert set(file) == set(ARRAYS)
        assert file["about"].tolist() == [3, 8, 0]
        assert bytes(file["id"]).decode().split("\0")[:-1] == list(WANTED)
        first, end = file["run_at"][2:4]
        assert file["runs"][first:end].tolist() == [[0, 1, 20]]
        assert file["start"].tolist() == [segment.start for segment in plan.segments]


SOUND = Plan.empty(8).extended({"a": range(3), "b": [1, 2, 7], "c": range(9)})


def changed(name, at, value):
    """The file of SOUND with one number changed, and zip's checksums right."""
    with np.load(io.BytesIO(pack(Plan.empty(8), SOUND.segments))) as file:
        arrays = dict(file)
    arrays[name] = arrays[name].copy()
    arrays[name][at] = value
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("about", 1, 4, "shards have 4 frames"),
        ("about", 2, 1, "begins at shard 1"),
        ("start", 0, -1, "crosses shards|rows of another"),
        ("start", 0, 6, "rows of another|crosses shards"),
        ("start", 1, 1, "rows of another"),
        ("start", 2, 9, "crosses shards"),
        ("run_at", 0, 1, "run_at"),
        ("run_at", 2, 1, "run_at"),
        ("runs", (0, 0), -1, "a run"),
        ("runs", (0, 1), 0, "a run"),
        ("runs", (0, 2), 0, "a run"),
        ("runs", (1, 2), 2**31 - 1, "a run"),
        ("runs", (2, 0), 2, "a run"),
        ("id", 0, 0xFF, "Unicode"),
        ("id", 0, ord("z"), "not sorted"),
        ("id", 2, 0, "1 to 4096 bytes|one entry"),
        ("id", 5, 65, "one entry"),
    ],
)
def test_a_file_that_breaks_a_rule_of_the_plan_is_refused_even_with_right_checksums(name, at, value, message):
    with pytest.raises(ValueError, match=message):
        unpack(changed(name, at, value), Plan.empty(8))


def test_a_frame_that_is_planned_twice_is_refused():
    data = pack(SOUND, Plan.empty(8).extended({"b": [0, 7]}).segments)
    with pytest.raises(ValueError, match="rows of another"):
        unpack(data, SOUND)
    later = SOUND.extended({"b": [0, 3]}).segments[len(SOUND.segments) :]
    assert len(unpack(pack(SOUND, later), SOUND)) == 1
    twice = [type(later[0])("b", (0, 7), later[0].start)]
    with pytest.raises(ValueError, match="'b' has a frame that is planned twice"):
        unpack(pack(SOUND, twice), SOUND)


@pytest.mark.parametrize("how", ["compressed", "a pickle", "a huge shape", "another type", "no array", "missing"])
def test_a_file_that_numpy_would_not_read_safely_is_refused(how):
    good, data = pack(Plan.empty(8), SOUND.segments), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name == "runs.npy" and how == "missing":
                continue
            if name == "runs.npy" and how in ("a pickle", "another type"):
                file, kind = io.BytesIO(), object if how == "a pickle" else np.int16
                np.lib.format.write_array(file, np.ones((3, 3), kind), allow_pickle=True)
                raw = file.getvalue()
            if name == "runs.npy" and how == "a huge shape":
                size = re.search(rb"\(\d, 3\), \}", raw)[0]
                raw = raw.replace(size, size.replace(b"(4", b"(" + b"9" * 9)[: len(size)])
            if name == "runs.npy" and how == "no array":
                raw = b"rows"
            method = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name), raw, compress_type=method)
    with pytest.raises(ValueError):  # noqa: PT011  the message differs
        unpack(data.getvalue(), Plan.empty(8))
