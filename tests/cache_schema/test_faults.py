"""Damage on disk is found and named; errors while writing leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from cache_schema import CacheCorrupt, CacheMissing, FeatureStore, files, verify
from tests.cache_schema.makers import (
    SPECS,
    TOKENS,
    WANTED,
    create,
    extract,
    features,
    flip_bit,
    single,
    tree,
    write_single,
)

STRIDE = 128  # of the small tokens: 70 bytes, rounded up to 64


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "cache.zarr"
    extract(path, list(SPECS), bad={"dog": 1})
    return path


@pytest.fixture
def copy(sound, tmp_path):
    """A copy to damage. Shards: 0 ant + bee, 1-3 cat, 4 dog (failed), 5 elk."""
    shutil.copytree(sound, tmp_path / "cache.zarr")
    return tmp_path / "cache.zarr"


def shard_file(path, number, modality="tokens"):
    return path / modality / f"c.{number}.0.0"


def delete(path):
    shard_file(path, 0).unlink()


def empty(path):
    shard_file(path, 0).write_bytes(b"")


def truncate(path):
    os.truncate(shard_file(path, 0), shard_file(path, 0).stat().st_size - 1)


def truncate_in_frames(path):
    os.truncate(shard_file(path, 0), 3 * STRIDE + 5)


def lengthen(path):
    with shard_file(path, 0).open("ab") as file:
        file.write(b"\0" * 512)


def cut_a_page_out(path):
    raw = shard_file(path, 0).read_bytes()
    shard_file(path, 0).write_bytes(raw[:STRIDE] + raw[2 * STRIDE :])


def zero_the_end(path):
    raw = shard_file(path, 0).read_bytes()
    shard_file(path, 0).write_bytes(raw[:-300] + bytes(300))


def flip_footer(path):
    flip_bit(shard_file(path, 0), 7 * STRIDE + 40)


def flip_index(path):
    flip_bit(shard_file(path, 0), -50)


def swap(path):
    a, b = shard_file(path, 1), shard_file(path, 2)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def swap_modalities(path):
    shutil.copy(shard_file(path, 0, "tokens_large"), shard_file(path, 0))


def other_store(path):
    other = extract(path.parent / "other", wanted={"ant": [0, 3], "bee": [1]})["tokens"]
    shutil.copy(other.layout.info.shard_file(0), shard_file(path, 0))


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [
        (delete, {0: "deleted"}),
        (empty, {0: "truncated"}),
        (truncate, {0: "truncated"}),
        (truncate_in_frames, {0: "truncated"}),
        (lengthen, {0: "truncated"}),
        (cut_a_page_out, {0: "truncated"}),
        (zero_the_end, {0: "truncated"}),
        (flip_footer, {0: "footer"}),
        (flip_index, {0: "index"}),
        (swap, {1: "wrong_shard", 2: "wrong_shard"}),
        (swap_modalities, {0: "wrong_spec"}),
        (other_store, {0: "wrong_videos"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_shard_is_found_and_named_and_never_taken_for_missing(copy, damage, kinds):
    damage(copy)
    store = FeatureStore.open(copy, "tokens")
    for check in (verify.quick, verify.full):
        problems = check(store)
        assert {problem.shard: problem.kind for problem in problems} == kinds
        assert all(str(shard_file(copy, problem.shard)) in problem.message for problem in problems)
    damaged = str(shard_file(copy, min(kinds)))
    video = "ant" if 0 in kinds else "cat"
    if damage is delete:
        assert store.missing({video: list(WANTED[video])})[video].not_committed
        with pytest.raises(CacheMissing):
            store.read(video, list(WANTED[video]))
        assert [task.shards for task in store.pending()] == [(0,)]
        return
    for use in (
        store.pending,
        store.status,
        lambda: store.missing(WANTED),
        lambda: store.read(video, list(WANTED[video])),
    ):
        with pytest.raises(CacheCorrupt, match=re.escape(damaged)) as caught:
            use()
        assert f"rm -- {damaged}" in str(caught.value)
        assert str(caught.value).endswith("\n  pipeline extract-clip")


@pytest.mark.parametrize("damage", [delete, empty, flip_footer, swap_modalities])
def test_removing_the_named_file_and_extracting_again_repairs_the_store(copy, sound, damage):
    damage(copy)
    shard_file(copy, 0).unlink(missing_ok=True)
    extract(copy, list(SPECS), bad={"dog": 1})
    assert tree(copy) == tree(sound)


@pytest.mark.parametrize(("slot", "video", "frame"), [(0, "ant", 0), (3, "ant", 9), (4, "bee", 1), (6, "bee", 9)])
def test_one_flipped_bit_of_a_frame_is_named_by_shard_video_and_frame(copy, slot, video, frame):
    flip_bit(shard_file(copy, 0), slot * STRIDE + 33, bit=6)
    store = FeatureStore.open(copy, "tokens")
    assert verify.quick(store) == []
    (problem,) = verify.full(store)
    assert (problem.shard, problem.video_id, problem.frame_index, problem.kind) == (0, video, frame, "frame")
    with pytest.raises(CacheCorrupt, match=f"frame {frame} of video '{video}'") as caught:
        store.read(video, list(WANTED[video]), verify=True)
    assert (caught.value.video_id, caught.value.frame_index) == (video, frame)


def test_a_retry_does_not_copy_a_damaged_frame(copy):
    path = copy.parent / "retry"
    extract(path, bad={"bee": 0})
    flip_bit(shard_file(path, 0), 3)
    with pytest.raises(CacheCorrupt, match="frame 0 of video 'ant'"):
        extract(path, retry_failed=True)


def test_every_flipped_bit_of_a_shard_is_found_by_the_full_check(tmp_path):
    store = extract(tmp_path, ["pooled/layer8"], wanted={"ant": [0], "bee": [1], "cat": [2, 3]}, bad={"bee": 0})
    file = store["pooled/layer8"].layout.info.shard_file(0)
    raw = file.read_bytes()
    rng = np.random.default_rng(0)
    offsets = [*range(0, 4 * 64, 5), *rng.integers(0, len(raw), 60).tolist()]
    for offset in offsets:
        flip_bit(file, offset, int(rng.integers(8)))
        found = verify.full(FeatureStore.open(tmp_path, "pooled/layer8"))
        assert found, f"a flipped bit of byte {offset} was not found"
        file.write_bytes(raw)
    assert verify.full(FeatureStore.open(tmp_path, "pooled/layer8")) == []


def test_a_clean_store_has_no_problems_and_an_unfinished_one_says_which_shards(sound, tmp_path):
    for modality in SPECS:
        assert verify.full(FeatureStore.open(sound, modality)) == []
    store = create(tmp_path)
    store.extend_plan(WANTED)
    write_single(store, store.pending()[1], single())
    assert [(p.shard, p.kind) for p in verify.quick(store)] == [(0, "missing"), (4, "missing"), (5, "missing")]


def test_a_file_where_no_shard_belongs_is_reported(copy):
    (copy / "tokens/c.99.0.0").mkdir()
    assert [problem.kind for problem in verify.quick(FeatureStore.open(copy, "tokens"))] == ["unplanned"]


def more_rows_than_the_plan(videos):
    file = videos / "frame_index/zarr.json"
    document = json.loads(file.read_text())
    document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 21], [1 << 20]
    shutil.rmtree(videos / "frame_index/c")  # a hole reads as the fill value, of any length
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda videos: flip_bit(videos / "frame_index/c/0", 2),
        lambda videos: flip_bit(videos / "id/c/0", 2),
        lambda videos: flip_bit(videos / "status/tokens/c/0", 0, bit=1),
        lambda videos: (videos / "id/zarr.json").write_text("{"),
        lambda videos: (videos / "start/zarr.json").write_text("{}"),
        lambda videos: (videos / "start/zarr.json").unlink(),
        lambda videos: (videos / "length/c/0").write_bytes(b"\1"),
        more_rows_than_the_plan,
    ],
)
def test_an_index_that_lies_or_cannot_be_read_is_reported_and_made_again(copy, sound, spoil):
    store = FeatureStore.open(copy, "tokens")
    spoil(copy / "videos")
    (problem,) = verify.quick(store)
    assert (problem.kind, problem.shard) == ("videos_index", None)
    store.finalize()
    assert verify.quick(store) == []
    assert tree(copy) == tree(sound)


def test_an_index_older_than_the_last_videos_is_not_a_problem(tmp_path):
    store = create(tmp_path)
    store.extend_plan(WANTED)
    write_single(store, store.pending()[1], single())
    store.finalize()
    store.extend_plan({"fox": [0]})
    for task in store.pending():
        write_single(store, task, single())
    assert verify.full(store) == []


# --- errors while writing


@pytest.mark.parametrize(
    ("call", "fails_at"),
    [
        ("pwrite", 0),
        ("pwrite", 7),
        ("pwrite", 20),
        ("ftruncate", 1),
        ("fsync", 0),
        ("fsync", 3),
        ("link", 0),
    ],
)
def test_a_full_disk_at_any_call_leaves_nothing_behind_and_harms_nothing(copy, sound, monkeypatch, call, fails_at):
    store = FeatureStore.open(copy, "tokens")
    shard_file(copy, 1).unlink()
    before, real, calls = tree(copy), getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    task = store.pending()[0]
    monkeypatch.setattr(os, call, failing)
    with suppress(OSError):
        write_single(store, task, single())
    monkeypatch.undo()
    assert len(calls) > fails_at, "the fault was never met"
    assert not list(copy.rglob("*.partial"))
    after = tree(copy)
    assert {name: after[name] for name in before} == before
    assert verify.full(FeatureStore.open(copy, "tokens")) == ([] if shard_file(copy, 1).exists() else [ANY])
    extract(copy, list(SPECS), bad={"dog": 1})
    assert tree(copy) == tree(sound)


def test_a_file_size_limit_of_the_system_is_an_ordinary_error(tmp_path):
    create(tmp_path, "tokens_large").extend_plan({"ant": range(6)})
    code = (
        "import resource, sys\n"
        "from tests.cache_schema.makers import *\n"
        f"store = FeatureStore.open({str(tmp_path)!r}, 'tokens_large')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "try:\n"
        "    write_single(store, store.pending()[0], single('tokens_large'))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == str(errno.EFBIG)
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "tokens_large/c").exists()


def test_a_flush_comes_before_the_commit_and_the_folder_is_flushed_after_it(tmp_path, monkeypatch):
    store = create(tmp_path)
    store.extend_plan({"ant": [0]})
    trace = []

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    real_link, real_mkdir = os.link, os.mkdir
    monkeypatch.setattr(os, "fsync", lambda descriptor: trace.append(("fsync", name(descriptor))))
    monkeypatch.setattr(os, "mkdir", lambda path, *a: (trace.append(("mkdir", Path(path))), real_mkdir(path, *a))[1])
    monkeypatch.setattr(os, "link", lambda a, b: (trace.append(("link", Path(a), Path(b))), real_link(a, b))[1])
    write_single(store, store.pending()[0], single())
    array, final = tmp_path / "tokens", tmp_path / "tokens/c.0.0.0"
    partial = trace[0][1]
    assert partial.name.endswith(".partial")
    assert trace == [("fsync", partial), ("link", partial, final), ("fsync", array)]


def test_without_hard_links_the_first_writer_still_wins(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    extract(tmp_path / "a", list(SPECS), bad={"dog": 1})
    final = tmp_path / "final"
    for data, wins in ((b"first", True), (b"second", False)):
        assert files.publish_bytes(final, data) is wins
    assert final.read_bytes() == b"first"
    monkeypatch.undo()
    extract(tmp_path / "b", list(SPECS), bad={"dog": 1})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert not list(tmp_path.rglob(".*"))


# --- partial files of others


def partial_of(folder, pid, host=None):
    file = folder / f".shard-0.{host or files.HOST}.{pid}.0123abcd.partial"
    file.write_bytes(b"half a shard")
    return file


def test_partial_files_of_dead_writers_are_swept_and_those_of_living_ones_are_kept(tmp_path):
    create(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            dead.wait()
        living = partial_of(tmp_path / "tokens", alive.pid)
        elsewhere = partial_of(tmp_path / "tokens", dead.pid, host="another-host")
        name, boot = re.fullmatch(r"(.+)-([0-9a-f]{8}-[0-9a-f]{4})(-\d+)?", files.HOST).group(1, 2)
        namesake = partial_of(tmp_path / "tokens", dead.pid, host=files.HOST.replace(boot, "01234567-89ab"))
        assert name
        stale = [partial_of(folder, dead.pid) for folder in (tmp_path, tmp_path / "plan", tmp_path / "tokens")]
        folder = tmp_path / f".videos.{stale[0].name.split('.')[2]}.{dead.pid}.0123abcd.partial"
        (folder / "id").mkdir(parents=True)
        FeatureStore.open(tmp_path, "tokens", TOKENS)
        assert all(file.exists() for file in stale), "opening for reading must not write"
        create(tmp_path)
        assert [file.exists() for file in (living, elsewhere, namesake, *stale, folder)] == [
            True,
            True,
            True,
            False,
            False,
            False,
            False,
        ]
        alive.communicate(b"\n")


def test_a_partial_file_that_this_process_is_writing_is_not_swept(tmp_path):
    store = create(tmp_path)
    store.extend_plan({"ant": range(6)})
    write_single(store, store.pending()[0], single(on_batch=lambda _: create(tmp_path), batch_size=2))
    np.testing.assert_array_equal(store.read("ant", [5]), features("tokens", "ant", [5]))


def test_a_writer_of_another_user_counts_as_living(tmp_path, monkeypatch):
    def not_permitted(pid, signal):
        raise PermissionError(pid, signal)

    create(tmp_path)
    partial = partial_of(tmp_path / "tokens", 1)
    monkeypatch.setattr(os, "kill", not_permitted)
    create(tmp_path)
    assert partial.exists()


def test_a_name_that_only_looks_like_a_partial_file_is_left_alone(tmp_path):
    create(tmp_path)
    for name in (".partial", ".x.partial", "shard-0.host.1.0123abcd.partial", ".notes"):
        (tmp_path / name).write_text("mine")
    create(tmp_path)
    assert len(list(tmp_path.glob("*.partial"))) == 3
