"""Servers and writers that are killed with -9, on SeaweedFS, whose data survive on disk; the end is the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import pytest

from cache_schema import CacheError, FeatureStore, connections, objects, verify
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from tests.cache_schema.makers import WANTED, create, extract, features
from tests.cache_schema.test_objects import bytes_of, files_of
from tests.object_servers import KEY, SECRET, Seaweed, use

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["zarr", "obstore", "tests.cache_schema.children"])
MODALITIES = ["tokens", "pooled/layer8"]
SMALL = {video: WANTED[video] for video in ("ant", "bee", "cat", "dog")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted extraction leaves on a local disk."""
    path = tmp_path_factory.mktemp("whole") / "cache.zarr"
    extract(path, MODALITIES, SMALL)
    return files_of(path)


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory):
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def store(seaweed, monkeypatch, request):
    use(monkeypatch, seaweed.port, max_retries=20)
    return locate(f"s3://features/{request.node.name.partition('[')[0][-60:]}")


def check_what_is_left(store):
    """Every shard is whole or absent, and every frame that can be read is right."""
    for modality in MODALITIES:
        try:
            opened = FeatureStore.open(store, modality)
        except CacheError as error:
            assert "no cache" in str(error) or "holds no" in str(error)  # noqa: PT017
            continue
        assert {problem.kind for problem in verify.full(opened)} <= {"missing"}
        for video, status in opened.status().items():
            if status.ok:
                index = list(SMALL[video])
                assert (opened.read(video, index) == features(modality, video, index)).all()


def run_slowly(store, single_put, environment):
    os.environ.update(environment)  # the fork server may be older than the store's credentials
    objects.SINGLE_PUT = single_put
    extract(store, MODALITIES, SMALL, on_batch=lambda _: time.sleep(0.01))


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
def test_writers_killed_at_random_moments_leave_no_half_shard_and_the_next_one_finishes(store, whole, single_put):
    store = store / str(single_put)
    began = time.monotonic()
    child = CONTEXT.Process(target=run_slowly, args=(store / "timed", single_put, dict(os.environ)))
    child.start()
    child.join(500)
    assert child.exitcode == 0
    took, rng, killed = time.monotonic() - began, random.Random(3), 0
    for _ in range(4):
        child = CONTEXT.Process(target=run_slowly, args=(store / "killed", single_put, dict(os.environ)))
        child.start()
        time.sleep(rng.uniform(0.2, 0.9) * took)
        child.kill()
        child.join(60)
        killed += child.exitcode == -9
        check_what_is_left(store / "killed")
    if not killed:
        pytest.skip("every writer was done before it could be killed")
    extract(store / "killed", MODALITIES, SMALL)
    assert bytes_of(str(store / "killed")) == whole == bytes_of(str(store / "timed"))


def test_a_server_that_is_killed_and_comes_back_is_waited_for_or_the_run_resumes(seaweed, store, whole, monkeypatch):
    stores = {modality: create(store, modality) for modality in MODALITIES}
    stores["tokens"].extend_plan(SMALL)
    kills = [1, 6]
    batches = 0

    def kill_in_the_middle(_):
        nonlocal batches
        batches += 1
        if batches in kills:
            seaweed.kill()
            if batches == kills[0]:
                seaweed.start()  # at once: the requests in between are retried

    connections.forget_connections()
    monkeypatch.setitem(connections.RETRY, "max_retries", 6)
    with pytest.raises(StoreUnavailable, match=r"went on failing\. What is committed is kept"):
        extract(store, MODALITIES, SMALL, on_batch=kill_in_the_middle)
    assert batches >= kills[1]
    seaweed.start()
    monkeypatch.setitem(connections.RETRY, "max_retries", 30)
    connections.forget_connections()
    check_what_is_left(store)
    extract(store, MODALITIES, SMALL)
    assert bytes_of(str(store)) == whole
    assert all(verify.full(opened) == [] for opened in stores.values())


def test_a_wrong_secret_is_refused_at_once_and_not_shown(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"wrong{SECRET}")
    connections.forget_connections()
    with pytest.raises(StoreUnavailable, match=r"the store refused it \(403") as caught:
        create(store)
    assert caught.value.refused
    assert SECRET not in str(caught.value)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
