"""What lies in a store and is no part of it, and what goes out of it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from cache_schema import CacheCorrupt, FeatureStore, files, orphans
from cache_schema.export import webdataset
from tests.cache_schema.makers import SPECS, WANTED, extract, features, flip_bit, tree


def partial(folder, pid, host=files.HOST):
    path = folder / f".shard-0.{host}.{pid}.0123abcd.partial"
    path.write_bytes(b"half a shard")
    return path


def test_a_store_that_was_written_to_the_end_has_no_orphans(tmp_path):
    extract(tmp_path, list(SPECS), bad={"dog": 1})
    assert orphans.find(tmp_path) == []


def test_every_kind_of_orphan_is_found_and_only_the_dead_ones_count_as_dead(tmp_path):
    extract(tmp_path / "a", list(SPECS), bad={"dog": 1})
    store = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    dead = [partial(folder, gone.pid) for folder in (store, store / "plan", store / "pooled", store / "pooled/layer8")]
    elsewhere = partial(store / "tokens", 1, "node-7")
    stray = [
        store / "notes.txt",
        store / "plan/000000.npz.bak",
        store / "tokens/c.99.0.0",
        store / "tokens/c.0.0.0.copy",
    ]
    stray += [store / "tokens/thumbs", store / "pooled/layer9", store / "tokens/c"]
    for path in stray:
        path.write_bytes(b"abc")
    before = tree(store)
    found = orphans.find(store)
    assert tree(store) == before
    assert {o.path for o in found if o.dead} == set(dead)
    assert {o.path for o in found if o.kind == "unplanned"} == set(stray)
    assert [(o.path, o.why) for o in found if o.kind == "partial" and not o.dead] == [(elsewhere, "a writer on node-7")]
    assert {o.bytes for o in found} == {3, 12}
    assert {o.path for o in orphans.find(store, dead_hosts={"node-7"}) if o.dead} == {*dead, elsewhere}
    for orphan in found:
        orphans.remove(orphan)
    elsewhere.unlink(missing_ok=True)
    extract(tmp_path / "b", list(SPECS), bad={"dog": 1})
    assert tree(store) == tree(tmp_path / "b")


def test_what_this_process_is_writing_is_no_dead_orphan(tmp_path):
    seen = []
    extract(tmp_path, on_batch=lambda _: seen.extend(orphans.find(tmp_path)))
    assert {orphan.kind for orphan in seen} == {"partial"}
    assert not any(orphan.dead for orphan in seen)


def test_what_another_process_makes_while_orphans_are_looked_for_is_none(tmp_path, monkeypatch):
    """Shards of a growth, new modalities, a shard at work: made before the n-th look at a folder, for every n."""
    extract(tmp_path / "sound")
    real, calls = files.names_in, 0
    for at in range(100):
        store = shutil.copytree(tmp_path / "sound", tmp_path / str(at))
        calls = 0

        def then_another_makes_more(folder, at=at, store=store):
            nonlocal calls
            calls += 1
            if calls == at + 1:
                with monkeypatch.context() as patched:
                    patched.setattr(files, "names_in", real)
                    extract(store, list(SPECS), {**WANTED, "new": range(20)})
                    partial(store / "tokens", os.getppid())
            return real(folder)

        with monkeypatch.context() as patched:
            patched.setattr(files, "names_in", then_another_makes_more)
            found = orphans.find(store)
        assert [(orphan.path, at) for orphan in found if orphan.dead or orphan.kind == "unplanned"] == []
        if calls <= at:
            break
    assert 6 < at < 99


def samples(folder):
    """(json, arrays) of every sample of an export, in order, by a plain tar reader."""
    found = []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        for (name, meta), (other, data) in zip(members[::2], members[1::2], strict=True):
            assert (name, other) == (f"{len(found):08d}.json", f"{len(found):08d}.npz")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found.append((json.loads(meta), dict(arrays)))
    return found


@pytest.mark.parametrize("tar_bytes", [1, 12_000, 1 << 30])
def test_an_export_holds_every_video_that_all_modalities_have(tmp_path, tar_bytes):
    names = ["tokens", "pooled/layer8"]
    stores = extract(tmp_path / "store", names, wanted={**WANTED, "../odd.name\n": [4]}, bad={"dog": 1})
    report = webdataset(stores, tmp_path / "out", tar_bytes=tar_bytes)
    assert report.files == {1: 5, 12_000: 2, 1 << 30: 1}[tar_bytes]
    assert list(report.skipped) == ["dog"]
    assert "truncated" in report.skipped["dog"]
    got = samples(tmp_path / "out")
    assert [meta["video"] for meta, _ in got] == ["../odd.name\n", "ant", "bee", "cat", "elk"]
    assert (report.videos, report.frames) == (5, 35)
    for meta, arrays in got:
        video, index = meta["video"], arrays["frame_index"]
        assert index.tolist() == sorted(WANTED.get(video, [4]))
        for name in names:
            np.testing.assert_array_equal(arrays[name.replace("/", "_")], features(name, video, index.tolist()))


def test_the_webdataset_library_reads_an_export(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset as wds

    webdataset(extract(tmp_path / "store"), tmp_path / "out")
    read = list(wds.WebDataset([str(p) for p in (tmp_path / "out").iterdir()], shardshuffle=False))
    assert [json.loads(sample["json"])["video"] for sample in read] == list(WANTED)


def test_an_export_appears_whole_or_not_at_all_and_never_over_something(tmp_path):
    stores = extract(tmp_path / "store")
    flip_bit(tmp_path / "store/tokens/c.5.0.0", 5)
    with pytest.raises(CacheCorrupt, match="'elk'"):
        webdataset(stores, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        webdataset(stores, tmp_path / "out")
    assert FeatureStore.open(tmp_path / "store", "tokens").status()["ant"].ok
