"""The columns of a large plan: the same plan as the JSON gives, and never more than a copy of it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import struct

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import FeatureStore, orphans, plan_columns, planfile, verify
from cache_schema.plan import Plan, Segments, apply_generation, generation_document
from cache_schema.plan_columns import HEADER, Columns, pack, unpack
from tests.cache_schema.makers import SPECS, WANTED, create, extract, features, flip_bit, tree


@pytest.fixture
def every_size(monkeypatch):
    """Columns beside every growth, however small."""
    monkeypatch.setattr(planfile, "LARGE", 1)


ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4)
frames = st.lists(st.integers(0, 60), min_size=1, max_size=25)
growths = st.lists(st.dictionaries(ids, frames, min_size=1, max_size=8), min_size=1, max_size=3)


def same(a: Plan, b: Plan, wanted: list[dict[str, list[int]]]) -> None:
    """Every public answer of two plans is equal."""
    assert (a.num_shards, a.num_frames, a.videos, a.tasks()) == (b.num_shards, b.num_frames, b.videos, b.tasks())
    assert list(a.segments) == list(b.segments)
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


@given(wanted=growths, columns=st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=60)
def test_a_plan_of_columns_answers_like_one_of_json(wanted, columns):
    by_json, mixed = Plan.empty(8), Plan.empty(8)
    for growth, large in zip(wanted, columns, strict=False):
        grown = by_json.extended(growth)
        if grown is by_json:
            continue
        document, data = generation_document(by_json, grown), repr(growth).encode()
        added = grown.segments[len(by_json.segments) :]
        made = unpack(pack(by_json, added, data), mixed, data) if large else None
        grows = any(by_json.segments_of(segment.video_id) for segment in added)  # such a growth is left to the JSON
        assert (made is not None) == (large and not grows)
        mixed = apply_generation(mixed, document) if made is None else mixed.grown_by(made)
        by_json = grown
    same(mixed, by_json, wanted)


@pytest.mark.usefixtures("every_size")
def test_a_store_with_columns_is_extracted_read_checked_and_grown_like_any(tmp_path, monkeypatch):
    extract(tmp_path / "a", list(SPECS))
    extract(tmp_path / "a", list(SPECS), wanted={**WANTED, "fox": [3], "ant": range(15)})
    store = FeatureStore.open(tmp_path / "a", "tokens")
    assert isinstance(store.plan.segments, Segments)
    assert isinstance(store.plan.segments.blocks[0], Columns)
    assert isinstance(store.plan.segments.blocks[1], tuple)  # ant has frames in both
    for video, index in {**WANTED, "fox": [3], "ant": range(15)}.items():
        np.testing.assert_array_equal(store.read(video, index), features("tokens", video, index))
        np.testing.assert_array_equal(store.read(video, index[:1]), features("tokens", video, index[:1]))
    assert store.pending() == []
    assert verify.full(store) == []
    assert orphans.find(tmp_path / "a") == []
    assert pickle.loads(pickle.dumps(store)).plan.tasks() == store.plan.tasks()
    with_columns = tree(tmp_path / "a")
    monkeypatch.setattr(planfile, "LARGE", 1 << 20)
    extract(tmp_path / "b", list(SPECS))
    extract(tmp_path / "b", list(SPECS), wanted={**WANTED, "fox": [3], "ant": range(15)})
    assert {name: data for name, data in with_columns.items() if ".columns" not in name} == tree(tmp_path / "b")
    assert [name for name in with_columns if ".columns" in name] == ["plan/000000.columns", "plan/000001.columns"]


@pytest.mark.usefixtures("every_size")
def test_any_flipped_bit_and_any_truncation_of_the_columns_leaves_the_plan_as_it_is(tmp_path):
    whole = create(tmp_path).extend_plan(WANTED)
    file = tmp_path / "plan/000000.columns"
    sound = file.read_bytes()
    for offset in range(len(sound)):
        flip_bit(file, offset, offset % 8)
        assert unpack(file.read_bytes(), Plan.empty(8), (tmp_path / "plan/000000.json").read_bytes()) is None
        file.write_bytes(sound)
    for size in (0, 5, HEADER.size, len(sound) - 1):
        os.truncate(file, size)
        plan = FeatureStore.open(tmp_path, "tokens").plan
        assert (plan.tasks(), isinstance(plan.segments, tuple)) == (whole.tasks(), True)
        create(tmp_path).extend_plan(WANTED)  # the next extraction makes it again
        assert file.read_bytes() == sound


@pytest.mark.usefixtures("every_size")
def test_columns_of_another_plan_are_not_believed(tmp_path):
    create(tmp_path / "a").extend_plan({"a": range(3), "b": range(4)})
    create(tmp_path / "b").extend_plan({"a": range(4), "b": range(3)})
    other = (tmp_path / "a/plan/000000.columns").read_bytes()
    (tmp_path / "b/plan/000000.columns").write_bytes(other)
    assert FeatureStore.open(tmp_path / "b", "tokens").plan.rows("b", [0]).tolist() == [4]


@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        *(("start", 0, 6), ("start", 1, 1), ("step", 0, 0), ("count", 0, 0), ("first", 0, -1), ("count", 1, 2**31 - 1)),
        *(("id", 0, 0xFF), ("id", 0, ord("z")), ("id", 2, 0), ("first_shard", 0, 1), ("S", 0, 4), ("runs", 0, 1 << 40)),
    ],
)
def test_columns_that_break_a_rule_of_the_plan_are_refused_even_with_a_right_checksum(field, at, value):
    plan = Plan.empty(8).extended({"a": range(3), "b": [1, 2, 7], "c": range(9)})
    data = bytearray(pack(Plan.empty(8), plan.segments, b"document"))
    assert unpack(bytes(data), Plan.empty(8), b"document") is not None
    runs = HEADER.size + 3 * 8 + 4 * 8
    place, kind = {
        "start": (HEADER.size + 8 * at, "<q"),
        "first": (runs + 12 * at, "<i"),
        "step": (runs + 12 * at + 4, "<i"),
        "count": (runs + 12 * at + 8, "<i"),
        "id": (len(data) - 6 + at, "<B"),
        "S": (24, "<Q"),
        "first_shard": (32, "<Q"),
        "runs": (48, "<Q"),
    }[field]
    struct.pack_into(kind, data, place, value)
    head, body = bytes(data[: HEADER.size - 4]), bytes(data[HEADER.size :])
    struct.pack_into("<I", data, HEADER.size - 4, crc32c(body, crc32c(head)))
    assert unpack(bytes(data), Plan.empty(8), b"document") is None


def test_a_large_plan_takes_columns_and_a_small_one_does_not(tmp_path):
    create(tmp_path).extend_plan({f"video {number}": [0, 5] for number in range(3)})
    assert list((tmp_path / "plan").glob("*.columns")) == []
    create(tmp_path).extend_plan({f"video {number:06}": [0, 5] for number in range(30_000)})
    assert [path.name for path in (tmp_path / "plan").glob("*.columns")] == ["000001.columns"]
    store = FeatureStore.open(tmp_path, "tokens")
    assert store.plan.row("video 029999", 5) == store.plan.segments[-1].start + 1
    assert dataclasses.is_dataclass(store.plan.segments_of("video 2")[0])
    assert plan_columns.VERSION == 1
