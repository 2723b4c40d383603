"""Every way of reading gives the same bytes, from memory and from the disk, and says what it cannot do."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest

from cache_schema import CacheCorrupt, FeatureStore, SegmentResult, reading
from cache_schema.errors import CacheMissing
from tests.cache_schema.makers import LARGE, write_single

FRAMES = 760  # 53 MB: enough for the probe to measure each way twice
WAYS = ("auto", "mmap", "pread", "direct")
PATTERNS = {
    "whole": range(200),
    "strided": range(0, FRAMES, 5),
    "one": [17],
    "backwards, with repeats": [9, 9, 700, 3, 2, 1, 500],
    "none": [],
}


def numbers(frames) -> np.ndarray:
    """Frames [n, 129, 257]: each is filled by its number, with a mark at its start and its end."""
    rows = np.empty((len(frames), *LARGE.frame_shape), np.float16)
    rows[:] = np.asarray(frames, np.float16)[:, None, None]
    rows[:, 0, 0], rows[:, -1, -1] = -1, -2
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard with frames on pages, and small frames that are not, on the disk that holds temporary files."""
    path = tmp_path_factory.mktemp("reading")
    for name, count in (("large", FRAMES), ("again", FRAMES)):
        store = FeatureStore.create(path / name, "tokens", LARGE)
        store.extend_plan({"v": range(count)})
        [task] = store.pending()
        write_single(store, task, lambda segment: SegmentResult(iter([numbers(segment.frame_index)])))
    return path


@pytest.fixture(autouse=True)
def nothing_probed(monkeypatch):
    """Each test measures its disk anew."""
    monkeypatch.setattr(reading, "_best_way", {})


def drop(store: FeatureStore) -> bool:
    """Take a store's first shard out of memory; False where the system does not let us (a file system in memory)."""
    os.sync()
    file = store.layout.info.shard_file(0)
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return not reading.OpenShard(store.layout, store.shard(0)).is_cached(300)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_way_gives_the_same_frames(folder, io, pattern, cold):
    store, frames = FeatureStore.open(folder / "large", "tokens", io=io), list(PATTERNS[pattern])
    if cold:
        drop(store)
    for out in (None, store.buffer(len(frames)), np.empty((len(frames), *LARGE.frame_shape), np.float16)):
        np.testing.assert_array_equal(store.read("v", frames, out=out), numbers(frames))
    np.testing.assert_array_equal(store.read("v", frames, verify=True), numbers(frames))


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_a_forced_way_never_copies_from_a_map(folder, io, monkeypatch):
    store = FeatureStore.open(folder / "large", "tokens", io=io)
    expected = store.read("v", [3, 5])
    monkeypatch.setattr(reading.OpenShard, "_map", lambda _self, size: b"\xff" * size)
    store = FeatureStore.open(folder / "large", "tokens", io=io)
    np.testing.assert_array_equal(store.read("v", [3, 5]), expected)
    np.testing.assert_array_equal(store.read("v", [3], out=store.buffer(1)), expected[:1])


def test_direct_asks_the_page_cache_for_nothing(folder):
    store = FeatureStore.open(folder / "again", "tokens", io="direct")
    if not drop(store):
        pytest.skip("this file system keeps everything in memory")
    np.testing.assert_array_equal(store.read("v", range(200, 500)), numbers(range(200, 500)))
    opened = reading.OpenShard(store.layout, store.shard(0))
    assert not any(opened.is_cached(slot) for slot in range(210, 500, 50))


def test_to_look_whether_a_frame_is_in_memory_fetches_no_other(folder):
    store = FeatureStore.open(folder / "again", "tokens")
    if not drop(store):
        pytest.skip("this file system keeps everything in memory")
    opened, middle = reading.OpenShard(store.layout, store.shard(0)), LARGE.frame_bytes // 2
    looked_at = [slot for slot in range(20, 740, 30) if slot != 300]
    assert not any(opened.is_cached(slot) for slot in looked_at)
    assert not any(opened.is_cached(slot, middle) or opened.is_cached(slot + 1) for slot in looked_at)


def test_what_is_cold_is_measured_once_for_a_disk_and_then_read_the_best_way(folder, monkeypatch):
    store = FeatureStore.open(folder / "large", "tokens")
    if not drop(store):
        pytest.skip("this file system keeps everything in memory")
    probes, probe = [], reading._probe

    def counted(opened):
        probes.append(probe(opened))
        return probes[-1]

    monkeypatch.setattr(reading, "_probe", counted)
    np.testing.assert_array_equal(store.read("v", range(4)), numbers(range(4)))
    [measured] = probes
    assert measured.keys() == {"mmap", "pread", "direct"}
    assert all(seconds > 0 for seconds in measured.values())
    assert [*reading._best_way.values()] == [min(measured, key=measured.get)]
    other = FeatureStore.open(folder / "again", "tokens")
    drop(other)
    np.testing.assert_array_equal(other.read("v", range(4)), numbers(range(4)))
    assert len(probes) == 1
    assert reading.best_way(reading.OpenShard(other.layout, other.shard(0))) in measured


