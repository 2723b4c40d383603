"""A store copied between folders and object stores is the same store, whatever ended the copy before."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest

from cache_schema import CacheMismatch, CacheMissing, FeatureStore, files, verify
from cache_schema.copy import copy_store
from cache_schema.objects import locate
from tests.cache_schema.makers import SPECS, TOKENS, WANTED, create, extract, flip_bit, tree
from tests.cache_schema.test_objects import bytes_of, files_of

CONTEXT = multiprocessing.get_context("spawn")
MODALITIES = list(SPECS)


@pytest.fixture
def source(tmp_path):
    """A folder with three modalities, a failed video and two growths."""
    extract(tmp_path / "source", MODALITIES, bad={"dog": 1})
    extract(tmp_path / "source", MODALITIES, wanted={**WANTED, "fox": [4]}, bad={"dog": 1})
    return tmp_path / "source"


def counts(results):
    return [(result.copied, result.present) for result in results]


def test_a_copy_has_the_bytes_of_the_store_and_a_second_one_copies_nothing(source, tmp_path):
    target = tmp_path / "copy"
    assert counts(copy_store(source, target)) == [(7, 0)] * 3
    assert tree(target) == tree(source)
    assert counts(copy_store(source, target)) == [(0, 7)] * 3
    assert all(verify.full(FeatureStore.open(target, name)) == [] for name in MODALITIES)


def test_a_copy_to_an_object_store_and_back_again_has_the_same_bytes(source, tmp_path, bucket):
    assert counts(copy_store(source, locate(bucket))) == [(7, 0)] * 3
    assert bytes_of(bucket) == files_of(source)
    assert counts(copy_store(source, locate(bucket))) == [(0, 7)] * 3
    copy_store(locate(bucket), tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(source)


def copy_and_die(source, target, at):
    real, left = files.publish_or_replace, [at]

    def publish_or_replace(partial, final):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(partial, final)

    files.publish_or_replace = publish_or_replace
    copy_store(source, target)


def test_a_copy_that_is_killed_goes_on_where_it_was_and_leaves_nothing_behind(source, tmp_path):
    child = CONTEXT.Process(target=copy_and_die, args=(source, tmp_path / "copy", 9))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert {p.kind for p in verify.full(FeatureStore.open(tmp_path / "copy", "tokens"))} <= {"missing"}
    assert sum(copied for copied, _ in counts(copy_store(source, tmp_path / "copy"))) == 21 - 8
    assert tree(tmp_path / "copy") == tree(source)


def test_what_is_not_extracted_yet_comes_with_the_next_copy(tmp_path):
    store = create(tmp_path / "source")
    store.extend_plan(WANTED)
    copy_store(tmp_path / "source", tmp_path / "copy")
    assert len(FeatureStore.open(tmp_path / "copy", "tokens").pending()) == 4
    extract(tmp_path / "source", wanted={**WANTED, "fox": [4]})
    assert counts(copy_store(tmp_path / "source", tmp_path / "copy")) == [(7, 0)]
    assert tree(tmp_path / "copy") == tree(tmp_path / "source")


@pytest.mark.parametrize("offset", [33, 100, -1], ids=["in a frame", "between frames", "in the index"])
def test_a_damaged_shard_is_named_and_not_copied_and_a_damaged_copy_is_replaced(source, tmp_path, offset):
    sound, file = tree(source), source / "tokens/c.0.0.0"
    flip_bit(file, offset)
    results = copy_store(source, tmp_path / "copy")
    assert [len(result.damaged) for result in results] == [0, 1, 0]
    assert str(file) in results[1].damaged[0]
    assert not (tmp_path / "copy/tokens/c.0.0.0").exists()
    flip_bit(file, offset)
    copy_store(source, tmp_path / "copy")
    assert tree(tmp_path / "copy") == sound
    flip_bit(tmp_path / "copy/tokens/c.0.0.0", -1)
    assert counts(copy_store(source, tmp_path / "copy")) == [(0, 7), (1, 6), (0, 7)]
    assert tree(tmp_path / "copy") == sound


def test_a_retried_shard_is_brought_over_and_never_one_with_more_failures(tmp_path):
    extract(tmp_path / "source", bad={"dog": 1})
    copy_store(tmp_path / "source", tmp_path / "copy")
    extract(tmp_path / "source", retry_failed=True)
    assert counts(copy_store(tmp_path / "source", tmp_path / "copy")) == [(1, 5)]
    extract(tmp_path / "worse", bad={"dog": 1})
    assert counts(copy_store(tmp_path / "worse", tmp_path / "copy")) == [(0, 6)]
    assert tree(tmp_path / "copy") == tree(tmp_path / "source")


def test_a_destination_with_other_videos_or_settings_is_refused_before_anything_is_written(source, tmp_path):
    extract(tmp_path / "other", wanted={"ant": [1]})
    FeatureStore.create(tmp_path / "layer", "tokens", replace(TOKENS, layer=4), shard_frames=8)
    create(tmp_path / "size", shard_frames=9)
    for name, message in (("other", "other videos in its plan"), ("layer", "layer +4 +3"), ("size", "shard_frames")):
        before = tree(tmp_path / name)
        with pytest.raises(CacheMismatch, match=message):
            copy_store(source, tmp_path / name)
        if name != "layer":
            assert tree(tmp_path / name) == before
    with pytest.raises(CacheMissing, match="There is no cache"):
        copy_store(tmp_path / "nothing", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
