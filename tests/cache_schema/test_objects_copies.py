"""Whole shards kept on a local disk: within the budget, checked, and never believed against the store."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from cache_schema import CacheCorrupt, FeatureStore, connections
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import LocalCopies, locate
from tests.cache_schema.makers import WANTED, extract, features, flip_bit
from tests.object_servers import FaultProxy, first, use


@pytest.fixture
def remote(s3):
    """A store of the shards ant + bee, cat (a run of three), dog, elk, made without copies."""
    extract(locate(s3))
    return s3


def opened(url, folder, budget=10**9):
    return FeatureStore.open(locate(url, LocalCopies(folder, budget)), "tokens")


def read_all(store):
    for video, index in WANTED.items():
        assert (store.read(video, list(index)) == features("tokens", video, list(index))).all()


def copies(folder):
    return sorted(folder.glob("*.shard"), key=lambda file: file.stat().st_mtime_ns)


def frames_asked(proxy):
    return [path for method, path, _ in proxy.seen if method == "GET" and "/tokens/c/" in path]


def test_a_second_reader_asks_the_store_for_footers_only_and_gets_the_same_bytes(remote, moto, monkeypatch, tmp_path):
    read_all(opened(remote, tmp_path))
    assert len(copies(tmp_path)) == 6
    assert not [entry for entry in tmp_path.iterdir() if entry.suffix != ".shard"]
    with FaultProxy(moto.port) as proxy:
        use(monkeypatch, proxy.port)
        read_all(opened(remote, tmp_path))
        assert len(frames_asked(proxy)) == 6
        proxy.seen.clear()
        read_all(FeatureStore.open(remote, "tokens"))
        assert len(frames_asked(proxy)) > 6


def test_shards_that_are_written_are_kept_too(s3, moto, monkeypatch, tmp_path):
    extract(locate(s3, LocalCopies(tmp_path, 10**9)))
    assert len(copies(tmp_path)) == 6
    with FaultProxy(moto.port) as proxy:
        use(monkeypatch, proxy.port)
        read_all(opened(s3, tmp_path))
        assert len(frames_asked(proxy)) == 6
    assert not list(tmp_path.glob("*.partial"))


def test_the_budget_holds_and_what_was_not_used_for_longest_goes_first(remote, tmp_path):
    read_all(opened(remote, tmp_path))
    (largest,) = sorted(file.stat().st_size for file in copies(tmp_path))[-1:]
    for file in copies(tmp_path):
        file.unlink()
    store = opened(remote, tmp_path, budget=3 * largest)
    for video in ("ant", "dog", "elk", "ant"):  # the copy of ant's shard is the one used last
        store.read(video, list(WANTED[video]))
    newest = copies(tmp_path)[-1].name
    read_all(store)
    assert sum(file.stat().st_size for file in copies(tmp_path)) <= 3 * largest
    store.read("ant", [0])
    before = {file.name for file in copies(tmp_path)}
    assert newest in before
    store.read("cat", [0])
    assert newest in {file.name for file in copies(tmp_path)}
    assert {file.name for file in copies(tmp_path)} != before
    small = tmp_path / "small"
    read_all(opened(remote, small, budget=100))  # no shard fits: read from the store, nothing kept
    assert copies(small) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "link", "unreadable folder"])
def test_a_copy_that_is_damaged_is_dropped_and_the_store_is_read(remote, tmp_path, damage):
    folder = tmp_path / "copies"
    store = opened(remote, folder)
    store.read("ant", [0, 9])
    (copy,) = copies(folder)
    if damage == "flip":
        flip_bit(copy, 130)  # in frame 3 of ant, slot 1
    elif damage == "cut":
        os.truncate(copy, 200)
    elif damage == "link":
        copy.rename(tmp_path / "elsewhere")
        copy.symlink_to(tmp_path / "elsewhere")
    else:
        copy.unlink()
        folder.rmdir()
        folder.write_text("a file where the folder was")
    for _ in range(2):
        assert (store.read("ant", [3, 0, 9]) == features("tokens", "ant", [3, 0, 9])).all()


def test_a_copy_of_a_version_that_was_replaced_is_not_used(s3, tmp_path):
    extract(locate(s3), bad={"bee": 1})
    store = opened(s3, tmp_path)
    store.read("ant", [0])
    extract(locate(s3), retry_failed=True)
    assert store.status()["bee"].ok
    assert (store.read("bee", [1, 9]) == features("tokens", "bee", [1, 9])).all()
    assert len(copies(tmp_path)) == 2  # of two versions of one shard


def test_a_shard_that_is_damaged_in_the_store_makes_no_copy(remote, tmp_path):
    shard = locate(remote) / "tokens/c/0/0/0"
    raw = bytearray(shard.read_bytes(1 << 20))
    raw[5] ^= 4
    shard.write(bytes(raw))
    with pytest.raises(CacheCorrupt):
        opened(remote, tmp_path).read("ant", [3])
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_during_the_download_leaves_nothing(remote, moto, monkeypatch, tmp_path):
    store = opened(remote, tmp_path)
    store.shard(0)
    with FaultProxy(moto.port, first(10**6, "reset", "GET", "/c/0/")) as proxy:
        use(monkeypatch, proxy.port)
        with pytest.raises(StoreUnavailable, match=r"the connection broke|no valid answer"):
            store.read("ant", [0])
    assert list(tmp_path.iterdir()) == []


def test_threads_that_want_the_same_shard_download_it_once(remote, moto, monkeypatch, tmp_path):
    store = opened(remote, tmp_path)
    store.shards(range(6))
    with FaultProxy(moto.port) as proxy:
        use(monkeypatch, proxy.port)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda frame: store.read("ant", [frame]), [0, 3, 6, 9]))
        assert len(frames_asked(proxy)) == 1
    connections.forget_connections()
