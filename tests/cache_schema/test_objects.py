"""A store in an object store is the same store: same bytes, same commits, same refusals.

The servers are moto and, where the fixture is ``bucket``, Azurite too. What is Azure's alone is in
test_objects_azure.py.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import AzureStore, S3Store
from zarr.storage import ObjectStore

from cache_schema import (
    CacheCorrupt,
    CacheMissing,
    FeatureStore,
    SegmentResult,
    connections,
    files,
    metadata,
    objects,
    orphans,
    verify,
)
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from cache_schema.repair import repair_shard
from tests.cache_schema.makers import SPECS, WANTED, create, extract, features, single, tree, write_single
from tests.object_servers import SECRET, FaultProxy, first, use, use_for

FAILING = {"bad": {"dog": 1}}


def bytes_of(url):
    """Every object below a URL, like ``tree`` of a folder without its folders."""
    root = locate(url)
    keys = [entry["path"] for entry in obstore.list(root._store(), f"{root.key}/").collect()]
    return {key.removeprefix(f"{root.key}/"): bytes(obstore.get(root._store(), key).bytes()) for key in keys}


def files_of(path):
    return {name: data for name, data in tree(path).items() if data != b"folder"}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "cache.zarr"
    extract(path, list(SPECS), **FAILING)
    return path


@pytest.fixture
def tokens(s3):
    """A small store of one modality, on S3."""
    return extract(locate(s3))["tokens"]


@pytest.fixture
def store(bucket):
    """A small store of one modality, on each kind."""
    return extract(locate(bucket))["tokens"]


@pytest.fixture
def server(bucket, request):
    """The server that ``bucket`` is on."""
    return request.getfixturevalue({"s3": "moto", "az": "azurite"}[bucket[:2]])


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
def test_a_store_is_byte_for_byte_the_local_one_and_sound(bucket, local, monkeypatch, single_put):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)  # 1000: to S3 in parts, and then copied
    stores = extract(locate(bucket), list(SPECS), **FAILING)
    assert bytes_of(bucket) == files_of(local)
    for modality, store in stores.items():
        assert verify.full(store) == []
        assert store.pending() == []
        assert {video for video, status in store.status().items() if not status.ok} == {"dog"}
        for video in sorted(set(WANTED) - {"dog"}):
            index = list(WANTED[video])[::-1]
            assert (store.read(video, index, verify=True) == features(modality, video, index)).all()
        assert repr(store) == f"FeatureStore({bucket!r}, {modality!r})"


def test_a_second_extraction_writes_nothing(bucket, server, monkeypatch):
    extract(locate(bucket))
    with FaultProxy(server.port) as proxy:
        use_for(bucket, monkeypatch, proxy.port)
        extract(locate(bucket))
    assert {method for method, _, _ in proxy.seen} == {"GET", "HEAD"}


def test_zarr_python_reads_it_through_obstore(bucket, local):
    extract(locate(bucket), list(SPECS), **FAILING)
    root = locate(bucket)
    client = {"s3": S3Store, "az": AzureStore}[root.scheme](
        root.bucket, prefix=root.key, client_options={"allow_http": True}
    )
    remote = zarr.open_group(ObjectStore(client, read_only=True), mode="r")
    here = zarr.open_group(local, mode="r")
    for modality in SPECS:
        assert np.array_equal(remote[modality][:], here[modality][:], equal_nan=True)
    ids = bytes(remote["videos/id"][:]).decode().split("\0")[:-1]
    start, count = (int(remote[f"videos/{name}"][ids.index("cat")]) for name in ("start", "length"))
    assert (remote["tokens"][start : start + count] == features("tokens", "cat", range(20))).all()


def test_frames_come_in_any_order_with_repeats_into_a_given_array(tokens):
    for modality_store in (tokens, pickle.loads(pickle.dumps(tokens))):
        index = [19, 0, 7, 8, 0, 16]
        out = np.empty((6, 5, 7), "float16")
        assert modality_store.read("cat", index, out) is out
        assert (out == features("tokens", "cat", index)).all()
    assert tokens.read("ant", []).shape == (0, 5, 7)
    assert tokens.facts("bee") == {"size": 3, "pts": [1, 5, 9]}


def test_what_is_not_there_is_said_with_the_command(s3, tokens):
    with pytest.raises(CacheMissing, match=r"not planned: frame 99\.\nExtract with:\n  pipeline extract-clip"):
        tokens.read("ant", [99])
    with pytest.raises(CacheMissing, match=f"There is no cache at {s3}/nothing"):
        FeatureStore.open(f"{s3}/nothing", "tokens")
    with pytest.raises(CacheMissing, match="holds no 'pooled/layer8' yet"):
        FeatureStore.open(s3, "pooled/layer8")
    tokens.layout.info.shard_file(0).delete()
    with pytest.raises(CacheMissing, match="not extracted yet"):
        FeatureStore.open(s3, "tokens").read("ant", [0])
    assert [(p.shard, p.kind) for p in verify.quick(tokens)] == [(0, "deleted")]
    assert [task.shards for task in tokens.pending()] == [(0,)]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_object_is_named_with_the_command_that_removes_it(bucket, store, damage):
    shard = store.layout.info.shard_file(0)
    raw = bytearray(shard.read_bytes(1 << 20))
    if damage == "flip":
        raw[33] ^= 1
    new = {"cut": raw[:-1], "empty": b"", "swap": store.layout.info.shard_file(1).read_bytes(1 << 20)}
    shard.write(bytes(new.get(damage, raw)))
    reader = FeatureStore.open(bucket, "tokens")
    with pytest.raises(CacheCorrupt) as caught:
        reader.read("ant", [0])
    commands = {"s3": f"aws s3 rm {shard}", "az": f"az storage blob delete --container features --name {shard.key}"}
    assert commands[shard.scheme] in str(caught.value)
    kinds = {"flip": "frame", "cut": "truncated", "empty": "truncated", "swap": "wrong_shard"}
    assert caught.value.kind == kinds[damage]
    assert [(p.shard, p.kind) for p in verify.full(reader)] == [(0, kinds[damage])]


def test_a_reader_gets_the_new_version_of_a_shard_that_a_retry_replaced(bucket):
    extract(locate(bucket), bad={"bee": 1})
    reader = FeatureStore.open(bucket, "tokens")
    reader.read("ant", [0])  # it now knows the footer of the old version
    assert not reader.status()["bee"].ok
    extract(locate(bucket), retry_failed=True)
    known = reader._shards[0]
    assert (reader.read("ant", [3, 0]) == features("tokens", "ant", [3, 0])).all()
    assert reader._shards[0] is not known
    assert (reader.read("bee", [1]) == features("tokens", "bee", [1])).all()
    assert reader.status()["bee"].ok
    assert verify.full(reader) == []


def test_of_two_retries_the_one_that_looked_at_an_old_version_changes_nothing(s3):
    store = extract(locate(s3), bad={"bee": 1, "ant": 1})["tokens"]
    (task,) = [task for task in store.pending(retry_failed=True) if task.shards == (0,)]

    def while_another_retries(_):
        if len(done) == 0:
            done.append(extract(locate(s3), retry_failed=True))

    done = []
    report = write_single(store, task, single(on_batch=while_another_retries))
    assert done
    assert report.skipped
    assert verify.full(store) == []


# ---------------------------------------------------------------- commits


def test_of_two_writers_of_a_shard_the_first_wins_and_the_other_says_so(bucket):
    store = create(locate(bucket))
    store.extend_plan(WANTED)
    task = store.pending()[0]
    reports = []

    def other_writer(_):
        if not reports:
            reports.append(None)
            reports[0] = write_single(FeatureStore.open(bucket, "tokens"), task, single())

    second = write_single(store, task, single(on_batch=other_writer))
    assert (reports[0].skipped, second.skipped) == (False, True)


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
@pytest.mark.parametrize("fault", ["lose answer", "reset", 500, 503])
def test_a_commit_whose_answer_is_lost_counts_once_and_as_ours(bucket, server, monkeypatch, fault, single_put):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)
    store = create(locate(bucket))
    store.extend_plan(WANTED)
    in_parts = bucket.startswith("s3") and single_put == 1000  # Azure takes any size at once
    method, part = ("POST", "/tokens/c.0.0.0?uploadId") if in_parts else ("PUT", "/tokens/c.0.0.0")
    with FaultProxy(server.port, first(1, fault, method, part)) as proxy:
        use_for(bucket, monkeypatch, proxy.port)
        report = write_single(store, store.pending()[0], single())
    assert not report.skipped
    assert report.frames == 7
    assert fault in [what for asked, path, what in proxy.seen if asked == method and part in path]
    use_for(bucket, monkeypatch, server.port)
    assert (FeatureStore.open(bucket, "tokens").read("ant", [0, 9]) == features("tokens", "ant", [0, 9])).all()
    assert not [key for key in bytes_of(bucket) if "partial" in key]


def test_an_exchange_that_was_not_done_is_done_again_and_one_that_lost_its_answer_is_not(s3, moto, monkeypatch):
    file = locate(s3) / "one"
    for fault in (503, "lose answer"):
        file.write(b"old")
        old = file.head()[1]
        with FaultProxy(moto.port, first(1, fault, "PUT")) as proxy:
            use(monkeypatch, proxy.port, max_retries=0)
            new = file.exchange(b"new", old)
        use(monkeypatch, moto.port)
        assert new == file.head()[1] != old
        assert [method for method, _, _ in proxy.seen].count("PUT") == (2 if fault == 503 else 1)
        assert file.exchange(b"newer", old) is None
        assert file.read_bytes(10) == b"new"


def test_equal_bytes_of_another_writer_are_not_taken_for_ours(bucket):
    file = locate(bucket) / "one"
    assert file.create(b"the same") is not None
    assert file.create(b"the same") is None


def test_two_growths_of_the_plan_at_once_lose_nothing(bucket):
    create(locate(bucket))
    stores = [FeatureStore.open(bucket, "tokens") for _ in range(4)]
    wanted = [{f"video{number}": range(number + 3)} for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda store, videos: store.extend_plan(videos), stores, wanted))
    plan = FeatureStore.open(bucket, "tokens").plan
    assert set(plan.videos) == {f"video{number}" for number in range(4)}
    assert metadata._rows(stores[0].layout.info) == plan.num_shards * 8
    assert len([name for name in files.names_in(locate(bucket) / "plan") if name[0] == "0"]) == 4


def test_an_upload_that_a_dead_process_left_is_swept_and_a_living_one_stays(s3):
    create(locate(s3))
    folder = locate(s3) / "tokens"
    dead = folder / f".shard-0.{files.HOST}.4194000.0123abcd.partial"
    living = folder / f".shard-0.{files.HOST}.1.0123abcd.partial"
    elsewhere = folder / ".shard-0.another-host.4194000.0123abcd.partial"
    for file in (dead, living, elsewhere):
        file.write(b"half")
    create(locate(s3))
    assert [file.exists() for file in (dead, living, elsewhere)] == [False, True, True]


def upload_and_die(url):
    objects.SINGLE_PUT = 100
    obstore.copy = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    extract(locate(url))


def test_a_writer_that_dies_between_upload_and_commit_leaves_nothing_that_stays(s3):
    child = multiprocessing.get_context("spawn").Process(target=upload_and_die, args=(s3,))
    child.start()
    child.join(500)
    assert child.exitcode == -signal.SIGKILL
    left = [key for key in bytes_of(s3) if key.endswith(".partial")]
    assert [key.rpartition("/")[0] for key in left] == ["tokens"]
    extract(locate(s3))
    assert not [key for key in bytes_of(s3) if key.endswith(".partial")]
    assert verify.full(FeatureStore.open(s3, "tokens")) == []


def test_a_plan_file_that_is_missing_below_another_is_noticed(s3, tokens):
    tokens.extend_plan({"fox": [1]})
    (locate(s3) / "plan/000000.npz").delete()
    with pytest.raises(CacheCorrupt, match=f"{s3}/plan/000000.npz is missing, but 000001.npz exists"):
        FeatureStore.open(s3, "tokens")


# ---------------------------------------------------------------- requests


def test_neighbouring_frames_come_in_one_request_and_far_ones_at_the_same_time(s3, moto, monkeypatch):
    store = extract(locate(s3), ["tokens_large"], {"cat": range(200)}, shard_frames=200)["tokens_large"]
    use(monkeypatch, moto.port)
    store.read("cat", [0])
    monkeypatch.setattr("cache_schema.object_reads.RANGE", 1 << 20)
    gets = partial(filter, lambda seen: seen[0] == "GET")
    with FaultProxy(moto.port) as proxy:
        use(monkeypatch, proxy.port)
        assert (store.read("cat", list(range(200))) == features("tokens_large", "cat", range(200))).all()
        assert len(list(gets(proxy.seen))) == 14  # 15 frames of 69,632 bytes fit into 1 MiB
        proxy.seen.clear()
        near = list(range(3, 18))
        store.read("cat", near)
        assert len(list(gets(proxy.seen))) == 1
        proxy.seen.clear()
        store.read("cat", [5, 100, 199])
        assert len(list(gets(proxy.seen))) == 3
        assert proxy.most_at_a_time > 1


@pytest.mark.usefixtures("store")
def test_a_passing_fault_is_survived_and_a_lasting_one_ends_after_so_many_tries(bucket, server, monkeypatch):
    for fault in (500, 503, "reset", "half a body"):
        with FaultProxy(server.port, first(2, fault, "GET", "/c.0.")) as proxy:
            use_for(bucket, monkeypatch, proxy.port)
            store = FeatureStore.open(bucket, "tokens")
            assert (store.read("ant", [0, 9]) == features("tokens", "ant", [0, 9])).all()
            assert [what for _, _, what in proxy.seen].count(fault) == 2
    with FaultProxy(server.port, first(10**6, 503, "GET", "/c.0.")) as proxy:
        use_for(bucket, monkeypatch, proxy.port)
        store = FeatureStore.open(bucket, "tokens")
        with pytest.raises(StoreUnavailable, match=f"{bucket}/tokens/c.0.0.0: reading it: .*503 SlowDown") as caught:
            store.read("ant", [0, 9])
        assert caught.value.status == 503
        assert [what for _, _, what in proxy.seen].count(503) == 5  # one request and four retries
        assert str(caught.value).endswith(f"pipeline doctor --store {bucket}")
        assert SECRET not in str(caught.value)


def test_a_store_that_goes_silent_is_asked_again(moto, monkeypatch, tokens):
    monkeypatch.setitem(connections.TIMEOUTS, "read_timeout", timedelta(seconds=2))
    with FaultProxy(moto.port, first(1, "stall", "GET", "/c.0.")) as proxy:
        use(monkeypatch, proxy.port)
        began = time.monotonic()
        assert (tokens.read("elk", [0]) == features("tokens", "elk", [0])).all()
        tokens.read("ant", [0, 9])
        assert "stall" in [what for _, _, what in proxy.seen]
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_retried(moto, monkeypatch, tokens, status):
    for method, use_it in (("GET", lambda: tokens.read("ant", [0])), ("PUT", lambda: tokens.extend_plan({"fox": [1]}))):
        with FaultProxy(moto.port, first(10**6, status, method)) as proxy:
            use(monkeypatch, proxy.port)
            with pytest.raises(
                StoreUnavailable, match="the credentials in the environment do not allow this"
            ) as caught:
                use_it()
        assert caught.value.refused
        assert [what for _, _, what in proxy.seen].count(status) == 1
        assert SECRET not in str(caught.value)


def test_a_store_that_is_away_and_a_bucket_that_is_not_there_are_told_apart(bucket, monkeypatch):
    with pytest.raises(StoreUnavailable, match="there is no bucket 'no-such-bucket', or it is not yours"):
        create(locate(f"{bucket[:2]}://no-such-bucket/x"))
    with pytest.raises(CacheMissing, match=f"There is no cache at {bucket}"):
        FeatureStore.open(bucket, "tokens")
    use_for(bucket, monkeypatch, 1, max_retries=1)
    with pytest.raises(StoreUnavailable, match="no connection"):
        FeatureStore.open(bucket, "tokens")


# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKID:{SECRET}@features/x",
        "s3://features/x?sig=canary",
        "s3://features/../x",
        "s3://features//x",
        "s3://features/x\n",
        "s3:///x",
        "https://features.example/x?sig=canary",
        "file:///tmp/canary",
    ],
)
def test_other_urls_are_refused_and_what_they_hold_is_not_repeated(url):
    with pytest.raises(ValueError, match=r"s3://bucket|scheme://bucket") as caught:
        locate(url)
    assert "canary" not in str(caught.value)


def test_a_folder_stays_a_folder_and_a_trailing_slash_means_nothing(tmp_path):
    assert locate(str(tmp_path)) == tmp_path
    assert locate("s3://features/a/") == locate("s3://features/a")
    assert str(locate("gs://features/a") / "tokens") == "gs://features/a/tokens"
    assert locate("az://features").joinpath("c", "0").remove_command == (
        "az storage blob delete --container features --name c/0"
    )


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("http://192.0.2.7:9000", "plain http to 192.0.2.7"),
        ("https://user:canary@features.example", "password"),
    ],
)
def test_credentials_do_not_travel_unprotected_or_in_the_endpoint(monkeypatch, s3, endpoint, said):
    use(monkeypatch, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnavailable, match=said) as caught:
        FeatureStore.open(s3, "tokens")
    assert "canary" not in str(caught.value)


def test_a_shard_that_no_store_could_commit_is_refused_before_anything_is_made(s3):
    stride = 69_632  # 66,306 bytes in pages
    with pytest.raises(ValueError, match=rf"more than the 5 GB .*\n.*shard_frames={5 * 10**9 // stride}$"):
        create(locate(s3), "tokens_large", shard_frames=100_000)
    with pytest.raises(CacheMissing):
        FeatureStore.open(s3, "tokens_large")


# --- mending and cleaning


def made_again(segment):
    return SegmentResult(
        iter([{"tokens": features("tokens", segment.video_id, segment.frame_index)}]),
        lambda: {"size": len(segment.video_id), "pts": list(segment.frame_index)},
    )


def test_repair_of_an_object_store_gives_the_bytes_that_were_there(bucket, store):
    sound = bytes_of(bucket)
    flipped, cut = (store.layout.info.shard_file(number) for number in (0, 3))
    flipped.write(bytes([sound["tokens/c.0.0.0"][0] ^ 1]) + sound["tokens/c.0.0.0"][1:])
    cut.write(sound["tokens/c.3.0.0"][:50])
    store.layout.info.shard_file(5).delete()
    reader = FeatureStore.open(locate(bucket), "tokens")
    damaged = verify.damaged_shards(verify.full(reader))
    assert damaged == [0, 3, 5]
    assert [repair_shard(reader, number, made_again).repaired for number in damaged] == [True] * 3
    assert verify.full(FeatureStore.open(locate(bucket), "tokens")) == []
    assert bytes_of(bucket) == sound


def test_gc_of_an_object_store_removes_what_dead_writers_left_and_nothing_else(bucket, store):
    sound, place = bytes_of(bucket), locate(bucket)
    for name in (".shard-9.node-7.12.0123abcd.partial", "notes.txt"):
        (place / "tokens" / name).write(b"half a shard")
    found = {orphan.path.name: orphan for orphan in orphans.find(place, dead_hosts={"node-7"})}
    assert {name: (orphan.kind, orphan.dead) for name, orphan in found.items()} == {
        ".shard-9.node-7.12.0123abcd.partial": ("partial", True),
        "notes.txt": ("unplanned", False),
    }
    for orphan in found.values():
        if orphan.dead:
            orphans.remove(orphan)
    assert bytes_of(bucket) == {**sound, "tokens/notes.txt": b"half a shard"}
    orphans.remove(found["notes.txt"])
    assert bytes_of(bucket) == sound
    assert store.read("ant", [0]).shape == (1, 5, 7)
