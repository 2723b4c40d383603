"""Every flipped bit and every truncation of a shard is found, and the frames that are hit are named (cases 9 to 11)."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from cache_schema import FeatureStore, verify
from tests.cache_schema.makers import SPECS, WANTED, extract, flip_bit


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "cache.zarr"
    extract(path, list(SPECS), bad={"dog": 1})
    return path


def frame_at(store, shard, offset):
    """(video, frame) whose bytes lie at this offset of a shard; None between frames and behind them."""
    slot, inside = divmod(offset, store.layout.stride)
    if inside >= store.layout.frame_bytes:
        return None
    for part in store.plan.parts(shard):
        if part.slot <= slot < part.slot + part.count and part.segment.video_id != "dog":
            return part.segment.video_id, part.frame_index[slot - part.slot]
    return None


def damage(path, count, seed, change):
    """``count`` times: change one file, see whether exactly its shard is reported, and what of it; put it back.

    Returns the changes that were reported otherwise.
    """
    rng, wrong = random.Random(seed), []
    stores = {name: FeatureStore.open(path, name) for name in SPECS}
    for _ in range(count):
        name = rng.choice(sorted(stores))
        number = rng.randrange(stores[name].plan.num_shards)
        file = stores[name].layout.info.shard_file(number)
        good = file.read_bytes()
        hit = change(rng, file, len(good), stores[name], number)
        found = verify.full(FeatureStore.open(path, name))
        told = {problem.shard for problem in found} == {number}
        told = told and all(str(file) in problem.message for problem in found)
        if isinstance(hit, tuple):
            told = told and [(p.video_id, p.frame_index) for p in found] == [hit]
            told = told and all(repr(hit[0]) in p.message for p in found)
        if not told:
            wrong.append((str(file), hit, [problem.message for problem in found]))
        file.write_bytes(good)
    return wrong


def flip(rng, file, size, store, number):
    offset = rng.randrange(size)
    flip_bit(file, offset, rng.randrange(8))
    return frame_at(store, number, offset) or f"byte {offset}"


def flip_in_a_frame(rng, file, size, store, number):
    """The same, in the bytes of a frame: most of these small shards is footer."""
    offsets = (rng.randrange(size) for _ in range(1000))
    offset = next((offset for offset in offsets if frame_at(store, number, offset)), 0)
    flip_bit(file, offset, rng.randrange(8))
    return frame_at(store, number, offset) or "a shard without frames"


def cut(rng, file, size, store, number):  # noqa: ARG001
    left = rng.randrange(size)
    os.truncate(file, left)
    return f"cut to {left} bytes"


def test_09_11_truncations_anywhere_are_found_and_named(sound, ram):
    shutil.copytree(sound, ram / "store")
    assert damage(ram / "store", 40, 1, cut) == []


def test_10_single_bit_flips_anywhere_are_found_and_named_by_shard_video_and_frame(sound, ram):
    shutil.copytree(sound, ram / "store")
    assert damage(ram / "store", 100, 2, flip) == []
    assert damage(ram / "store", 50, 5, flip_in_a_frame) == []


@pytest.mark.slow
def test_10_a_thousand_single_bit_flips_and_200_truncations(sound, ram):
    shutil.copytree(sound, ram / "store")
    assert damage(ram / "store", 1000, 3, flip) == []
    assert damage(ram / "store", 1000, 5, flip_in_a_frame) == []
    assert damage(ram / "store", 200, 4, cut) == []


@pytest.mark.parametrize("times", [0, 1, 4_102_444_800])
def test_48_no_order_and_no_completeness_depends_on_the_times_of_files(sound, tmp_path, times):
    shutil.copytree(sound, tmp_path / "store")
    rng = random.Random(times)
    for entry in sorted((tmp_path / "store").rglob("*")):
        moment = times + rng.randrange(1000)
        os.utime(entry, (moment, moment))
    for name in SPECS:
        store = FeatureStore.open(tmp_path / "store", name)
        assert verify.full(store) == []
        assert store.pending() == []
    (tmp_path / "store/tokens/c.2.0.0").unlink()
    stores = extract(tmp_path / "store", list(SPECS), bad={"dog": 1})
    for video in sorted(set(WANTED) - {"dog"}):
        assert stores["tokens"].read(video, list(WANTED[video]), verify=True).shape[0] == len(WANTED[video])


@pytest.mark.parametrize("folder", ["tokens", "plan", "pooled"])
def test_28_a_folder_of_the_store_that_is_a_link_is_refused(sound, tmp_path, folder):
    shutil.copytree(sound, tmp_path / "store")
    (tmp_path / "store" / folder).rename(tmp_path / "elsewhere")
    (tmp_path / "store" / folder).symlink_to(tmp_path / "elsewhere")
    name = "pooled/layer8" if folder == "pooled" else "tokens"
    with pytest.raises(ValueError, match="is a symbolic link"):
        FeatureStore.open(tmp_path / "store", name).pending()


def test_28_a_store_may_itself_be_reached_through_a_link(sound, tmp_path):
    (tmp_path / "big-disk").symlink_to(sound.parent)
    store = FeatureStore.open(tmp_path / "big-disk" / sound.name, "tokens")
    assert store.status()["ant"].ok
    assert verify.full(store) == []
