"""FeatureStore: what goes in comes out, who may open it, and what it says is missing."""

from __future__ import annotations

import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import (
    CacheMismatch,
    CacheMissing,
    FeatureStore,
    Plan,
    SegmentFailed,
    SegmentResult,
    write_task,
)
from cache_schema.shard import read_records
from tests.cache_schema.makers import (
    POOLED,
    SPECS,
    TOKENS,
    WANTED,
    create,
    extract,
    features,
    producer,
    single,
    tree,
    write_single,
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of all three modalities with a run of shards and a failed video; read-only."""
    path = tmp_path_factory.mktemp("store") / "cache.zarr"
    extract(path, list(SPECS), bad={"dog": 1})
    return path


readable = st.sampled_from(sorted(set(WANTED) - {"dog"})).flatmap(
    lambda video: st.tuples(st.just(video), st.lists(st.sampled_from(sorted(WANTED[video])), max_size=30))
)


@pytest.mark.parametrize("modality", SPECS)
@given(asked=readable)
@settings(max_examples=40)
def test_what_was_written_is_read_in_any_order_with_repeats(filled, modality, asked):
    video, frames = asked
    store = FeatureStore.open(filled, modality, SPECS[modality])
    got = store.read(video, frames, verify=True)
    assert got.dtype == SPECS[modality].dtype
    np.testing.assert_array_equal(got, features(modality, video, frames))


def test_read_fills_the_array_it_is_given_and_refuses_one_that_does_not_fit(filled):
    store = FeatureStore.open(filled, "tokens")
    out = np.zeros((2, 5, 7), np.float16)
    assert store.read("bee", [9, 1], out=out) is out
    np.testing.assert_array_equal(out, features("tokens", "bee", [9, 1]))
    for unfit in (np.zeros((3, 5, 7), np.float16), np.zeros((2, 5, 7), np.float32), np.zeros((2, 7, 5), np.float16).mT):
        with pytest.raises(ValueError, match="out must be"):
            store.read("bee", [9, 1], out=unfit)


@pytest.mark.parametrize(
    ("video", "frames", "why"),
    [
        ("bee", [1, 2], "not planned: frame 2"),
        ("fox", [0], "not planned: frame 0"),
        ("dog", [3, 2], r"failed as truncated \(header 9.0 s, decodable 1 frames\): frames 2, 3"),
    ],
)
def test_reading_what_is_not_there_says_which_frames_and_why_and_the_command(filled, video, frames, why):
    store = FeatureStore.open(filled, "tokens", help_command="pipeline extract-clip --preset lvu")
    with pytest.raises(CacheMissing, match=f"'{video}': {why}") as caught:
        store.read(video, frames)
    assert str(caught.value).splitlines()[-1] == "  pipeline extract-clip --preset lvu"


def test_a_frame_index_that_is_not_an_integer_is_refused(filled):
    with pytest.raises(ValueError, match="'bee'"):
        FeatureStore.open(filled, "tokens").read("bee", [1.0])


def test_status_and_missing_come_from_the_footers(filled):
    store = FeatureStore.open(filled, "tokens")
    status = store.status()
    assert {video: state.ok for video, state in status.items()} == dict.fromkeys(WANTED, True) | {"dog": False}
    assert (status["dog"].kind, status["cat"].frames) == ("truncated", 20)
    missing = store.missing({"ant": [0, 1, 3], "bee": [5], "dog": [2], "fox": [0, 0]})
    assert sorted(missing) == ["ant", "dog", "fox"]
    assert missing["ant"].not_planned == (1,)
    assert (missing["dog"].failed, missing["dog"].kind) == ((2,), "truncated")
    assert missing["fox"].frames == (0,)


def test_frames_that_are_planned_and_not_extracted_are_missing_in_that_modality_only(tmp_path):
    tokens, pooled = create(tmp_path), create(tmp_path, "pooled/layer8")
    tokens.extend_plan({"ant": [0, 1]})
    assert pooled.plan == tokens.plan
    for task in tokens.pending():
        write_single(tokens, task, single())
    assert tokens.missing({"ant": [0, 1]}) == {}
    assert pooled.missing({"ant": [0, 1]})["ant"].not_committed == (0, 1)
    assert (len(tokens.pending()), len(pooled.pending())) == (0, 1)


def test_a_failed_video_leaves_its_slots_empty_and_does_not_block_its_shard(filled):
    store = FeatureStore.open(filled, "tokens")
    shard = store.shard(int(store.plan.rows("dog", [2])[0]) // 8)
    assert [(record.video_id, record.ok) for record in shard.records] == [("dog", False)]
    assert not shard.present.any()
    assert store.pending() == []
    assert [task.segments[0].video_id for task in store.pending(retry_failed=True)] == ["dog"]


@pytest.mark.parametrize("bad", ["ant", "bee", "cat"])
def test_retry_produces_only_the_failed_video_and_ends_byte_equal_to_a_run_without_failure(tmp_path, bad):
    asked = []
    modalities = ["tokens", "pooled/layer8", "tokens_large"]
    extract(tmp_path / "a", modalities, bad={bad: 2})
    extract(tmp_path / "a", modalities, retry_failed=True, on_batch=lambda segment: asked.append(segment.video_id))
    extract(tmp_path / "b", modalities)
    assert set(asked) == {bad}
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_retry_that_fails_again_changes_nothing_but_the_reason(tmp_path):
    store = extract(tmp_path / "a", bad={"bee": 2})["tokens"]
    before, inode = tree(tmp_path / "a"), store.shard(0).file.stat().st_ino
    extract(tmp_path / "a", retry_failed=True, bad={"bee": 2})
    assert tree(tmp_path / "a") == before
    assert store.shard(0).file.stat().st_ino == inode
    extract(tmp_path / "a", retry_failed=True, bad={"bee": 0})
    assert store.status()["bee"].reason.endswith("0 frames")
    np.testing.assert_array_equal(store.read("ant", [3]), features("tokens", "ant", [3]))


def test_writing_a_committed_task_does_nothing(tmp_path):
    store = extract(tmp_path / "a")["tokens"]
    before = tree(tmp_path / "a")

    def never(_):
        raise AssertionError("a committed video was produced again")

    assert all(write_single(store, task, never).skipped for task in store.plan.tasks())
    assert tree(tmp_path / "a") == before


def test_together_writes_the_bytes_that_each_modality_alone_would_write(tmp_path):
    extract(tmp_path / "a", ["tokens", "pooled/layer8"], bad={"elk": 4})
    for modality in ("tokens", "pooled/layer8"):
        extract(tmp_path / "b", [modality], bad={"elk": 4})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_together_leaves_a_modality_alone_that_is_committed_already(tmp_path):
    stores = {name: create(tmp_path, name) for name in ("tokens", "pooled/layer8")}
    task = stores["tokens"].extend_plan({"ant": [0, 1]}).tasks()[0]
    write_single(stores["tokens"], task, single())
    reports = write_task(stores, task, producer(list(stores)))
    assert {name: report.skipped for name, report in reports.items()} == {"tokens": True, "pooled/layer8": False}


@given(batch_size=st.integers(1, 25))
@settings(max_examples=6)
def test_the_batch_size_does_not_change_a_byte(tmp_path_factory, filled, batch_size):
    path = tmp_path_factory.mktemp("batch") / "cache.zarr"
    extract(path, list(SPECS), bad={"dog": 1}, batch_size=batch_size)
    assert tree(path) == tree(filled)


def shards_of(folder):
    return {name: data for name, data in tree(folder).items() if name.startswith("c.")}


def test_videos_added_later_get_new_shards_and_no_committed_file_changes(tmp_path):
    store = extract(tmp_path / "a")["tokens"]
    shards = shards_of(tmp_path / "a/tokens")
    rows = {video: store.plan.rows(video, list(index)).tolist() for video, index in WANTED.items()}
    extract(tmp_path / "a", wanted={**WANTED, "aardvark": [0, 1], "ant": [0, 1]})
    grown = shards_of(tmp_path / "a/tokens")
    assert len(grown) > len(shards)
    assert {name: grown[name] for name in shards} == shards
    assert {video: store.plan.rows(video, list(index)).tolist() for video, index in WANTED.items()} == rows
    np.testing.assert_array_equal(store.read("ant", [1, 0, 9]), features("tokens", "ant", [1, 0, 9]))
    assert store.status()["ant"].frames == 5


def test_the_array_is_long_enough_for_the_plan_before_anything_is_written(tmp_path):
    store = create(tmp_path)
    store.extend_plan(WANTED)
    assert zarr.open_group(tmp_path, mode="r")["tokens"].shape == (store.plan.num_shards * 8, 5, 7)
    assert create(tmp_path, "pooled/layer8").plan == store.plan
    assert zarr.open_group(tmp_path, mode="r")["pooled/layer8"].shape == (store.plan.num_shards * 8, 11)


def test_an_open_store_sees_what_another_one_adds(tmp_path):
    reader = create(tmp_path)
    with pytest.raises(CacheMissing, match="not planned"):
        reader.read("ant", [0])
    extract(tmp_path)
    np.testing.assert_array_equal(reader.read("ant", [0]), features("tokens", "ant", [0]))


def test_threads_can_share_a_store(tmp_path):
    extract(tmp_path)
    for video in ("fox", "gnu", "hen"):
        extract(tmp_path, wanted={video: [1, 2]})
    for _ in range(20):
        store, barrier = FeatureStore.open(tmp_path, "tokens"), threading.Barrier(4)

        def read(_, store=store, barrier=barrier):
            barrier.wait()
            return store.read("hen", [2, 1])

        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(read, range(4)):
                np.testing.assert_array_equal(got, features("tokens", "hen", [2, 1]))


def test_a_store_can_be_moved_and_pickled(tmp_path):
    store = extract(tmp_path / "a")["tokens"]
    assert pickle.loads(pickle.dumps(store)).status() == store.status()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = FeatureStore.open(tmp_path / "b", "tokens", TOKENS)
    np.testing.assert_array_equal(moved.read("elk", [6]), features("tokens", "elk", [6]))


def test_18_no_file_of_a_store_holds_where_it_lies(tmp_path):
    extract(tmp_path / "a-place-of-its-own", list(SPECS), bad={"dog": 1})
    for name, data in tree(tmp_path / "a-place-of-its-own").items():
        assert b"a-place-of-its-own" not in data, name
        assert str(tmp_path).encode() not in data, name


def test_facts_of_the_source_are_kept_also_for_a_run_of_shards(filled):
    store = FeatureStore.open(filled, "tokens")
    assert store.facts("cat") == {"size": 3, "pts": list(range(20))}
    shards = store.plan.task_of(int(store.plan.rows("cat", [0])[0]) // 8).shards
    facts = [read_records(store.layout, store.shard(number).file)[0].facts for number in shards]
    assert facts == [store.facts("cat"), {}, {}]
    assert store.facts("dog") == {}
    with pytest.raises(CacheMissing, match="'fox'"):
        store.facts("fox")


def test_the_facts_of_all_videos_take_one_look_at_each_footer(filled, monkeypatch):
    store, read = FeatureStore.open(filled, "tokens"), []
    monkeypatch.setattr("cache_schema.store.read_records", lambda *to: read.append(to[1]) or read_records(*to))
    for segment in store.plan.segments:
        store.facts(segment.video_id)
    assert len(read) == len(set(read)) < len(store.plan.segments)


# --- who may open it


def test_another_spec_is_refused_with_the_differing_fields_and_the_command(tmp_path):
    create(tmp_path)
    wanted = replace(TOKENS, layer=12, decoder="PyAV 19")
    for opener in (FeatureStore.open, FeatureStore.create):
        with pytest.raises(CacheMismatch) as caught:
            opener(tmp_path, "tokens", wanted, help_command="pipeline extract-clip --cache OTHER")
        assert caught.value.differences == {"layer": (3, 12), "decoder": ("PyAV 18", "PyAV 19")}
        assert str(caught.value) == (
            f"{tmp_path / 'tokens'} was made with other settings than this run wants.\n"
            "  field    cached   wanted\n"
            "  layer    3        12\n"
            "  decoder  PyAV 18  PyAV 19\n"
            "Use it as it is, with the cached values above, or make another in a new folder:\n"
            "  pipeline extract-clip --cache OTHER"
        )
        assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences


def test_an_existing_store_keeps_its_own_shard_size(tmp_path):
    create(tmp_path, shard_frames=8)
    assert create(tmp_path, shard_frames=100).shard_frames == 8
    assert create(tmp_path, "pooled/layer8", shard_frames=100).shard_frames == 8


def test_modalities_of_one_store_must_share_the_frame_rule(tmp_path):
    create(tmp_path)
    with pytest.raises(CacheMismatch) as caught:
        FeatureStore.create(tmp_path, "pooled/layer8", replace(POOLED, frame_rule="grid 2 fps"))
    assert list(caught.value.differences) == ["frame_rule"]
    assert not (tmp_path / "pooled").exists()


def test_a_folder_without_a_cache_or_without_the_modality_is_named_with_the_command(tmp_path):
    with pytest.raises(CacheMissing, match=r"There is no cache at .*\n  pipeline extract-clip$"):
        FeatureStore.open(tmp_path / "none", "tokens")
    create(tmp_path)
    with pytest.raises(CacheMissing, match=r"holds no 'pooled/layer8' yet.*\n  pipeline extract-teacher$"):
        FeatureStore.open(tmp_path, "pooled/layer8")


@pytest.mark.parametrize("modality", ["", "../x", "/tokens", "tokens/", "Tokens", "plan", "videos/x", "a/b/c/d", "c d"])
def test_a_modality_name_that_could_leave_its_place_is_refused(tmp_path, modality):
    with pytest.raises(ValueError, match="a modality is named like"):
        FeatureStore.create(tmp_path, modality, TOKENS)


# --- what a producer may not do


def task_of(tmp_path, frames=5):
    store = create(tmp_path)
    return store, store.extend_plan({"ant": range(frames)}).tasks()[0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([np.zeros((5, 5, 7), np.float32)], "a batch must be float16"),
        ([np.zeros((5, 7, 5), np.float16)], r"not float16 \[5, 7, 5\]"),
        ([np.zeros((4, 5, 7), np.float16)], "gave 4 of the 5 frames of video 'ant'"),
        ([np.zeros((3, 5, 7), np.float16)] * 2, "more than the 5 frames"),
        ([], "gave 0 of the 5 frames"),
    ],
)
def test_wrong_dtype_shape_or_count_is_an_error_and_publishes_nothing(tmp_path, batches, message):
    store, task = task_of(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_single(store, task, lambda _: SegmentResult(iter(batches)))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "frame 3 has a feature that is NaN$"),
        (-np.nan, "frame 3 has a feature that is NaN$"),
        (np.inf, "frame 3 has a feature that is infinite; beyond the range of float16"),
        (-np.inf, "frame 3 has a feature that is infinite; beyond the range of float16"),
    ],
)
@pytest.mark.parametrize("frames", [5, 20])
def test_a_non_finite_feature_fails_the_video_by_frame(tmp_path, value, reason, frames):
    store, task = task_of(tmp_path, frames)

    def produce(segment):
        array = features("tokens", "ant", segment.frame_index)
        array[3, 4, 6] = value
        return SegmentResult(iter([array[:2], array[2:]]))

    report = write_single(store, task, produce)
    assert list(report.failed) == ["ant"]
    status = store.status()["ant"]
    assert (status.ok, status.kind) == (False, "non_finite")
    assert re.match(reason, status.reason)


class Decoder:
    """An iterator over batches that counts how often it is closed."""

    def __init__(self, batches):
        self.batches, self.closed = iter(batches), 0

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_a_producer_is_closed_when_it_was_read_to_the_end_and_when_it_was_not(tmp_path, value):
    batch = np.full((1, 5, 7), value, np.float16)
    alone, together = Decoder([batch] * 5), Decoder([{"tokens": batch}] * 5)
    store, task = task_of(tmp_path / "a")
    write_single(store, task, lambda _: SegmentResult(alone))
    store, task = task_of(tmp_path / "b")
    write_task({"tokens": store}, task, lambda _: SegmentResult(together))
    assert alone.closed == together.closed == 1
    assert len(list(alone.batches)) == (0 if value == 0 else 4)


@pytest.mark.parametrize("modality", SPECS)
def test_the_largest_finite_numbers_are_accepted(tmp_path, modality):
    store = create(tmp_path, modality)
    info = np.finfo(store.spec.dtype)
    extremes = np.resize(
        np.array([info.max, info.min, -0.0, info.tiny], store.spec.dtype), (1, *store.spec.frame_shape)
    )
    task = store.extend_plan({"ant": [0]}).tasks()[0]
    write_single(store, task, lambda _: SegmentResult(iter([extremes])))
    np.testing.assert_array_equal(store.read("ant", [0], verify=True), extremes)


@pytest.mark.parametrize("modality", ["tokens", "pooled/layer8"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_non_finite_feature_fails_only_the_modality_it_is_in(tmp_path, modality, value):
    stores = {name: create(tmp_path, name) for name in ("tokens", "pooled/layer8")}
    task = stores["tokens"].extend_plan({"ant": range(5)}).tasks()[0]

    def produce(segment):
        batch = {name: features(name, "ant", segment.frame_index) for name in stores}
        batch[modality][1] = value
        return SegmentResult(iter([batch]))

    write_task(stores, task, produce)
    assert [name for name, store in stores.items() if not store.status()["ant"].ok] == [modality]


@pytest.mark.parametrize("frames", [5, 20])
def test_a_video_that_fails_late_leaves_no_byte_of_what_it_wrote(tmp_path, frames):
    wanted = {"ant": range(frames), "bee": [0]}
    extract(tmp_path / "a", wanted=wanted, bad={"ant": frames - 1}, batch_size=1)
    extract(tmp_path / "b", wanted=wanted, bad={"ant": frames - 1}, batch_size=frames)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_failure_when_a_producer_starts_is_the_same_as_one_in_its_iterator(tmp_path):
    store, task = task_of(tmp_path)

    def produce(_):
        raise SegmentFailed("not_a_video", "no demuxer knows it")

    assert write_single(store, task, produce).failed["ant"].kind == "not_a_video"


def test_any_other_error_of_a_producer_ends_the_task_and_closes_its_iterator(tmp_path):
    store, task = task_of(tmp_path)
    before, closed = tree(tmp_path), []

    def batches():
        try:
            yield features("tokens", "ant", [0])
            raise RuntimeError("CUDA out of memory")
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="out of memory"):
        write_single(store, task, lambda _: SegmentResult(batches()))
    assert tree(tmp_path) == before
    assert closed == [True]


def test_facts_that_are_not_json_are_an_error_and_publish_nothing(tmp_path):
    store, task = task_of(tmp_path)
    for facts in ({"pts": float("nan")}, {"when": object()}):
        with pytest.raises(ValueError, match="JSON"):
            write_single(
                store,
                task,
                lambda s, f=facts: SegmentResult(iter([features("tokens", "ant", s.frame_index)]), lambda: f),
            )
    assert store.pending() == [task]


def test_a_task_of_another_plan_is_refused(tmp_path):
    store, _ = task_of(tmp_path)
    foreign = Plan.empty(8).extended({"bee": [0]}).tasks()[0]
    with pytest.raises(ValueError, match="is not in the plan"):
        write_single(store, foreign, single())


def test_a_very_long_reason_is_shortened(tmp_path):
    store, task = task_of(tmp_path)

    def produce(_):
        raise SegmentFailed("odd", "x" * 10_000)

    write_single(store, task, produce)
    assert len(store.status()["ant"].reason) == 2000
