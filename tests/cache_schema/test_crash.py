"""Real processes that are killed or race; what is left must be sound, and the end must be the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections import Counter

import pytest

from cache_schema import CacheError, FeatureStore, verify
from tests.cache_schema.children import PLACES, race, run_and_die, run_slowly, share
from tests.cache_schema.makers import SPECS, WANTED, extract, features, tree

CONTEXT = multiprocessing.get_context("forkserver")  # children start from a clean process that has the imports
CONTEXT.set_forkserver_preload(["zarr", "tests.cache_schema.children"])
FAILING = {"bad": {"dog": 1}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("crash") / "cache.zarr"
    extract(path, list(SPECS), **FAILING)
    return tree(path)


def run(target, *args, **kwargs):
    child = CONTEXT.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def storm(folder, kills, seed=0):
    """Two extractions at a time on one store, killed with -9 at random moments until there were so many kills.

    Checked after every kill: no shard is corrupt, none that was committed is gone or has other bytes, every frame reads
    right. Whenever a store was finished it must be byte-equal to one that was never interrupted. Returns the
    counts, with the kills by where they landed. Kills before any work do not count.
    """
    extract(folder / "whole", list(SPECS), **FAILING)
    expected = tree(folder / "whole")
    path, rng = folder / "cache.zarr", random.Random(seed)
    for _ in range(2):  # the first one also waits for the fork server
        began = time.monotonic()
        assert run(share, path, 0, False) == 0
        longest = time.monotonic() - began
        shutil.rmtree(path)
    killed = finished = 0
    inside, committed = Counter(), {}
    while killed < kills or committed:
        last = killed >= kills
        places = [CONTEXT.Value("i", 0, lock=False) for _ in range(2)]
        children = [CONTEXT.Process(target=share, args=(path, rng.random(), rng.random() < 0.5, at)) for at in places]
        for child in children:
            child.start()
        if not last:
            time.sleep(rng.uniform(0.0, longest))
            for child in children[: rng.choice((1, 2))]:
                child.kill()
        for child in children:
            child.join(120)
            assert child.exitcode in (0, -9)
        for child, place in zip(children, places, strict=True):
            if child.exitcode == -9:
                inside[PLACES[place.value]] += 1
                if place.value:  # one that had not begun does not count
                    killed += 1
        check_what_is_left(path, allowed=("missing", "videos_index"))
        now = {name: data for name, data in tree(path).items() if "/c." in name and name.startswith(tuple(SPECS))}
        assert now.items() >= committed.items(), "a committed shard is gone or has changed"
        committed = now
        if any(child.exitcode == 0 for child in children):
            assert run(share, path, 0, False) == 0  # sweeps what a killed one left, and does nothing else
            assert tree(path) == expected
            shutil.rmtree(path)
            finished, committed = finished + 1, {}
    return {
        "kills": killed,
        "inside": dict(sorted(inside.items())),
        "finished_stores_equal": finished,
        "corrupt": 0,
        "lost": 0,
    }


def check_what_is_left(path, allowed=("missing", "videos_index")):
    """After a crash: every shard is whole or absent, and every frame that can be read is right."""
    for modality in SPECS:
        try:
            store = FeatureStore.open(path, modality)
        except CacheError as error:
            assert "no cache" in str(error) or "holds no" in str(error)  # noqa: PT017
            continue
        assert {problem.kind for problem in verify.full(store)} <= set(allowed)
        for video, status in store.status().items():
            if status.ok:
                assert (store.read(video, list(WANTED[video])) == features(modality, video, list(WANTED[video]))).all()


def die_and_resume(path, die_at, uninterrupted):
    assert run(run_and_die, path, die_at, **FAILING) == -9
    check_what_is_left(path)
    assert run(run_and_die, path, -1, **FAILING) == 0
    assert tree(path) == uninterrupted


SPREAD = 4  # two runs differ in a few operations: some are done again where a name is not there yet


def count_file_operations(path):
    counter = CONTEXT.Value("i", 0)
    assert run(run_and_die, path, -1, counter, **FAILING) == 0
    return counter.value


def test_killed_at_any_file_operation_and_resumed_the_store_is_byte_equal(tmp_path, uninterrupted):
    total = count_file_operations(tmp_path / "whole")
    assert total > 150
    for die_at in range(3, total, total // 7):
        die_and_resume(tmp_path / str(die_at), die_at, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_single_file_operation_and_resumed_the_store_is_byte_equal(tmp_path, uninterrupted):
    total = count_file_operations(tmp_path / "whole")
    assert total > 150
    for die_at in range(total - SPREAD):
        die_and_resume(tmp_path / str(die_at), die_at, uninterrupted)


def test_killed_ten_times_at_random_moments_and_resumed_the_store_is_byte_equal(tmp_path, uninterrupted):
    began = time.monotonic()
    assert run(run_slowly, tmp_path / "timed", **FAILING) == 0
    whole = time.monotonic() - began  # so that the kills hit work on a fast machine and on a slow one
    rng, path, killed = random.Random(7), tmp_path / "cache.zarr", 0
    for _ in range(100):
        child = CONTEXT.Process(target=run_slowly, args=(path,), kwargs=FAILING)
        child.start()
        time.sleep(rng.uniform(0.0, whole))
        child.kill()
        child.join(60)
        check_what_is_left(path)
        killed += child.exitcode == -9
        if killed == 10:
            break
        if child.exitcode == 0:
            shutil.rmtree(path)  # finished before the kill: begin anew, so that the next one finds work
    assert killed == 10
    assert run(run_slowly, path, **FAILING) == 0
    assert tree(path) == uninterrupted


def test_01_06_two_extractions_killed_at_25_random_moments_lose_and_damage_nothing(ram):
    counts = storm(ram, 25)
    assert counts["finished_stores_equal"] >= 1
    assert counts["inside"].keys() & {"fsync", "link", "rename", "replace"}


def test_a_retry_that_is_killed_leaves_the_old_shard_and_can_be_run_again(tmp_path):
    extract(tmp_path / "good", list(SPECS))
    for die_at in (2, 17, 31):
        path = tmp_path / str(die_at)
        extract(path, list(SPECS), bad={"bee": 1, "cat": 11})
        assert run(run_and_die, path, die_at, retry_failed=True) == -9
        check_what_is_left(path, allowed=("videos_index",))  # the index still says that the video failed
        assert run(run_and_die, path, -1, retry_failed=True) == 0
        assert tree(path) == tree(tmp_path / "good")


def test_two_writers_of_the_same_tasks_make_one_store_without_loss(tmp_path):
    barrier, results = CONTEXT.Barrier(2), CONTEXT.Queue()
    children = [CONTEXT.Process(target=race, args=(tmp_path / "cache.zarr", barrier, results, salt)) for salt in (1, 2)]
    for child in children:
        child.start()
    reports = [dict(results.get(timeout=60)) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    store = FeatureStore.open(tmp_path / "cache.zarr", "tokens")
    assert reports[0].keys() == reports[1].keys()
    for shards in reports[0]:
        skipped = reports[0][shards] + reports[1][shards]
        assert skipped == 1 or (
            len(shards) > 1 and skipped == 0
        )  # of a run each may win some shards; the bytes are equal
    assert verify.full(store) == []
    assert not list(tmp_path.rglob("*.partial"))
    for video, index in {**WANTED, "extra1": [1], "extra2": [2]}.items():
        assert (store.read(video, list(index), verify=True) == features("tokens", video, list(index))).all()
    assert len(list((tmp_path / "cache.zarr/plan").glob("0*.npz"))) == 2
