"""A reader in a process of its own holds a store while another one damages, repairs, retries, grows and cleans it."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys

import pytest

from cache_schema import CacheCorrupt, CacheMissing, FeatureStore, SegmentResult, files, orphans, verify
from cache_schema.objects import ObjectPath, locate
from cache_schema.repair import repair_shard
from tests.cache_schema.makers import WANTED, extract, features, producer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["zarr", "obstore", "tests.cache_schema.makers"])
MODALITIES = ["tokens", "tokens_large"]
VIDEOS = sorted(set(WANTED) - {"dog"})


def replaced(modality, video, index):
    """Features after elk's file was replaced."""
    return features(modality, video, index) * (-1 if video == "elk" else 1)


def made_of_another_file(segment):
    batch = {modality: replaced(modality, segment.video_id, segment.frame_index) for modality in MODALITIES}
    return SegmentResult(iter([batch]))


def read_on(path, environment, pipe):
    """Read frames of stores that stay open until told to stop; then every frame once. Sends what went wrong."""
    os.environ.update(environment)
    rng, counts = random.Random(1), {"right": 0, "wrong": 0, "refused": 0, "failed before": 0}
    stores = [FeatureStore.open(locate(path), modality) for modality in MODALITIES]
    pipe.send("open")

    def read(store, video, index, expected=(features, replaced)):
        try:
            got = store.read(video, index, verify=True)
        except (CacheCorrupt, CacheMissing) as error:
            counts["failed before" if "failed" in str(error) else "refused"] += 1
        else:
            right = any((got == expect(store.modality, video, index)).all() for expect in expected)
            counts["right" if right else "wrong"] += 1

    while not pipe.poll():
        video = rng.choice(VIDEOS)
        read(rng.choice(stores), video, rng.sample(list(WANTED[video]), rng.randint(1, 3)))
    pipe.recv()
    pipe.send(dict(counts))
    counts.update(dict.fromkeys(counts, 0))
    for store in stores:
        for video in VIDEOS:
            read(store, video, list(WANTED[video]), (replaced,))
    pipe.send(counts)


def put(file, data):
    """Another file in the place of this one, as a copy from a damaged disk would be."""
    if isinstance(file, ObjectPath):
        file.write(data)
    else:
        file.with_suffix(".new").write_bytes(data)
        file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("kind", ["a folder", "an object store"])
def test_a_reader_gets_right_frames_or_an_error_and_all_of_them_in_the_end(kind, tmp_path, request):
    url = str(tmp_path / "store") if kind == "a folder" else request.getfixturevalue("s3")
    path, rng = locate(url), random.Random(2)
    extract(path, MODALITIES, bad={"dog": 1, "elk": 2})
    ours, theirs = CONTEXT.Pipe()
    reader = CONTEXT.Process(target=read_on, args=(url, dict(os.environ), theirs))
    reader.start()
    assert ours.recv() == "open"
    extract(path, MODALITIES, bad={"dog": 1}, retry_failed=True)
    produce = producer(MODALITIES, bad={"dog": 1})
    for turn in range(8):
        store = FeatureStore.open(path, rng.choice(MODALITIES))
        file = store.layout.info.shard_file(rng.choice([0, 1, 2, 3, 5]))
        data = bytearray(file.read_bytes(1 << 24) if isinstance(file, ObjectPath) else file.read_bytes())
        for _ in range(20):
            data[rng.randrange(len(data))] ^= 1
        put(file, bytes(data))
        for number in verify.damaged_shards(verify.full(FeatureStore.open(path, store.modality))):
            assert repair_shard(FeatureStore.open(path, store.modality), number, produce).repaired
        for orphan in orphans.find(path, dead_hosts={"node-7"}):
            orphans.remove(orphan)
        extract(path, MODALITIES, {**WANTED, f"grown{turn}": [1]}, bad={"dog": 1})
    for modality in MODALITIES:
        assert repair_shard(FeatureStore.open(path, modality), 5, made_of_another_file, changed={"elk"}).repaired
    ours.send("stop")
    during, after = ours.recv(), ours.recv()
    reader.join(60)
    assert reader.exitcode == 0
    assert during["wrong"] == after["wrong"] == 0
    assert during["right"] > 50
    assert after == {"right": len(MODALITIES) * len(VIDEOS), "wrong": 0, "refused": 0, "failed before": 0}


def test_processes_of_another_container_are_not_taken_for_dead(tmp_path):
    """Two containers of one machine may have one hostname, and in neither does the other's process number mean it."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a process namespace (unshare --pid)")
    folder = tmp_path / "folder"
    folder.mkdir()
    partial = files.partial_path(folder, "shard-0")
    partial.touch()
    sweep = "import sys; from pathlib import Path; from cache_schema import files; files.sweep(Path(sys.argv[1]))"
    # There, no process has this one's number.
    subprocess.run([*apart, sys.executable, "-c", sweep, str(folder)], check=True)
    assert partial.exists()
    files.discard(partial)
