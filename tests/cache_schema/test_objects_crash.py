"""Servers and writers that are killed with -9; the end is the same bytes.

The server is SeaweedFS, whose data survive on disk. Writers are killed on Azurite too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from cache_schema import CacheError, FeatureStore, connections, objects, verify
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from tests.cache_schema.makers import WANTED, create, extract, features
from tests.cache_schema.test_objects import bytes_of, files_of
from tests.object_servers import KEY, SECRET, FaultProxy, Seaweed, use, use_azure

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
    """Every shard is whole or absent, and every frame that can be read is right; ``videos/`` may be old."""
    for modality in MODALITIES:
        try:
            opened = FeatureStore.open(store, modality)
        except CacheError as error:
            assert "no cache" in str(error) or "holds no" in str(error)  # noqa: PT017
            continue
        assert {problem.kind for problem in verify.full(opened)} <= {"missing", "videos_index"}
        for video, status in opened.status().items():
            if status.ok:
                index = list(SMALL[video])
                assert (opened.read(video, index) == features(modality, video, index)).all()


def write(store, single_put, environment):
    os.environ.update(environment)  # the fork server may be older than the store's credentials
    objects.SINGLE_PUT = single_put
    extract(store, MODALITIES, SMALL)


class Executioner:
    """Kills the writer at its n-th request that changes the store; the store gets that request or does not."""

    def __init__(self, server, point_at, at=0, *, passed_on=True):
        self.point_at, self.at, self.passed_on, self.count, self.writer = point_at, at, passed_on, 0, None
        self.counting, self.proxy = threading.Lock(), FaultProxy(server.port, self.decide)

    def decide(self, method, _path, _headers):
        with self.counting:
            self.count += method not in ("GET", "HEAD")
            if method in ("GET", "HEAD") or self.count != self.at:
                return None
        self.writer.kill()
        return None if self.passed_on else "reset"

    def run(self, store, single_put, monkeypatch):
        """How the writer ended."""
        with self.proxy as proxy:
            self.point_at(monkeypatch, proxy.port, max_retries=20)
            self.writer = CONTEXT.Process(target=write, args=(store, single_put, dict(os.environ)))
            self.writer.start()
            self.writer.join(500)
            while proxy.under_way:  # the store may still be at work on what the dead one asked
                time.sleep(0.01)
        return self.writer.exitcode


@pytest.mark.parametrize("passed_on", [True, False])
@pytest.mark.parametrize(("kind", "single_put"), [("s3", objects.SINGLE_PUT), ("s3", 1000), ("az", objects.SINGLE_PUT)])
def test_writers_killed_at_their_requests_leave_no_half_shard_and_the_next_one_finishes(
    request, whole, monkeypatch, kind, single_put, passed_on
):
    server = request.getfixturevalue({"s3": "seaweed", "az": "azurite"}[kind])
    store = request.getfixturevalue("store") if kind == "s3" else locate(request.getfixturevalue("az"))
    store, point_at = store / f"{single_put}-{passed_on}", {"s3": use, "az": use_azure}[kind]
    uninterrupted = Executioner(server, point_at)
    assert uninterrupted.run(store / "whole", single_put, monkeypatch) == 0
    assert uninterrupted.count > (30 if single_put > 1000 else 60)
    ended = []
    for at in (1, 2, 4, 7, 5, 9, 14, 3, 11, 6):  # each run goes on where the last one died
        executioner = Executioner(server, point_at, at, passed_on=passed_on)
        ended.append(executioner.run(store / "killed", single_put, monkeypatch))
        point_at(monkeypatch, server.port, max_retries=20)
        check_what_is_left(store / "killed")
        if ended[-1] == 0:
            break
    assert ended[:5] == [-signal.SIGKILL] * 5
    assert set(ended[5:]) <= {-signal.SIGKILL, 0}
    extract(store / "killed", MODALITIES, SMALL)
    assert bytes_of(str(store / "killed")) == whole == bytes_of(str(store / "whole"))


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
