"""Open shards of all stores of a process stay within what the system allows, and threads may share them."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cache_schema import FeatureStore, descriptors
from tests.cache_schema.makers import SPECS, extract, features, write_single

VIDEOS = {f"v{number:03}": range(8) for number in range(120)}  # a shard each
READ_ALL = """
import json, os, resource, sys
from cache_schema import FeatureStore
from tests.cache_schema.makers import SPECS, features
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
stores = [FeatureStore.open(sys.argv[1], name) for name in SPECS]
most = 0
for number in range(120):
    for store in stores:
        got = store.read(f"v{number:03}", [0, 7])
        assert (got == features(store.modality, f"v{number:03}", [0, 7])).all()
        most = max(most, len(os.listdir("/proc/self/fd")))
print(json.dumps([most, resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "store"
    extract(path, list(SPECS), VIDEOS)
    return path


def read_all(store, soft, hard):
    command = [sys.executable, "-c", READ_ALL, str(store), str(soft), str(hard)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_three_modalities_with_more_shards_than_descriptors_are_read_through(store):
    """Was: "Too many open files", for 128 shards a modality at 3 descriptors each."""
    done = read_all(store, 100, 100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout[1:].partition(",")[0]) <= 100


def test_the_soft_limit_is_raised_to_the_hard_one(store):
    done = read_all(store, 64, 900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[900, 900]]")


def test_the_shards_used_last_stay_open_and_those_of_a_store_that_is_gone_close(store, monkeypatch):
    monkeypatch.setattr(descriptors, "MOST", 32)
    first, second = (FeatureStore.open(store, name) for name in ("tokens", "pooled/layer8"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(120):
        first.read("v000", [1])
        second.read(f"v{number:03}", [1])
    assert first._opened.get(0) is not None
    assert len(os.listdir("/proc/self/fd")) - before <= 32 * descriptors.PER_SHARD
    del first, second
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_without_any_descriptor_left_open_shards_are_closed_and_then_the_limit_is_named(store):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = FeatureStore.open(store, "tokens")
    reader.read("v000", [0])
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
    taken = []
    try:
        descriptors_left = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        real, descriptors._allowed = descriptors._allowed, lambda: highest + 40
        try:
            reader.read("v001", [0])  # the two of v000 are closed for it
            taken += [os.dup(1) for _ in descriptors_left]
            while descriptors.relieve():
                pass
            while True:
                try:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            with pytest.raises(OSError, match=rf"this process may have {highest + 40}.*ulimit -n 4096"):
                reader.read("v002", [0])
        finally:
            descriptors._allowed = real
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_eight_threads_that_read_a_shard_while_it_is_retried_see_no_error(tmp_path, monkeypatch):
    """Was: KeyError, for all of them forgot the same open shard."""
    for turn in range(20):
        path = tmp_path / str(turn)
        extract(path, wanted={"ant": [0, 1], "bee": [2]}, bad={"bee": 0})
        store, barrier = FeatureStore.open(path, "tokens"), threading.Barrier(8)
        store.read("ant", [0])
        shard = store._opened.get(0)
        for task in FeatureStore.open(path, "tokens").pending(retry_failed=True):
            from tests.cache_schema.makers import single

            write_single(FeatureStore.open(path, "tokens"), task, single())
        monkeypatch.setattr(type(shard), "is_current", lambda _: True)  # as on a disk that tells late

        def read(_, store=store, barrier=barrier):
            barrier.wait()
            return store.read("bee", [2])

        with ThreadPoolExecutor(8) as pool:
            for got in pool.map(read, range(8)):
                np.testing.assert_array_equal(got, features("tokens", "bee", [2]))
        monkeypatch.undo()
