"""The store on Azure's blob storage: same bytes, same commits, same refusals. The server is Microsoft's Azurite.

What does not depend on the kind of store (spans of reads, local copies, messages) is tested in test_objects.py: on S3,
or on both where the fixture is ``bucket``.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import zarr
from obstore.store import AzureStore
from zarr.storage import ObjectStore

from cache_schema import CacheCorrupt, CacheMissing, FeatureStore, connections, objects, orphans, verify
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from cache_schema.probe import probe
from cache_schema.repair import repair_shard
from tests.cache_schema.makers import SPECS, WANTED, create, extract, features, single
from tests.cache_schema.test_objects import FAILING, bytes_of, files_of, made_again
from tests.object_servers import (
    ACCOUNT,
    ACCOUNT_KEY,
    SECRET,
    FaultProxy,
    azure_sas,
    first,
    use_azure,
    use_no_store,
)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "cache.zarr"
    extract(path, list(SPECS), **FAILING)
    return path


@pytest.fixture
def tokens(az):
    """A small store of one modality."""
    return extract(locate(az))["tokens"]


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
def test_a_store_is_byte_for_byte_the_local_one_and_sound(az, local, monkeypatch, single_put):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)  # Azure is asked for no copy whatever the size
    stores = extract(locate(az), list(SPECS), **FAILING)
    assert bytes_of(az) == files_of(local)
    for modality, store in stores.items():
        assert verify.full(store) == []
        assert store.pending() == []
        assert {video for video, status in store.status().items() if not status.ok} == {"dog"}
        for video in sorted(set(WANTED) - {"dog"}):
            index = list(WANTED[video])[::-1]
            assert (store.read(video, index, verify=True) == features(modality, video, index)).all()


def test_a_second_extraction_writes_nothing(az, azurite, monkeypatch):
    extract(locate(az))
    with FaultProxy(azurite.port) as proxy:
        use_azure(monkeypatch, proxy.port)
        extract(locate(az))
    assert {method for method, _, _ in proxy.seen} == {"GET", "HEAD"}


def test_zarr_python_reads_it_through_obstore(az, local):
    extract(locate(az), list(SPECS), **FAILING)
    root = locate(az)
    client = AzureStore(root.bucket, prefix=root.key, client_options={"allow_http": True})
    remote, here = zarr.open_group(ObjectStore(client, read_only=True), mode="r"), zarr.open_group(local, mode="r")
    for modality in SPECS:
        assert np.array_equal(remote[modality][:], here[modality][:], equal_nan=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_object_is_named_with_the_command_that_removes_it(az, tokens, damage):
    shard = tokens.layout.info.shard_file(0)
    raw = bytearray(shard.read_bytes(1 << 20))
    if damage == "flip":
        raw[33] ^= 1
    new = {"cut": raw[:-1], "empty": b"", "swap": tokens.layout.info.shard_file(1).read_bytes(1 << 20)}
    shard.write(bytes(new.get(damage, raw)))
    store = FeatureStore.open(az, "tokens")
    with pytest.raises(CacheCorrupt) as caught:
        store.read("ant", [0])
    assert f"az storage blob delete --container features --name {shard.key}" in str(caught.value)
    kinds = {"flip": "frame", "cut": "truncated", "empty": "truncated", "swap": "wrong_shard"}
    assert [(p.shard, p.kind) for p in verify.full(store)] == [(0, kinds[damage])]


def test_repair_gives_the_bytes_that_were_there_and_gc_removes_only_what_the_dead_left(az, tokens):
    sound, place = bytes_of(az), locate(az)
    tokens.layout.info.shard_file(0).write(b"damaged")
    tokens.layout.info.shard_file(5).delete()
    dead = place / "tokens" / ".shard-9.node-7.12.0123abcd.partial"
    dead.write(b"half a shard")
    store = FeatureStore.open(locate(az), "tokens")
    damaged = verify.damaged_shards(verify.full(store))
    assert damaged == [0, 5]
    assert [repair_shard(store, number, made_again).repaired for number in damaged] == [True] * 2
    (orphan,) = orphans.find(place, dead_hosts={"node-7"})
    assert (orphan.path, orphan.dead) == (dead, True)
    orphans.remove(orphan)
    assert bytes_of(az) == sound


def test_an_object_that_is_replaced_between_its_size_and_its_bytes_is_looked_at_again(az, monkeypatch):
    file, real, left = locate(az) / "growing", objects.ObjectPath.head, 3
    file.write(b"0" * 50)

    def replaced_after(self):
        nonlocal left
        found = real(self)
        if left:
            self.write(str(left).encode() * (10 * left))
            left -= 1
        return found

    monkeypatch.setattr(objects.ObjectPath, "head", replaced_after)
    tail = file.tail(4)
    assert (bytes(tail.data), tail.size, left) == (b"1111", 10, 0)
    left, old = 1, file.pinned(real(file)[1])
    with pytest.raises(connections.ObjectChanged):  # this one asked for a version
        old.tail(4)


# ---------------------------------------------------------------- commits


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
def test_of_two_writers_of_a_shard_the_first_wins_and_the_other_says_so(az, monkeypatch, single_put):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)
    store = create(locate(az))
    store.extend_plan(WANTED)
    task = store.pending()[0]
    reports = []

    def other_writer(_):
        if not reports:
            reports.append(None)
            reports[0] = FeatureStore.open(az, "tokens").write_task(task, single())

    second = store.write_task(task, single(on_batch=other_writer))
    assert (reports[0].skipped, second.skipped) == (False, True)


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
@pytest.mark.parametrize("fault", ["lose answer", "reset", 500, 503])
def test_a_commit_whose_answer_is_lost_counts_once_and_as_ours(az, azurite, monkeypatch, fault, single_put):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)
    store = create(locate(az))
    store.extend_plan(WANTED)
    with FaultProxy(azurite.port, first(1, fault, "PUT", "/tokens/c/0/0/0")) as proxy:
        use_azure(monkeypatch, proxy.port)
        report = store.write_task(store.pending()[0], single())
    assert not report.skipped
    assert report.frames == 7
    puts = [(path, what) for method, path, what in proxy.seen if method == "PUT"]
    assert puts[0][1] == fault
    assert {path.partition("?")[0].rpartition("/tokens/c/")[2] for path, _ in puts} == {"0/0/0"}  # no copy, no parts
    use_azure(monkeypatch, azurite.port)
    assert (FeatureStore.open(az, "tokens").read("ant", [0, 9]) == features("tokens", "ant", [0, 9])).all()


@pytest.mark.parametrize("large", [False, True])
def test_an_exchange_of_one_version_is_one_request_at_any_size(az, monkeypatch, tmp_path, large):
    monkeypatch.setattr(objects, "SINGLE_PUT", 100)
    (tmp_path / "new").write_bytes(b"new" * (100 if large else 1))
    file = locate(az) / "one"
    file.write(b"old")
    old = file.head()[1]
    assert file.exchange(tmp_path / "new", old) == file.head()[1] != old
    assert file.exchange(b"newer", old) is None
    assert file.exchange(tmp_path / "new", old) is None
    assert file.read_bytes(1000) == (tmp_path / "new").read_bytes()


# ---------------------------------------------------------------- requests and refusals


@pytest.mark.usefixtures("tokens")
def test_a_passing_fault_is_survived_and_a_lasting_one_ends_after_so_many_tries(az, azurite, monkeypatch):
    for fault in (500, 503, "reset", "half a body"):
        with FaultProxy(azurite.port, first(2, fault, "GET", "/c/0/")) as proxy:
            use_azure(monkeypatch, proxy.port)
            assert (FeatureStore.open(az, "tokens").read("ant", [0, 9]) == features("tokens", "ant", [0, 9])).all()
            assert [what for _, _, what in proxy.seen].count(fault) == 2
    with FaultProxy(azurite.port, first(10**6, 503, "GET", "/c/0/")) as proxy:
        use_azure(monkeypatch, proxy.port)
        with pytest.raises(StoreUnavailable, match=f"{az}/tokens/c/0/0/0: reading it: .*503 SlowDown") as caught:
            FeatureStore.open(az, "tokens").read("ant", [0, 9])
        assert caught.value.status == 503
        assert [what for _, _, what in proxy.seen].count(503) == 5  # one request and four retries
        assert SECRET not in str(caught.value)


def test_a_wrong_key_and_a_wrong_signature_are_refused_at_once_and_not_shown(az, azurite, monkeypatch):
    use_azure(monkeypatch, azurite.port, sas=azure_sas())
    assert create(locate(az) / "by-signature").modality == "tokens"
    wrong = {"AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc=", "AZURE_STORAGE_SAS_KEY": "sv=2021-12-02&sig=canary"}
    for name, value in wrong.items():
        use_azure(monkeypatch, azurite.port)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv(name, value)
        with FaultProxy(azurite.port) as proxy:
            monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{proxy.port}/{ACCOUNT}")
            with pytest.raises(StoreUnavailable, match=r"the store refused it \(403") as caught:
                create(locate(az))
        assert caught.value.refused
        assert len(proxy.seen) == 1
        assert not [secret for secret in ("d3Jvbmc", "canary", ACCOUNT_KEY) if secret in str(caught.value)]
        assert caught.value.__suppress_context__


def test_a_container_that_is_not_there_and_a_store_that_is_away_are_told_apart(az, monkeypatch):
    with pytest.raises(StoreUnavailable, match="there is no bucket 'no-such-one', or it is not yours"):
        create(locate("az://no-such-one/x"))
    with pytest.raises(CacheMissing, match=f"There is no cache at {az}"):
        FeatureStore.open(az, "tokens")
    use_azure(monkeypatch, 1, max_retries=1)
    with pytest.raises(StoreUnavailable, match="no connection"):
        FeatureStore.open(az, "tokens")


@pytest.mark.parametrize(
    ("scheme", "environment"),
    [
        ("az", {}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "canary!"}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_KEY": "canary"}),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT": "/canary/none.json"}),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": "{'canary': 1}"}),
    ],
)
def test_an_environment_that_cannot_be_used_is_said_without_repeating_it(monkeypatch, scheme, environment):
    use_no_store(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = f"{scheme}://features/x"
    for use_it in (FeatureStore.open, create):
        with pytest.raises(StoreUnavailable, match=f"{scheme}:// cannot be used with what the environment") as caught:
            use_it(locate(url), "tokens")
        assert caught.value.refused
        assert "canary" not in str(caught.value)
        assert caught.value.__suppress_context__


def test_an_environment_without_credentials_is_said_at_once(monkeypatch):
    use_no_store(monkeypatch, max_retries=0)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", "http://127.0.0.1:1")  # a machine of Azure's would have credentials there
    with pytest.raises(StoreUnavailable, match="no credentials for az:// were found in the environment") as caught:
        FeatureStore.open(locate("az://features/x"), "tokens")
    assert caught.value.refused
    assert ACCOUNT not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "endpoint", "said"),
    [
        ("AZURE_STORAGE_ENDPOINT", "http://192.0.2.7:9000/a", "plain http to 192.0.2.7"),
        ("AZURE_ENDPOINT", "http://192.0.2.7/a", "plain http to 192.0.2.7"),
        ("AZURE_STORAGE_ENDPOINT", "https://user:canary@a.example", "user name"),
        ("AZURE_STORAGE_ENDPOINT", "https://a.example/?sv=2021&sig=canary", "option"),
        ("AZURITE_BLOB_STORAGE_URL", "http://192.0.2.7:10000", "plain http to 192.0.2.7"),
        ("AWS_ENDPOINT_URL_S3", "http://192.0.2.7:9000", "plain http to 192.0.2.7"),
        ("GOOGLE_BASE_URL", "http://192.0.2.7:9000", "plain http to 192.0.2.7"),
    ],
)
def test_credentials_do_not_travel_unprotected_or_in_the_endpoint(monkeypatch, name, endpoint, said):
    use_azure(monkeypatch, 1)
    monkeypatch.setenv(name, endpoint)
    scheme = {"AZ": "az", "AW": "s3", "GO": "gs"}[name[:2]]
    with pytest.raises(StoreUnavailable, match=said) as caught:
        FeatureStore.open(locate(f"{scheme}://features/x"), "tokens")
    assert "canary" not in str(caught.value)


def test_the_emulator_is_reached_by_its_own_variables(az, azurite, monkeypatch):
    use_no_store(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{azurite.port}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    assert extract(locate(az))["tokens"].pending() == []


def test_what_is_uploaded_takes_no_memory_of_its_own(az, tmp_path):
    with (tmp_path / "large").open("wb") as file:
        os.truncate(file.fileno(), 64 << 20)
    before = anonymous_memory()
    assert (locate(az) / "large").create(tmp_path / "large") is not None
    assert anonymous_memory() - before < 32 << 20
    assert (locate(az) / "large").head()[0] == 64 << 20


def anonymous_memory():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def test_everything_that_a_cache_relies_on_is_there(az):
    assert [one.name for one in probe(locate(az)) if not one.ok] == []
