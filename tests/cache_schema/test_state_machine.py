"""Extract, kill, damage, verify, repair, collect, in any order, against a plain dict as the model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cache_schema import CacheCorrupt, CacheMissing, FeatureStore, orphans, verify
from cache_schema.repair import repair_shard
from tests.cache_schema.io_faults import FileLayer, Killed
from tests.cache_schema.makers import extract, features, flip_bit, producer, tree

MODALITIES = ["tokens", "pooled/layer8"]
VIDEOS = {"ant": [0, 3], "bee": [1], "cat": list(range(10)), "dog": [2, 7], "elk": list(range(4))}
BAD = {"dog": 1}  # this one always fails
SHARD = 4
chosen = st.sets(st.sampled_from(sorted(VIDEOS)), min_size=1)


class Cache(RuleBasedStateMachine):
    """``model``: video -> frames that must be readable. ``damaged``: (modality, shard) that must be reported."""

    ended_as_modelled: ClassVar[list[bool]] = []  # one entry an order

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.path = self.folder / "cache.zarr"
        self.model: dict[str, list[int]] = {}
        self.asked: list[dict[str, list[int]]] = []  # the growths of the plan, in order
        self.damaged: set[tuple[str, int]] = set()
        self.gone: set[tuple[str, int]] = set()  # damaged, and there is no file: an extraction makes it, too

    def teardown(self) -> None:
        self.ended_as_modelled.append(self.damaged_now() == self.damaged)
        shutil.rmtree(self.folder)

    def stores(self) -> dict[str, FeatureStore]:
        return {name: FeatureStore.open(self.path, name) for name in MODALITIES} if self.model else {}

    @precondition(lambda self: not self.damaged - self.gone)
    @rule(videos=chosen)
    def extract(self, videos: set[str]) -> None:
        wanted = {video: VIDEOS[video] for video in sorted(videos)}
        extract(self.path, MODALITIES, wanted, shard_frames=SHARD, bad=BAD)
        self.asked.append(wanted)
        self.model |= wanted
        self.damaged, self.gone = set(), set()  # what was deleted was pending, and is made again

    @precondition(lambda self: not self.damaged)
    @rule(videos=chosen, at=st.integers(0, 700), fault=st.sampled_from(["kill", 5, 28]))
    def extract_and_die(self, videos: set[str], at: int, fault: int | str) -> None:
        wanted = {video: VIDEOS[video] for video in sorted(videos)}
        try:
            with FileLayer(at, fault).installed():
                extract(self.path, MODALITIES, wanted, shard_frames=SHARD, bad=BAD)
        except (Killed, OSError):
            pass
        self.extract(videos)  # the same command again

    @precondition(lambda self: self.model)
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "delete"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(MODALITIES))
        store = FeatureStore.open(self.path, name)
        files = {n: store.layout.info.shard_file(n) for n in range(store.plan.num_shards)}
        number = data.draw(st.sampled_from(sorted(files)))
        file = files[number]
        if (name, number) in self.damaged:
            return
        size = file.stat().st_size
        if how == "flip":
            flip_bit(file, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
        elif how == "cut":
            os.truncate(file, data.draw(st.integers(0, size - 1)))
        else:
            file.unlink()
            self.gone.add((name, number))
        self.damaged.add((name, number))

    @precondition(lambda self: self.damaged)
    @rule(die_at=st.integers(0, 120))
    def repair(self, die_at: int) -> None:
        for name, store in self.stores().items():
            for number in verify.damaged_shards(verify.full(store)):
                try:
                    with FileLayer(die_at, "kill").installed():
                        repair_shard(store, number, producer(MODALITIES, bad=BAD))
                except Killed:
                    pass
                if (name, number) in {(n, s) for n, s in self.damaged_now()}:
                    assert repair_shard(
                        FeatureStore.open(self.path, name), number, producer(MODALITIES, bad=BAD)
                    ).repaired
        self.damaged, self.gone = set(), set()
        next(iter(self.stores().values())).finalize()

    @precondition(lambda self: self.model)
    @rule()
    def collect(self) -> None:
        for orphan in orphans.find(self.path):
            assert orphan.dead
            orphans.remove(orphan)
        assert orphans.find(self.path) == []

    def damaged_now(self) -> set[tuple[str, int]]:
        return {
            (name, number)
            for name, store in self.stores().items()
            for number in verify.damaged_shards(verify.full(store))
        }

    @invariant()
    def verify_reports_exactly_the_damage(self) -> None:
        assert self.damaged_now() == self.damaged
        if not self.damaged:
            for store in self.stores().values():
                assert verify.full(store) == []

    @invariant()
    def every_video_reads_right_or_is_refused(self) -> None:
        for name, store in self.stores().items():
            for video, index in self.model.items():
                rows = store.plan.rows(video, index)
                hit = {(name, int(row) // SHARD) for row in rows} & self.damaged
                try:
                    got = store.read(video, index, verify=True)
                except CacheMissing:
                    assert video in BAD or hit & self.gone
                except CacheCorrupt:
                    assert hit
                else:
                    np.testing.assert_array_equal(got, features(name, video, index))
                    assert video not in BAD

    @precondition(lambda self: self.model and not self.damaged)
    @rule()
    def it_equals_a_store_that_was_never_touched(self) -> None:
        self.collect()
        other = self.folder / "other.zarr"
        for wanted in self.asked:
            extract(other, MODALITIES, wanted, shard_frames=SHARD, bad=BAD)
        assert tree(self.path) == tree(other)
        shutil.rmtree(other)


@pytest.mark.usefixtures("zarr_once")
def test_01_18_any_order_of_extraction_death_damage_and_repair_ends_in_the_same_store():
    Cache.ended_as_modelled.clear()
    run_state_machine_as_test(
        Cache,
        settings=settings(
            max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert len(Cache.ended_as_modelled) >= 8
    assert all(Cache.ended_as_modelled)


@pytest.mark.slow
@pytest.mark.usefixtures("zarr_once")
def test_01_18_the_same_with_many_more_orders():
    Cache.ended_as_modelled.clear()
    run_state_machine_as_test(
        Cache,
        settings=settings(
            max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert len(Cache.ended_as_modelled) >= 150
    assert all(Cache.ended_as_modelled)
