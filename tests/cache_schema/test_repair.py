"""Repair: the damaged shards are made anew and nothing else; deeper checks: features again, videos again."""

from __future__ import annotations

import hashlib
import os
import shutil

import numpy as np
import pytest

from cache_schema import FeatureStore, SegmentFailed, SegmentResult, verify
from cache_schema.repair import repair_shard
from cache_schema.report import SourceFile
from tests.cache_schema.makers import SPECS, WANTED, extract, features, flip_bit, producer, tree, write_single
from tests.cache_schema.test_faults import (
    STRIDE,
    cut_a_page_out,
    delete,
    empty,
    flip_footer,
    flip_index,
    lengthen,
    other_store,
    shard_file,
    swap,
    swap_modalities,
    truncate,
    zero_the_end,
)

MODALITIES = list(SPECS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("repair") / "cache.zarr"
    extract(path, MODALITIES, bad={"dog": 1})
    return path


@pytest.fixture
def copy(sound, tmp_path):
    """A copy to damage. Shards: 0 ant + bee, 1-3 cat, 4 dog (failed), 5 elk."""
    shutil.copytree(sound, tmp_path / "cache.zarr")
    return tmp_path / "cache.zarr"


def flip_frame(path):
    flip_bit(shard_file(path, 0), 5 * STRIDE + 11)  # a frame of bee


def flip_padding(path):
    flip_bit(shard_file(path, 0), 2 * STRIDE - 1)


def damage_the_failed_one(path):
    truncate(path)
    os.truncate(shard_file(path, 4), 7)


def link(path):
    shard_file(path, 0).rename(path.parent / "elsewhere")
    shard_file(path, 0).symlink_to(path.parent / "elsewhere")


def repair_all(path, modality="tokens", **options):
    """What the command does: check in full, make the damaged shards anew, then the index."""
    asked = []
    store = FeatureStore.open(path, modality)
    produce = producer(MODALITIES, bad={"dog": 1}, on_batch=lambda s: asked.append((s.video_id, s.frame_index)))
    done = [repair_shard(store, number, produce, **options) for number in verify.damaged_shards(verify.full(store))]
    store.finalize()
    return done, asked


@pytest.mark.parametrize(
    ("damage", "videos"),
    [
        (delete, ["ant", "bee"]),
        (empty, ["ant", "bee"]),
        (truncate, ["ant", "bee"]),
        (lengthen, ["ant", "bee"]),
        (cut_a_page_out, ["ant", "bee"]),
        (zero_the_end, ["ant", "bee"]),
        (flip_footer, ["ant", "bee"]),
        (flip_index, ["ant", "bee"]),
        (swap, ["cat"]),
        (swap_modalities, ["ant", "bee"]),
        (other_store, ["ant", "bee"]),
        (link, ["ant", "bee"]),
        (flip_frame, ["bee"]),  # ant's frames are sound: they are copied
        (flip_padding, []),
        (damage_the_failed_one, ["ant", "bee", "dog"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_repair_gives_the_bytes_that_were_there_and_touches_nothing_else(copy, sound, damage, videos):
    damage(copy)
    assert verify.full(FeatureStore.open(copy, "tokens"))
    times = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if file.is_file() and not file.is_symlink()}
    before = {str(file): file.read_bytes() for file in times}
    done, asked = repair_all(copy)
    assert all(result.repaired for result in done)
    assert verify.full(FeatureStore.open(copy, "tokens")) == []
    assert tree(copy) == tree(sound)
    assert sorted({video for video, _ in asked}) == [video for video in videos if video != "dog"]
    for file, time in times.items():
        if file.read_bytes() == before[str(file)]:
            assert file.stat().st_mtime_ns == time, f"{file} was written although it was sound"


def test_of_a_long_video_only_the_frames_of_the_damaged_shard_are_made_again(copy, sound):
    flip_bit(shard_file(copy, 2), 3)
    (done,), asked = repair_all(copy)
    assert done.repaired
    assert {frame for _, index in asked for frame in index} == set(range(8, 16))
    assert tree(copy) == tree(sound)


def test_a_clean_store_needs_no_repair(copy, sound):
    assert repair_all(copy) == ([], [])
    assert tree(copy) == tree(sound)


def missing_now(_):
    raise SegmentFailed("missing_file", "nothing has this name")


@pytest.mark.parametrize("damage", [flip_frame, truncate, flip_footer])
def test_a_video_that_was_good_and_cannot_be_read_now_is_not_given_up(copy, damage):
    damage(copy)
    before = tree(copy)
    result = repair_shard(FeatureStore.open(copy, "tokens"), 0, missing_now)
    assert not result.repaired
    assert "was good and cannot be extracted now (nothing has this name)" in result.reason
    assert tree(copy) == before
    if damage is flip_frame:  # what is sound can still be read
        np.testing.assert_array_equal(
            FeatureStore.open(copy, "tokens").read("ant", [3], verify=True), features("tokens", "ant", [3])
        )


def other_file(segment):
    result = producer(MODALITIES)(segment)
    return SegmentResult(result.features, lambda: {"size": 99_999})


@pytest.mark.parametrize("damage", [flip_frame, flip_footer])
def test_frames_of_another_file_are_not_mixed_in(copy, damage):
    damage(copy)  # with the footer damaged, another modality still knows which file it was
    before = tree(copy)
    result = repair_shard(FeatureStore.open(copy, "tokens"), 0, other_file)
    assert not result.repaired
    assert "is another file now than the one it was extracted from" in result.reason
    assert tree(copy) == before


def test_a_replaced_video_is_made_again_where_that_is_asked_for(copy):
    store = FeatureStore.open(copy, "tokens")
    assert store.facts("ant") != {"size": 99_999}  # and what is known of the old shard is not told of the new one
    assert repair_shard(store, 0, other_file, changed={"ant"}).repaired
    assert store.facts("ant") == {"size": 99_999}
    assert store.facts("bee") == {"size": 3, "pts": [1, 5, 9]}
    assert verify.full(store) == []


@pytest.mark.parametrize("batches", [[np.zeros((4, 5, 7), np.float32)], [np.zeros((1, 5, 7), np.float16)], []])
def test_a_producer_that_gives_something_else_is_an_error_and_changes_nothing(copy, batches):
    flip_frame(copy)
    before = tree(copy)
    with pytest.raises(ValueError, match=r"a batch is|the producer gave"):
        repair_shard(FeatureStore.open(copy, "tokens"), 0, lambda _: SegmentResult({"tokens": b} for b in batches))
    assert tree(copy) == before


def test_a_repair_that_finds_a_feature_that_is_not_finite_keeps_the_old_shard(copy):
    flip_frame(copy)
    before = tree(copy)

    def produce(_):
        return SegmentResult(iter([{"tokens": np.full((3, 5, 7), np.nan, np.float16)}]))

    assert "feature that is NaN" in repair_shard(FeatureStore.open(copy, "tokens"), 0, produce).reason
    assert tree(copy) == before


# --- features again


@pytest.mark.parametrize("modality", ["tokens", "pooled/layer8"])
def test_features_that_are_made_again_the_same_are_no_problem(sound, modality):
    store = FeatureStore.open(sound, modality)
    asked = []
    produce = producer(MODALITIES, on_batch=lambda segment: asked.extend(segment.frame_index))
    assert verify.semantic(store, produce, frames=9) == ([], 0.0)
    assert verify.semantic(store, producer(MODALITIES), frames=1000)[0] == []


def test_the_sample_is_as_large_as_asked_and_another_seed_takes_other_frames(sound):
    store = FeatureStore.open(sound, "tokens")
    samples = [verify._sample(store, 9, seed) for seed in (0, 0, 1)]
    assert [sum(map(len, sample.values())) for sample in samples] == [9, 9, 9]
    assert samples[0] == samples[1] != samples[2]
    assert "dog" not in verify._sample(store, 1000, 0)
    assert sum(map(len, verify._sample(store, 1000, 0).values())) == 34


def test_features_that_come_out_otherwise_are_named_by_video_and_frame(sound):
    store = FeatureStore.open(sound, "tokens")

    def changed(segment):
        array = features("tokens", segment.video_id, segment.frame_index)
        if segment.video_id == "elk":
            array[segment.frame_index.index(4), 2, 3] += 2.0
        return SegmentResult(iter([{"tokens": array}]))

    problems, worst = verify.semantic(store, changed, frames=1000, tolerance=0.05)
    assert [(p.video_id, p.frame_index, p.kind, p.shard) for p in problems] == [("elk", 4, "differs", None)]
    elk = features("tokens", "elk", [4]).astype(np.float64)
    assert worst == pytest.approx(2.0 / np.linalg.norm(elk), rel=1e-2)
    assert verify.semantic(store, changed, frames=1000, tolerance=worst * 1.01)[0] == []


def test_nan_made_again_is_a_difference_and_a_video_that_is_gone_is_said_so(sound):
    store = FeatureStore.open(sound, "tokens")

    def produce(segment):
        if segment.video_id == "ant":
            missing_now(segment)
        return SegmentResult(iter([{"tokens": np.full((len(segment), 5, 7), np.nan, np.float16)}]))

    kinds = {(p.video_id, p.kind) for p in verify.semantic(store, produce, frames=1000)[0]}
    assert kinds == {("ant", "source_gone"), ("bee", "differs"), ("cat", "differs"), ("elk", "differs")}


# --- videos again


@pytest.fixture
def filmed(tmp_path):
    """A store whose facts are those of real files, and how to look at them."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for video in WANTED:
        (folder / video).write_bytes(video.encode() * 10)

    def look(video):
        file = folder / video
        if not file.exists():
            return None
        status = file.stat()
        return SourceFile(status.st_size, status.st_mtime, lambda: hashlib.sha256(file.read_bytes()).hexdigest())

    def produce(segment):
        result = producer(["tokens"])(segment)
        file = look(segment.video_id)
        return SegmentResult(result.features, lambda: {"size": file.size, "sha256": file.sha256()})

    store = extract(tmp_path / "cache.zarr", wanted={})["tokens"]
    store.extend_plan(WANTED)
    for task in store.pending():
        write_single(store, task, lambda s: SegmentResult((b["tokens"] for b in produce(s).features), produce(s).facts))
    return store, folder, look


def test_17_a_video_replaced_in_place_is_reported(filmed):
    store, folder, look = filmed
    assert verify.sources(store, look) == verify.sources(store, look, hashed=True) == []
    (folder / "cat").write_bytes(b"a longer film than before, of the same name")
    (folder / "elk").unlink()
    found = {(p.video_id, p.kind) for p in verify.sources(store, look)}
    assert found == {("cat", "source_changed"), ("elk", "source_gone")}


def test_17_a_replacement_of_the_same_size_is_found_by_its_time_or_by_its_hash(filmed):
    store, folder, look = filmed
    (folder / "cat").write_bytes(b"tac" * 10)
    os.utime(folder / "cat", (4e9, 4e9))
    assert [p.video_id for p in verify.sources(store, look)] == ["cat"]
    os.utime(folder / "cat", (1, 1))
    assert verify.sources(store, look) == []
    assert [p.video_id for p in verify.sources(store, look, hashed=True)] == ["cat"]


def test_17_a_file_that_was_only_touched_is_no_problem(filmed):
    store, folder, look = filmed
    os.utime(folder / "cat", (4e9, 4e9))
    assert verify.sources(store, look) == []