def test_too_few_cold_frames_are_no_measurement(folder):
    store = FeatureStore.open(folder / "large", "tokens")
    store.read("v", range(FRAMES), out=store.buffer(FRAMES))  # all in memory
    assert reading.best_way(reading.OpenShard(store.layout, store.shard(0))) == "pread"
    assert reading._best_way == {}


@pytest.fixture
def no_direct(monkeypatch):
    """A file system that refuses O_DIRECT, as some network ones do. (Linux's tmpfs takes it since 6.6.)"""
    real = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("no_direct")
def test_direct_is_refused_by_name_where_the_file_system_has_none_and_auto_goes_on(folder):
    store = FeatureStore.open(folder / "large", "tokens", io="direct")
    with pytest.raises(ValueError, match=r"tokens/c.0.0.0.*no direct I/O.*--set data.io=auto"):
        store.read("v", [1, 2])
    auto = FeatureStore.open(folder / "large", "tokens")
    if drop(auto):
        np.testing.assert_array_equal(auto.read("v", range(4)), numbers(range(4)))
        assert [*reading._best_way.values()] in (["pread"], ["mmap"])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
@pytest.mark.parametrize("io", WAYS)
def test_a_file_system_in_memory_is_read_by_every_way_or_refused_by_name(ram, io):
    FeatureStore.create(ram, "tokens", LARGE).extend_plan({"v": range(9)})
    store = FeatureStore.open(ram, "tokens", io=io)
    for task in store.pending():
        write_single(store, task, lambda segment: SegmentResult(iter([numbers(segment.frame_index)])))
    try:
        got = store.read("v", [8, 0, 1])
    except ValueError as error:
        assert io == "direct"  # Linux before 6.6
        assert "no direct I/O" in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(got, numbers([8, 0, 1]))


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_a_file_that_ends_inside_a_frame_is_named(folder, io, tmp_path, monkeypatch):
    """What a network file system can do between our look at the file and the read."""
    shutil.copytree(folder / "large", tmp_path / "cut")
    store = FeatureStore.open(tmp_path / "cut", "tokens", io=io)
    store.read("v", [0])
    os.truncate(store.layout.info.shard_file(0), 6 * store.layout.stride + 5)
    monkeypatch.setattr(reading.OpenShard, "is_current", lambda _: True)
    with pytest.raises(CacheCorrupt, match=r"tokens/c.0.0.0.*truncated"):
        store.read("v", [5, 6])


@pytest.mark.parametrize(("io", "unit"), [("pread", 1), ("pread", 5000), ("direct", 4096)])
def test_a_read_that_the_system_cuts_short_is_resumed(folder, io, unit, monkeypatch):
    """Was called "truncated", with the command that removes the file."""
    store = FeatureStore.open(folder / "large", "tokens", io=io)
    real, short = os.preadv, []

    def preadv(descriptor, targets, offset, *flags):
        count = real(descriptor, targets, offset, *flags)
        if count <= unit or flags:
            return count
        short.append(count)
        return max(unit, count // 2 // unit * unit)

    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(store.read("v", [5, 6, 9]), numbers([5, 6, 9]))
    assert short


def test_on_a_network_file_system_auto_reads_no_map(folder, tmp_path, monkeypatch):
    device = os.stat(folder).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /data rw shared:1 - nfs4 server:/data rw\n")
    monkeypatch.setattr(reading, "MOUNTS", mounts)
    reading.is_remote.cache_clear()
    monkeypatch.setattr(reading.OpenShard, "_map", lambda _self, size: b"\xff" * size)
    store = FeatureStore.open(folder / "large", "tokens")
    for _ in range(2):  # the second time the frame is known to be in memory
        np.testing.assert_array_equal(store.read("v", [3], out=store.buffer(1)), numbers([3]))
        np.testing.assert_array_equal(store.read("v", [3, 5]), numbers([3, 5]))
    reading.is_remote.cache_clear()


def test_an_unknown_way_and_frames_that_are_not_there_are_refused(folder):
    with pytest.raises(ValueError, match="auto, mmap, pread, direct"):
        FeatureStore.open(folder / "large", "tokens", io="uring")
    for io in WAYS:
        with pytest.raises(CacheMissing, match="not planned"):
            FeatureStore.open(folder / "large", "tokens", io=io).read("v", [FRAMES])
