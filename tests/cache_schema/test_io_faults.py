"""The n-th file operation fails, for every n: the store stays readable, resumable, and equal at the end."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress

import pytest

from cache_schema import CacheError, FeatureStore, files, verify
from tests.cache_schema.io_faults import FileLayer, Killed
from tests.cache_schema.makers import extract, features, tree

pytestmark = pytest.mark.usefixtures("zarr_once")

WANTED = {"ant": [0, 3], "bee": [1], "cat": range(7)}  # a shard of two, a run of two
MODALITIES = ["tokens", "pooled/layer8"]
FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short": "short", "kill": "kill"}


def run(path, layer=None):
    with (layer or FileLayer()).installed():
        extract(path, MODALITIES, WANTED, shard_frames=4, bad={"bee": 0})


@pytest.fixture(scope="module")
def whole(zarr_once, tmp_path_factory):  # noqa: ARG001
    path = tmp_path_factory.mktemp("whole") / "cache.zarr"
    layer = FileLayer()
    run(path, layer)
    return tree(path), layer.calls


def readable(path):
    for modality in MODALITIES:
        try:
            store = FeatureStore.open(path, modality)
        except CacheError as error:
            assert "no cache" in str(error) or "holds no" in str(error)  # noqa: PT017
            continue
        assert {problem.kind for problem in verify.full(store)} <= {"missing", "videos_index"}
        for video, status in store.status().items():
            if status.ok:
                index = list(WANTED[video])
                assert (store.read(video, index, verify=True) == features(modality, video, index)).all()


def fail_and_resume(path, at, fault, expected):
    """False when the run was over before call number ``at``."""
    layer = FileLayer(at, fault)
    with suppress(OSError, Killed):
        run(path, layer)
    if not layer.hit:
        return False
    readable(path)
    if fault == "short":
        assert tree(path) == expected  # a short write is no error: the rest is written
    run(path)
    assert tree(path) == expected, f"after {fault} at call {at} ({layer.hit})"
    shutil.rmtree(path)
    return True


def test_the_file_layer_sees_every_kind_of_call(tmp_path):
    seen = set()
    layer = FileLayer()
    real = layer.call
    layer.call = lambda name, *args, **kwargs: (seen.add(name), real(name, *args, **kwargs))[1]
    run(tmp_path / "cache.zarr", layer)
    assert seen >= {"open", "pwrite", "pread", "fsync", "ftruncate", "link", "unlink", "replace", "mkdir"}


def test_04_05_calls_fail_all_over_a_run_and_the_resumed_store_is_byte_equal(ram, whole):
    expected, calls = whole
    assert calls > 150
    for number, at in enumerate(range(0, calls, 7)):
        assert fail_and_resume(ram / "cache.zarr", at, list(FAULTS.values())[number % 4], expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_04_05_every_call_fails_once_and_the_resumed_store_is_byte_equal(ram, whole, fault):
    expected, calls = whole
    for at in range(calls):
        assert fail_and_resume(ram / "cache.zarr", at, FAULTS[fault], expected)


def test_a_partial_file_that_could_not_be_removed_is_swept_later(tmp_path, monkeypatch):
    path = files.partial_path(tmp_path, "shard-0")
    path.write_bytes(b"half")

    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.unlink", refuse)
    with pytest.raises(OSError, match="Input/output"):
        files.discard(path)
    monkeypatch.undo()
    assert files.sweep(tmp_path) == [path]
