"""Two machines on one network disk: locks that lock nobody out, short reads, stale handles, names that come late."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cache_schema import FeatureStore, files, verify, write_task
from tests.cache_schema.io_faults import NetworkDisk
from tests.cache_schema.makers import SPECS, WANTED, create, extract, features, producer, tree

MODALITIES = list(SPECS)
pytestmark = pytest.mark.usefixtures("zarr_once")


@pytest.fixture
def disk():
    """The disk of these tests; its machines are ``a`` and ``b``."""
    with NetworkDisk().installed() as layer:
        yield layer


def at_once(disk: NetworkDisk, *works: Callable[[], object]) -> list[object]:
    """Each of these in a thread that is a machine of its own, from one moment on."""
    barrier = threading.Barrier(len(works))

    def run(machine: str, work: Callable[[], object]) -> object:
        with disk.on(machine):
            barrier.wait()
            return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return [f.result() for f in [threads.submit(run, chr(97 + at), work) for at, work in enumerate(works)]]


def test_two_machines_that_extract_one_store_make_the_store_of_one(ram, disk):
    extract(ram / "whole", MODALITIES, bad={"dog": 1})
    for turn in range(4):
        path = ram / str(turn)
        at_once(disk, *[lambda: extract(path, MODALITIES, bad={"dog": 1})] * 2)  # noqa: B023
        assert tree(path) == tree(ram / "whole")
    assert min(disk.counts[kind] for kind in ("short", "stale", "unseen")) > 10


def test_two_growths_at_the_same_moment_lose_no_video_and_no_row(ram, disk):
    def grow(path, video):
        return lambda: create(path).extend_plan({video: range(len(video))})

    for turn in range(6):
        path = ram / str(turn)
        at_once(disk, grow(path, "one"), grow(path, "other"))
        store = create(path)
        assert set(store.plan.videos) == {"one", "other"}
        assert rows(path) == 8 * store.plan.num_shards


def rows(path):
    return files.read_json(path / "tokens/zarr.json", 1 << 20)["shape"][0]


def test_two_parts_that_end_at_the_same_moment_leave_one_index_that_fits(ram, disk):
    extract(ram / "whole")
    for turn in range(8):
        path = ram / str(turn)

        def part(number):
            mine = create(path)  # noqa: B023
            mine.extend_plan(WANTED)
            for task in mine.plan.tasks()[number::2]:
                write_task({"tokens": mine}, task, producer(["tokens"]))
            mine.finalize()

        at_once(disk, lambda: part(0), lambda: part(1))
        assert verify.full(FeatureStore.open(path, "tokens")) == []
        create(path).finalize()  # what the one who wrote last did not see yet
        assert tree(path) == tree(ram / "whole")


def test_every_frame_is_read_right_whatever_the_disk_says(ram, disk):
    extract(ram / "store", MODALITIES)
    for io in ("auto", "pread", "direct"):
        store = FeatureStore.open(ram / "store", "tokens_large", io=io)
        for video, index in WANTED.items():
            try:
                got = store.read(video, list(index), verify=True)
            except ValueError:  # a file system in memory without O_DIRECT
                assert io == "direct"
                continue
            np.testing.assert_array_equal(got, features("tokens_large", video, list(index)))
    assert disk.counts["stale"] > 1


def test_a_handle_that_stays_stale_is_an_error_and_no_endless_loop(ram, monkeypatch):
    store = extract(ram / "store")["tokens"]

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        FeatureStore.open(ram / "store", "tokens", io="pread").read("ant", [0])
    monkeypatch.undo()
    assert store.read("ant", [0]).shape == (1, 5, 7)


def test_a_link_whose_answer_was_lost_counts_as_ours(ram, monkeypatch):
    real = os.link

    def link_then_say_it_exists(a, b):
        real(a, b)
        raise FileExistsError(errno.EEXIST, "File exists", b)

    monkeypatch.setattr(os, "link", link_then_say_it_exists)
    assert files.publish_bytes(ram / "one", b"data")
    monkeypatch.setattr(os, "link", real)
    assert not files.publish_bytes(ram / "one", b"data")


def test_finalize_survives_another_one_without_any_lock(ram, disk):
    """Was: "Directory not empty", whenever both had moved the old index away."""
    extract(ram / "store")
    for turn in range(10):
        extract(ram / "store", wanted={**WANTED, f"more{turn}": [1]})
        at_once(disk, *[lambda: create(ram / "store").finalize()] * 2)
        assert verify.quick(FeatureStore.open(ram / "store", "tokens")) == []
