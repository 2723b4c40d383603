"""The plan as a mathematical object: disjoint, complete, deterministic, and never moving."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import Plan
from cache_schema.plan import from_runs, to_runs
from cache_schema.plan_columns import pack, unpack

frames = st.lists(st.integers(0, 60), max_size=30)
videos = st.dictionaries(st.text("abcdé/.", min_size=1, max_size=3), frames, max_size=8)
sizes = st.integers(1, 12)


def wanted_pairs(*mappings):
    return {(video, frame) for mapping in mappings for video, index in mapping.items() for frame in index}


@given(sizes, videos)
def test_every_wanted_frame_has_exactly_one_row_and_no_two_share_one(size, wanted):
    plan = Plan.empty(size).extended(wanted)
    rows = {pair: int(plan.rows(pair[0], [pair[1]])[0]) for pair in wanted_pairs(wanted)}
    assert len(set(rows.values())) == len(rows) == plan.num_frames
    assert all(0 <= row < plan.num_shards * size for row in rows.values())


@given(sizes, videos)
def test_tasks_hold_every_segment_and_every_shard_once_and_whole_videos(size, wanted):
    plan = Plan.empty(size).extended(wanted)
    assert [segment for task in plan.tasks() for segment in task.segments] == list(plan.segments)
    assert [shard for task in plan.tasks() for shard in task.shards] == list(range(plan.num_shards))
    for task in plan.tasks():
        assert len(task.shards) == 1 or len(task.segments) == 1
        parts = [part for shard in task.shards for part in plan.parts(shard)]
        for segment in task.segments:
            mine = [part for part in parts if part.segment == segment]
            assert sum((part.frame_index for part in mine), ()) == segment.frame_index
            assert [part.shard * size + part.slot for part in mine] == [segment.start + part.offset for part in mine]
            assert len(mine) == -(-len(segment) // size)


@given(sizes, videos, st.integers())
def test_the_order_of_the_input_does_not_matter(size, wanted, seed):
    shuffled = list(wanted.items())
    random.Random(seed).shuffle(shuffled)
    again = {video: index[::-1] + index for video, index in shuffled}
    assert Plan.empty(size).extended(again) == Plan.empty(size).extended(wanted)


@given(sizes, videos, videos)
def test_growth_moves_nothing_and_adds_only_what_was_not_there(size, first, second):
    before = Plan.empty(size).extended(first)
    after = before.extended(second)
    assert after.segments[: len(before.segments)] == before.segments
    assert after.tasks()[: len(before.tasks())] == before.tasks()
    assert after.num_frames == len(wanted_pairs(first, second))
    assert all(segment.start >= before.num_shards * size for segment in after.segments[len(before.segments) :])
    assert after.extended(first) is after


@given(sizes, videos, videos)
def test_generation_files_rebuild_the_plan(size, first, second):
    before = Plan.empty(size).extended(first)
    after = before.extended(second)
    rebuilt = Plan.empty(size)
    for old, new in ((Plan.empty(size), before), (before, after)):
        if new is not old and len(new.segments) > len(old.segments):
            rebuilt = rebuilt.grown_by(unpack(pack(old, new.segments[len(old.segments) :]), rebuilt))
    assert rebuilt == after


@given(st.sets(st.integers(0, 10_000)))
def test_runs_round_trip(index):
    assert from_runs(to_runs(sorted(index))) == tuple(sorted(index))


def test_runs_are_short_for_regular_frames():
    assert to_runs([0, 3, 6, 9, 20]) == [[0, 3, 4], [20, 1, 1]]


def test_a_video_goes_to_the_next_shard_when_it_does_not_fit_and_a_long_one_gets_its_own_run():
    plan = Plan.empty(4).extended({"a": [0, 1, 2], "b": [7, 8], "c": range(9), "d": [5]})
    assert [(s.video_id, s.start) for s in plan.segments] == [("a", 0), ("b", 4), ("c", 8), ("d", 20)]
    assert [task.shards for task in plan.tasks()] == [(0,), (1,), (2, 3, 4), (5,)]


def test_rows_keep_the_asked_order_and_repeats():
    plan = Plan.empty(8).extended({"a": [4, 9, 2], "b": [1]})
    assert plan.rows("a", [9, 2, 9]).tolist() == [2, 0, 2]


def test_what_is_not_planned_is_named():
    plan = Plan.empty(8).extended({"a": [4, 9]})
    with pytest.raises(KeyError, match="video 'b' is not planned"):
        plan.rows("b", [0])
    with pytest.raises(KeyError, match=r"frames 5, 10 of video 'a'"):
        plan.rows("a", np.array([4, 5, 10]))
    assert plan.find("a", [4, 5]).tolist() == [0, -1]


@pytest.mark.parametrize("video", ["", "a\0b", "x" * 5000, "\ud800"])
def test_an_id_that_cannot_be_stored_is_refused(video):
    with pytest.raises(ValueError, match="video id"):
        Plan.empty(8).extended({video: [0]})


@pytest.mark.parametrize("video", ["../../etc/passwd", "a\nb", ";rm -rf /", "é", "e\u0301", "A", "a"])
def test_an_id_is_data_and_may_be_any_text(video):
    assert Plan.empty(8).extended({video: [0]}).videos == (video,)


@pytest.mark.parametrize("index", [[-1], [1 << 31], [0.5], [[1, 2]], ["1"]])
def test_an_impossible_frame_index_is_refused_with_the_video_named(index):
    with pytest.raises(ValueError, match="'a'"):
        Plan.empty(8).extended({"a": index})
